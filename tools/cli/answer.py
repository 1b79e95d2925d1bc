"""`auricle transcribe` and `auricle ask`: text on stdout as it is made, everything else on stderr."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from ...engine import Model, Result
from ...engine.audio import AudioError
from ...engine.prompts import TASKS
from ...engine.sampling import OptionError
from ...kernels.display import show_answer
from ...kernels.errors import AuricleError
from .app import CUT_OFF, app, complain, print_json, say
from .options import AnswerSettings, TranscribeSettings, model_in_the_box, with_settings

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".webm", ".aiff"}


@app.command()
@with_settings(TranscribeSettings)
def transcribe(
    files: Annotated[list[str], typer.Argument(help="Audio files; - reads one from stdin.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help=f"What to ask of each file.  [default: {TASKS['transcribe']}]", show_default=False
        ),
    ] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Ask for segments with the second each begins and ends.")
    ] = False,
    *,
    settings: TranscribeSettings,
) -> None:
    """Write down what is said in each file.

    Each file is a request of its own. With --json there is one JSON document a line and file.
    """
    if timestamps and prompt is not None:
        raise OptionError("--timestamps is a prompt of its own; leave out one of --timestamps and --prompt")
    question = prompt if prompt is not None else TASKS["timestamps" if timestamps else "transcribe"]
    if settings.model is None:
        settings = dataclasses.replace(settings, model=model_in_the_box())
    with _open(settings, [[file] for file in files]) as model:
        statuses = [_answer(model, [file], question, settings) for file in files]
    failures = [status for status in statuses if status not in (0, CUT_OFF)]
    raise typer.Exit(failures[0] if failures else max(statuses))


@app.command()
@with_settings(AnswerSettings)
def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[FILE]... QUESTION", help="Audio files, then the question.", show_default=False),
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The question; then all arguments are files.", show_default=False)
    ] = None,
    *,
    settings: AnswerSettings,
) -> None:
    """Ask a question about one or more audio files, or without any.

    All files belong to one question, in their order.
    """
    files, question = split_question(words, prompt)
    with _open(settings, [files]) as model:
        raise typer.Exit(_answer(model, files, question, settings))


def split_question(words: list[str], prompt: str | None) -> tuple[list[str], str]:
    """Files and question of `ask`. Raises OptionError when the question is missing."""
    if prompt is not None:
        return words, prompt
    *files, question = words
    if not question.strip():
        raise OptionError("the question is empty; write one")
    if question == "-" or os.path.isfile(question):
        raise OptionError(f"the question is missing: the last argument, {question}, is a file; put a question after it")
    if _looks_like_a_file(question):
        raise OptionError(
            f"the question is missing: the last argument, {question}, looks like a file, which is not there; "
            "put a question after it; one that is spelt like a file goes into --prompt"
        )
    return files, question


def _looks_like_a_file(text: str) -> bool:
    """A question may end in a file's name, but has several words then."""
    words = 1 if text.startswith(("/", "./", "../", "~")) else len(text.split())
    return words == 1 and Path(text).suffix.lower() in AUDIO_SUFFIXES


def _open(settings: AnswerSettings, requests: list[list[str]]) -> Model:
    """The model; where it cannot be opened, each request has its line of JSON all the same."""
    try:
        return settings.open()
    except AuricleError as error:
        for files in requests if settings.as_json else ():
            print_json({**_name(files, settings), "error": str(error)})
        raise


def _name(files: list[str], settings: AnswerSettings) -> dict[str, Any]:
    return {"model": str(settings.model), "file": files[0] if len(files) == 1 else files or None}


def _answer(model: Model, files: list[str], prompt: str, settings: AnswerSettings) -> int:
    """One request; gives the exit status. A failure is told on stderr and, with --json, on stdout too; so is an answer
    that was cut off."""
    named = _name(files, settings)
    try:
        sources = [_read_stdin() if file == "-" else file for file in files]
        result = _stream(model, sources, prompt, settings)
    except AuricleError as error:
        if settings.as_json:
            print_json({**named, "error": str(error)})
        return complain(error)
    if settings.as_json:
        print_json({**named, **result.to_dict()})
    if result.finish_reason == "length":
        about = f"{', '.join(files)}: " if files else ""
        say(f"auricle: {about}{describe_cut(result, model.n_ctx)}")
        return CUT_OFF
    if not settings.as_json and sys.stderr.isatty():
        t = result.timings
        print(
            f"{result.audio_seconds:.1f} s of audio, first text after {t.first_token_s:.2f} s, "
            f"{len(result.token_ids)} tokens in {t.decode_s:.2f} s",
            file=sys.stderr,
        )
    return 0


def describe_cut(result: Result, n_ctx: int) -> str:
    """What ended an answer of the reason "length", and the remedy."""
    n = len(result.token_ids)
    if result.prompt_tokens + n >= n_ctx:
        return (
            f"the answer was cut off after {n:,} tokens: the context of {n_ctx:,} is full; "
            "use a shorter recording, or a larger --ctx if the model has one"
        )
    return f"the answer was cut off after {n:,} tokens; --max-new-tokens allows more"


def _read_stdin() -> BinaryIO:
    if sys.stdin is None:
        raise AudioError("stdin is closed; name a file instead of -")
    return sys.stdin.buffer


def _stream(model: Model, sources: list[Any], prompt: str, settings: AnswerSettings) -> Result:
    """Prints the text while it is made, if wanted; on a terminal a line says what is going on until it starts."""
    from rich.console import Console

    console, wanted = Console(stderr=True), not settings.as_json
    safe = show_answer if sys.stdout.isatty() else str
    with console.status("listening …") if sys.stderr.isatty() else _Quiet() as status, _compiling(status):
        stream, begun = model.stream(prompt, sources or None, **settings.generation()), False
        try:
            for piece in stream:
                if wanted:
                    status.stop()
                    print(safe(piece), end="", flush=True)
                    begun = True
        except AuricleError:
            if begun:  # what went wrong has a line of its own
                print(flush=True)
            raise
    if wanted:
        print(flush=True)
    return stream.result


class _Quiet:
    """Takes the place of a status line where there is no terminal."""

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        pass


@contextmanager
def _compiling(status: Any) -> Iterator[None]:
    """Kernels that are compiled show in the status line, as a count; where there is none, as the lines they are. All
    are compiled before the first text."""
    if isinstance(status, _Quiet):
        yield
        return
    log, counter = logging.getLogger("auricle.kernels"), _Counter(status)
    log.addFilter(counter)
    try:
        yield
    finally:
        log.removeFilter(counter)


class _Counter(logging.Filter):
    """Takes the lines about compiling, and counts them in a status line."""

    def __init__(self, status: Any) -> None:
        super().__init__()
        self._status, self._n = status, 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("compiling "):
            return True
        self._n += 1
        self._status.update(f"compiling kernels, once for this machine: {self._n} …")
        return False
