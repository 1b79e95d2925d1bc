"""The entry point of `auricle`."""

from __future__ import annotations

import sys

from ...kernels.errors import AuricleError
from ..process import ended_by_signals, standard_streams
from . import answer, bench, conversion, diff, evaluate, files, finetune, imatrix, synth, verify, warmup  # noqa: F401  (their commands register themselves)
from .app import app, complain


def run() -> None:
    """Runs a command and turns what went wrong into a status."""
    with standard_streams(), ended_by_signals():
        try:
            app()
        except AuricleError as error:
            sys.exit(complain(error))
