"""The program `auricle` that commands register with, and how errors become one line and an exit status.

Exit statuses: 0 done; 1 a defect of ours (with a traceback), or a reader that left; 2 wrong usage or an option out of
range; 3 the model file cannot be opened or run; 4 audio cannot be read; 5 the request does not fit the context; 6
conversion failed; 7 the sides of a diff differ; 8 an answer was cut off, by its limit of tokens or the end of the
context; 130 interrupted. Of several files all are tried, and the status is the first failure's; 8 comes after those.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from ...convert.checkpoint import ConversionError
from ...engine.audio import AudioError
from ...engine.gguf import GGUFError
from ...engine.models.config import ModelError
from ...engine.prompts import PromptError
from ...engine.sampling import OptionError
from ...engine.session import ContextError
from ...engine.tokenizer import TokenizerError
from ...kernels.errors import AuricleError

app = typer.Typer(
    name="auricle",
    help="Audio-language models from one GGUF file, on a small GPU or a plain CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

CUT_OFF = 8
STATUSES: tuple[tuple[type[AuricleError], int], ...] = (
    (OptionError, 2),
    (PromptError, 2),
    (GGUFError, 3),
    (ModelError, 3),
    (TokenizerError, 3),
    (AudioError, 4),
    (ContextError, 5),
    (ConversionError, 6),
)


def exit_status(error: AuricleError) -> int:
    """The status a program ends with after `error`."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 2)


def complain(error: AuricleError) -> int:
    """Says what is wrong on stderr; gives the exit status."""
    print(f"auricle: {error}", file=sys.stderr)
    return exit_status(error)


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
    handler.setFormatter(logging.Formatter("auricle: %(message)s"))
    log = logging.getLogger("auricle")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
