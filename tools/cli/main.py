"""The entry point of `auricle`."""

from __future__ import annotations

import io
import sys

from ...kernels.errors import AuricleError
from . import answer, bench, conversion, diff, evaluate, files, finetune, imatrix, synth, verify, warmup  # noqa: F401  (their commands register themselves)
from .app import app, complain


def run() -> None:
    """Runs a command and turns what went wrong into a status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character shows another
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except AuricleError as error:
        sys.exit(complain(error))
