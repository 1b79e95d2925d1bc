"""The program `auricle` that commands register with, and how errors become one line and an exit status.

Exit statuses: 0 done; 1 a defect of ours (with a traceback); 2 wrong usage or an option out of range; 3 the model
file cannot be opened or run; 4 audio cannot be read; 5 the request does not fit the context; 6 conversion failed;
7 the sides of a diff differ; 8 an output cannot be written: a file, or stdout (nothing is said where stdout's reader
left); 9 an answer was cut off, by its limit of tokens or the end of the context; 130 interrupted, 143 terminated. Of
several files all are tried, and the status is the first failure's; 9 comes after those.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer

from ...convert.checkpoint import ConversionError
from ...engine.audio import AudioError, LengthError
from ...engine.gguf import GGUFError
from ...engine.models.config import ModelError
from ...engine.outputs import OutputError
from ...engine.prompts import PromptError
from ...engine.sampling import OptionError
from ...engine.session import ContextError
from ...engine.tokenizer import TokenizerError
from ...kernels.display import show
from ...kernels.errors import AuricleError
from ..process import UNWRITABLE

app = typer.Typer(
    name="auricle",
    help="Audio-language models from one GGUF file, on a small GPU or a plain CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

CUT_OFF = 9
STATUSES: tuple[tuple[type[AuricleError], int], ...] = (
    (OptionError, 2),
    (PromptError, 2),
    (GGUFError, 3),
    (ModelError, 3),
    (TokenizerError, 3),
    (LengthError, 5),
    (AudioError, 4),
    (ContextError, 5),
    (ConversionError, 6),
    (OutputError, UNWRITABLE),
)


def exit_status(error: AuricleError) -> int:
    """The status a program ends with after `error`."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 2)


def complain(error: AuricleError) -> int:
    """Says what is wrong on stderr; gives the exit status."""
    print(f"auricle: {error}", file=sys.stderr)
    return exit_status(error)


def say(line: object) -> None:
    """A line on stderr, safe whatever is named in it."""
    print(show(line), file=sys.stderr)


def print_json(document: Any) -> None:
    """One line on stdout, in ASCII: it means the same in every encoding, and a terminal obeys none of it."""
    print(json.dumps(document, allow_nan=False), flush=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"auricle {version('auricle')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    tell_on_stderr()


def tell_on_stderr() -> None:
    """What the library has to say, such as that kernels are being compiled, as lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("auricle: %(message)s"))
    log = logging.getLogger("auricle")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)


class _Lines(logging.Formatter):
    """A record as a line, safe whatever is named in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return show(super().formatMessage(record))
