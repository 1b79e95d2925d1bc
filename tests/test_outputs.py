"""Outputs: never over what is read, whole or not at all, and written in one place."""

from __future__ import annotations

import ast
import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from auricle.engine import outputs
from auricle.engine.outputs import OutputError, check_outputs, copy_file, replacing, write_bytes, write_text
from support import ROOT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint" / "deeper").mkdir(parents=True)
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "checkpoint" / "deeper" / "shard").write_text("weights")
    (tmp_path / "model.gguf").write_text("weights")
    return tmp_path / "model.gguf"


def link(make: Callable[[Path, Path], None], name: str) -> Callable[[Path], Path]:
    """Another name of an input."""

    def another(folder: Path) -> Path:
        make(folder / name, folder / "another")
        return folder / "another"

    return another


SAME: dict[str, Callable[[Path], Path]] = {
    "itself": lambda f: f / "model.gguf",
    "another spelling": lambda f: f / "checkpoint" / ".." / "model.gguf",
    "a symbolic link": link(lambda old, new: new.symlink_to(old), "model.gguf"),
    "a hard link": link(lambda old, new: new.hardlink_to(old), "model.gguf"),
    "a file of a folder": lambda f: f / "checkpoint" / "config.json",
    "a file deeper in it": lambda f: f / "checkpoint" / "deeper" / "shard",
    "a link to a file of a folder": link(lambda old, new: new.symlink_to(old), "checkpoint/deeper/shard"),
}


@pytest.mark.parametrize("case", SAME)
def test_no_input_is_an_output(model: Path, case: str) -> None:
    out = SAME[case](model.parent)
    before = out.read_text()
    with pytest.raises(OutputError, match=r"is (an input itself|the input .*); write to another path"):
        check_outputs([None, out], [None, model, model.parent / "checkpoint"])
    assert out.read_text() == before


def test_an_input_folder_may_get_another_file(model: Path) -> None:
    check_outputs([model.parent / "checkpoint" / "new.gguf", model.parent / "b"], [model, model.parent / "checkpoint"])
    check_outputs([model], [model.parent / "not there"])


@pytest.mark.parametrize("exists", [True, False])
def test_two_outputs_are_two_files(model: Path, exists: bool) -> None:
    out, other = model.parent / "out", model.parent / "checkpoint" / ".." / "out"
    if exists:
        out.write_text("before")
    with pytest.raises(OutputError, match="are one file; give each output its own"):
        check_outputs([out, other], [model])


def test_places_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    wrong = {
        tmp_path / "no" / "x": "no is not a folder: make it first",
        tmp_path: "is not a file",
        tmp_path / "pipe": "is not a file",
        Path("/dev/null"): "is not a file",
        Path("-"): "- is stdout",
        tmp_path / ("x" * 300): "File name too long",
    }
    for path, message in wrong.items():
        with pytest.raises(OutputError, match=message) as caught:
            check_outputs([path])
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    with pytest.raises(OutputError, match="nothing can be made in"):
        check_outputs([tmp_path / "x"])


@pytest.mark.parametrize("fd", [1, 2])
def test_where_a_stream_goes_is_no_output(tmp_path: Path, fd: int) -> None:
    saved = os.dup(fd)
    try:
        with (tmp_path / "log").open("wb") as file:
            os.dup2(file.fileno(), fd)
            with pytest.raises(OutputError, match=f"log is where {outputs.STREAMS[fd]} goes"):
                check_outputs([tmp_path / "log"])
    finally:
        os.dup2(saved, fd)
        os.close(saved)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_the_users(tmp_path: Path, mask: int) -> None:
    """Also where a library puts a file of its own, as it likes, in the place of the one it was to write."""
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "text")
        with replacing(tmp_path / "b") as part:
            (tmp_path / "own").write_text("text")
            (tmp_path / "own").chmod(0o600)
            os.replace(tmp_path / "own", part.path)
    finally:
        os.umask(before)
    for name in ("a", "b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask
        assert (tmp_path / name).read_text() == "text"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, OSError])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("before")

    def fail() -> None:
        with replacing(tmp_path / "a") as part:
            os.write(part.fd, b"half")
            assert part.path.parent == tmp_path, "a rename must not leave the disk"
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("before")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match=r"cannot write .*a: No space left on device; make room") as caught:
        write_text(tmp_path / "a", "page")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_bytes(tmp_path / "a", b"x")
    assert calls == ["write", "fsync", "replace"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    for text in ("new", "newer"):  # what it points to is not there yet, then it is
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_text() == text
    assert os.listdir(tmp_path / "real") == ["file"]


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 255), "text")
    copy_file(tmp_path / ("x" * 255), tmp_path / ("y" * 255))
    assert (tmp_path / ("y" * 255)).read_text() == "text"


# The house rule: whoever writes a file does it with `outputs`. A log that only grows may be opened to append.

KNOWN = {
    "engine/outputs.py",  # it is the one
    "convert/journal.py",  # the diary of a conversion is written in place, and says so
    "kernels/gpu/static.py",  # a scratch file for a tool
    "tools/sample.py",  # a whole folder takes its place at once
    "benchmarks/turns.py",  # a log
    "benchmarks/card.py",  # runs where nothing can be imported of the project, and has the same way of its own
    "benchmarks/card_report.py",  # likewise
    "benchmarks/card_cases.py",  # marks in a folder of the run
    "benchmarks/card_tune.py",  # likewise
    "benchmarks/card_pack.py",  # a folder to take along, made anew
    "benchmarks/fuzz/run.py",  # scratch files
    "benchmarks/fuzz/targets_files.py",  # likewise
}
METHODS = {"write_text", "write_bytes", "save_file", "savefig", "tofile"}
SYSTEM = {f"{m}.{f}" for m in ("os", "shutil") for f in ("copy", "copy2", "copyfile", "move", "rename", "replace")} | {
    "torch.save",
    "np.save",
}


def writes(path: Path) -> list[str]:
    """Calls in a source file that write files, but where a library is told to write a part of `replacing`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called, name = ast.unparse(node.func), ast.unparse(node.func).rpartition(".")[2]
        given = [ast.unparse(a) for a in (*node.args, *(k.value for k in node.keywords))]
        opens = name == "open" and any(re.fullmatch(r"'[wx]b?\+?b?'", text) for text in given)
        own = name in ("write_text", "write_bytes") and called == name
        if (opens or called in SYSTEM or (name in METHODS and not own)) and "part.path" not in given:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
    return found


def test_whoever_writes_does_it_with_outputs() -> None:
    folders = ("kernels", "engine", "convert", "tools", "benchmarks")
    sources = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    assert writes(ROOT / "kernels/gpu/static.py"), "the search finds what is there"
    wrong = [line for p in sources if str(p.relative_to(ROOT)) not in KNOWN for line in writes(p)]
    assert not wrong
