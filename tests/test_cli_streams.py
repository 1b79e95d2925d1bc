"""Streams that are closed, full or left, and environments that lack the usual: the work is done, or a line says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from auricle.engine.sampling import OptionError
from auricle.tools.cli.answer import split_question
from auricle.tools.demo import FOLDER, MODEL
from auricle.tools.process import ended_by_signals

CLIP = FOLDER / "yweweler.flac"
TRANSCRIBE = ("transcribe", CLIP, "-m", MODEL)
FULL, CLOSED = "cannot write to stdout: No space left on device", "cannot write to stdout: it is closed"


def auricle(*arguments: object, redirect: str = "", code: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The program with its streams as bash redirects them, or the Python `code` in its place."""
    program = ["-c", code] if code else ["-m", "auricle.tools"]
    command = ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, *program, *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, timeout=300, check=False, env=env)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("inspect", MODEL), ("inspect", MODEL, "--json"), ("verify", MODEL), TRANSCRIBE],
    ids=["help", "table", "json", "lines", "answer"],
)
def test_a_full_stdout_is_one_line(arguments: tuple[object, ...]) -> None:
    done = auricle(*arguments, redirect=">/dev/full")
    assert done.returncode == 8
    assert done.stderr.decode() == f"auricle: {FULL}\n"


@pytest.mark.parametrize("arguments", [("--version",), ("inspect", MODEL), (*TRANSCRIBE, "--json")])
def test_a_closed_stdout_is_one_line(arguments: tuple[object, ...]) -> None:
    done = auricle(*arguments, redirect=">&-")
    assert done.returncode == 8
    assert done.stderr.decode() == f"auricle: {CLOSED}\n"


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_stderr_is_not_needed(redirect: str) -> None:
    done = auricle(*TRANSCRIBE, redirect=redirect)
    assert done.returncode == 0
    assert done.stdout.decode().split() == ["nine", "zero", "seven"]
    done = auricle("transcribe", "no.wav", "-m", MODEL, redirect=redirect)
    assert (done.returncode, done.stdout) == (4, b"")


def test_all_streams_closed() -> None:
    assert auricle("inspect", MODEL, redirect="<&- >&- 2>&-").returncode == 8


def test_a_reader_that_left_is_told_nothing() -> None:
    end, start = os.pipe()
    os.close(end)
    command = [sys.executable, "-m", "auricle.tools", "inspect", str(MODEL)]
    done = subprocess.run(command, stdout=start, stderr=subprocess.PIPE, timeout=300, check=False)
    os.close(start)
    assert (done.returncode, done.stderr) == (8, b"")


WITH_STREAMS = "import os, sys\nfrom auricle.tools.process import standard_streams\nwith standard_streams():\n    "


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """A library that complains on descriptor 2 would write into the model."""
    code = WITH_STREAMS + "sys.exit(os.open(os.devnull, os.O_RDONLY) > 2)"
    assert auricle(code=code, redirect="<&- >&- 2>&-").returncode == 1


def test_what_was_written_before_the_disk_was_full_is_lost_once() -> None:
    code = WITH_STREAMS + "print('x' * 100_000); print('y')"
    done = auricle(code=code, redirect=">/dev/full")
    assert (done.returncode, done.stderr.decode()) == (8, f"auricle: {FULL}\n")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", rb"\u4f60\u597d \xe9 \U0001f600 \udcff"), ("latin-1", b"\\u4f60\\u597d \xe9 \\U0001f600 \\udcff")],
)
def test_nothing_is_lost_where_an_encoding_lacks_it(encoding: str, expected: bytes) -> None:
    code = WITH_STREAMS + "print('你好 é 😀 \\udcff')"
    done = auricle(code=code, PYTHONIOENCODING=encoding)
    assert done.stdout == expected + b"\n"
    done = auricle(code=code, LANG="C", LC_ALL="C")
    assert done.stdout == "你好 é 😀 ".encode() + b"\\udcff\n"


NO_HOME = """
import os, pwd
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
from auricle.tools.cli.main import run
run()
"""


def test_a_user_without_a_home() -> None:
    """As in a container that runs with a number nobody has."""
    gone = {"HOME", "XDG_CACHE_HOME", "AURICLE_CACHE"}
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    command = [sys.executable, "-c", NO_HOME, *map(str, TRANSCRIBE)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, env=kept)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert done.stdout.decode().split() == ["nine", "zero", "seven"]
    assert said.count("compiled kernels cannot be kept") == said.count("this user has no home") <= 1
    assert "Traceback" not in said


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_plain_terminals_get_no_codes(variable: str) -> None:
    """No colours with NO_COLOR, nothing that moves the cursor on a dumb terminal."""
    import pty

    master, slave = pty.openpty()
    env = os.environ | {"TERM": "xterm", variable: "dumb"}
    command = [sys.executable, "-m", "auricle.tools", "inspect", str(MODEL)]
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        text = b""
        try:
            while piece := os.read(master, 1 << 16):
                text += piece
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(master)
    assert process.returncode == 0
    assert b"general.architecture" in text
    assert b"\x1b[3" not in text
    assert variable == "NO_COLOR" or b"\x1b" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_program_cleans_up(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_questions_that_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my talk.mp3").touch()
    for question in ("What is said in talk.mp3", "Compare a.wav and b.wav", "Is it in talk.mp3?", "talk"):
        assert split_question(["a.wav", question], None) == (["a.wav"], question)
    for name, message in {
        "my talk.mp3": "is a file; put a question after it",
        "-": "is a file; put a question after it",
        "talk.mp3": "looks like a file, which is not there",
        "./no such talk.mp3": "looks like a file, which is not there",
    }.items():
        with pytest.raises(OptionError, match=f"the question is missing: the last argument, {name}, {message}"):
            split_question(["a.wav", name], None)
    assert split_question(["a.wav"], "talk.mp3") == (["a.wav"], "talk.mp3")


def test_json_is_ascii(tmp_path: Path) -> None:
    done = auricle("transcribe", tmp_path / "你.wav", "-m", MODEL, "--json", PYTHONIOENCODING="utf-8")
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["file"] == str(tmp_path / "你.wav")
