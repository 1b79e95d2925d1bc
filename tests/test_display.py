"""What a file brings is shown and never obeyed: in errors, logs, tables and answers."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from auricle.engine.gguf import string
from auricle.engine.outputs import OutputError
from auricle.kernels.display import CELL, LINE, show, show_answer
from auricle.kernels.errors import AuricleError
from auricle.kernels.formats import F32
from auricle.tools.cells import cell
from auricle.tools.cli.answer import _stream
from auricle.tools.cli.app import app, exit_status, print_json, say, tell_on_stderr
from gguf_samples import fill
from support import auricle

HOSTILE = "a\x1b[31m\x9b2J\r\nb\u202ec\ud800\U000e0041"
STORED = HOSTILE.replace("\ud800", "")  # as a file in UTF-8 can hold it
SHOWN = "a\\u001b[31m\\u009b2J\\r\\nb\\u202ec\\ud800\\U000e0041"


def test_every_character_can_be_seen() -> None:
    assert show(HOSTILE) == SHOWN
    assert show(SHOWN) == SHOWN
    assert show("é 日本 שלום 👩\u200d🔬 a b") == "é 日本 שלום 👩\u200d🔬 a b"
    assert show(Path("a\nb")) == "a\\nb"


@pytest.mark.parametrize("text", ["x" * 100_000, "\x1b" * 100_000, "\x1b" * (LINE - 1)])
def test_there_is_not_too_much_of_it(text: str) -> None:
    shown = show(text)
    assert len(shown) <= LINE
    assert f" … ({len(text):,} characters) … " in shown
    assert show("x" * LINE) == "x" * LINE


def test_errors_are_shown_a_line_an_argument() -> None:
    assert str(AuricleError(f"{HOSTILE}: mend it")) == f"{SHOWN}: mend it"
    assert str(OutputError("what", HOSTILE)) == f"what\n{SHOWN}"
    long = str(AuricleError("k" * 100_000 + "; convert it again"))
    assert long.endswith("; convert it again")
    assert len(long) <= LINE


def test_answers_keep_their_lines() -> None:
    assert show_answer("a\tb\n\x1b]0;c\x07\r") == "a\tb\n\\u001b]0;c\\u0007\\r"
    text = "日本 \u202bשלום\u202c"
    assert show_answer(text) == text


class Answer(list):
    result = None


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_on_a_terminal_and_in_a_pipe(terminal: bool) -> None:
    """The bytes of an answer are the model's in a pipe; a terminal gets nothing to obey."""
    out = io.StringIO()
    out.isatty = lambda: terminal
    pieces = Answer(["one\x1b", "[31m", " two\n"])
    model: Any = SimpleNamespace(stream=lambda *_, **__: pieces)
    settings: Any = SimpleNamespace(as_json=False, generation=dict)
    with redirect_stdout(out):
        _stream(model, [], "What?", settings)
    assert out.getvalue() == ("one\\u001b[31m two\n\n" if terminal else "one\x1b[31m two\n\n")


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", "[/nope]", ":warning:", "x\\", "[link=file:///etc]x"])
def test_no_markup_in_tables(name: str) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(cell(name))
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="truecolor").print(table)
    assert out.getvalue().strip() == name
    assert len(cell("x" * 10_000)) == CELL


def test_logs_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("auricle")
    before = log.handlers[:], log.level, log.propagate
    try:
        log.propagate = False  # what pytest keeps of a log must be Unicode
        tell_on_stderr()
        log.warning("of %s", HOSTILE)
    finally:
        log.handlers[:], log.level, log.propagate = before
    say(HOSTILE)
    assert capsys.readouterr().err == f"auricle: of {SHOWN}\n{SHOWN}\n"
    print_json({"a": HOSTILE, "b": "é"})
    assert capsys.readouterr().out.isascii()


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A GGUF file whose every text is an attack."""
    tensors = [(f"{STORED}[red]", (3,), F32), ("[/nope]", (3,), F32), ("n" * 64, (3,), F32)]
    keys = {"general.architecture": string(STORED), "key\x1b[2J": string("[bold]" * 1000)}
    fill(tmp_path / "a.gguf", keys, tensors)
    return tmp_path / "a.gguf"


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "verify", "plan -m", "warmup -m", "quantize"])
def test_a_hostile_file(hostile: Path, command: str) -> None:
    name, *options = command.split()
    more = [hostile.parent / "out[red].gguf", "--type", "f32"] if name == "quantize" else []
    status, out, errors = auricle(name, *options, hostile, *more)
    for line in (out + errors).split("\n"):
        assert line.isprintable()
        assert len(line) <= LINE or "--json" in options
    assert status == (3 if name == "plan" else 0), errors
    assert not errors or errors.count("\n") == 1 or name == "warmup"
    if command in ("inspect", "verify"):
        assert show(STORED) + "[red]" in out
        assert "[/nope]" in out
    if name == "quantize":
        assert f"{hostile.parent}/out[red].gguf: 3 tensors" in errors


def test_a_checksum_manifest_of_hostile_names(hostile: Path) -> None:
    manifest = hostile.parent / "sums"
    assert auricle("verify", hostile, "--write-manifest", manifest)[0] == 0
    assert len(manifest.read_text(encoding="utf-8").splitlines()) == 4
    assert auricle("verify", hostile, "--manifest", manifest)[0] == 0


def test_file_names(tmp_path: Path) -> None:
    status, out, errors = auricle("inspect", tmp_path / "no\x1b[31m\udcff.gguf")
    assert (status, out) == (3, "")
    assert errors.count("\n") == 1
    assert errors[:-1].isprintable()


def test_outputs_have_a_status_of_their_own() -> None:
    assert exit_status(OutputError("x")) == 8
    assert app.info.name == "auricle"
