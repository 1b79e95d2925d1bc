"""The entry point of `auricle`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from ...kernels.errors import AuricleError
from ..process import ended_by_signals, standard_streams

INTERRUPTED = 130
Handler = Callable[[int, FrameType | None], Any]


def run() -> None:
    """Runs a command and turns what went wrong into a status."""
    _at_interrupt(_leave)  # while libraries are imported, which nothing can be thrown through
    from . import answer, bench, conversion, diff, evaluate, files, finetune, imatrix, synth, verify, warmup  # noqa: F401  (their commands register themselves)
    from .app import app, complain

    atexit.register(_at_interrupt, _leave)  # the interpreter takes everything down
    _at_interrupt(signal.default_int_handler)
    with standard_streams(), ended_by_signals():
        try:
            app()
        except AuricleError as error:
            sys.exit(complain(error))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def _at_interrupt(handler: Handler) -> None:
    """Unless interrupts are ignored, as they are in a job that a script has put into the background."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _leave):
        signal.signal(signal.SIGINT, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: nothing has been begun, or all is done."""
    os._exit(INTERRUPTED)
