"""Conversions that are killed, interrupted or run out of disk, and go on: the same bytes in the end, whatever happened.

The kills are real: a child process ends without notice at a chosen call to the system, in the middle of a write too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from auricle.convert import journal, slabs, stream
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.recipes import parse_override
from auricle.convert.requantize import plan_requantization
from auricle.convert.source import ConversionError
from auricle.engine.outputs import OutputError
from checkpoints import WEIGHTS, change_tensors, copy_checkpoint

# Arguments: checkpoint, folder for the output, step between kill points. Each child counts its calls to the system that
# change a file, and dies in the one it was told: before it, after it, or with half of the bytes written.
KILLER = """
import os, sys
from pathlib import Path
from auricle.convert import journal, slabs
from auricle.convert.hf import convert, plan_conversion

checkpoint, folder, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
journal.SYNC_BYTES = 20_000
slabs.SLAB_WEIGHTS = 1 << 14
CALLS = ("pwrite", "ftruncate", "fsync", "fdatasync", "replace", "unlink", "open")
plan = plan_conversion(checkpoint, "q8_0")

def child(out, fatal, how):
    count = 0
    def wrap(name, real):
        def call(*arguments, **keywords):
            nonlocal count
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **keywords)
            count += 1
            if count == fatal and how == "before":
                os._exit(9)
            if count == fatal and name == "pwrite":
                real(arguments[0], bytes(arguments[1])[:len(arguments[1]) // 2], arguments[2])
                os._exit(9)
            result = real(*arguments, **keywords)
            if count == fatal:
                os._exit(9)
            return result
        return call
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    convert(plan, out, jobs=2, resume=True)
    os._exit(0)

def run(out, fatal=0, how=""):
    pid = os.fork()
    if pid == 0:
        try:
            child(out, fatal, how)
        except BaseException as error:
            print(error, file=sys.stderr)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert run(folder / "whole.gguf") == 0
whole = (folder / "whole.gguf").read_bytes()
points = 0
for how in ("before", "after"):
    fatal, code = 1, 9
    while code == 9:
        out = folder / f"{how}{fatal}.gguf"
        code = run(out, fatal, how)
        left = {path.name.removeprefix(out.name) for path in folder.glob(out.name + "*")}
        assert code in (0, 9), (how, fatal, code)
        assert left <= {".part", ".part.journal"} or out.read_bytes() == whole, (how, fatal, left)
        assert run(out) == 0, (how, fatal)
        assert out.read_bytes() == whole, (how, fatal)
        assert not list(folder.glob(out.name + ".*")), (how, fatal)
        out.unlink()
        fatal, points = fatal + step, points + 1
for often in (9, 40):  # killed again and again, until it is done
    out, code, kills = folder / "chain.gguf", 9, 0
    while code == 9:
        code, kills = run(out, often + kills, "after"), kills + 1
    assert code == 0, code
    assert out.read_bytes() == whole
    assert not list(folder.glob("chain.gguf.*"))
    out.unlink()
    points += kills - 1
print(points)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "sample")


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are recorded soon after they are finished, and slabs are small."""
    monkeypatch.setattr(journal, "SYNC_BYTES", 20_000)
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 1 << 12)


def test_killed_anywhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", KILLER, str(folder), str(tmp_path / "out"), "9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


class Stopped(KeyboardInterrupt):
    pass


def interrupt(plan: Any, out: Path, after: float = 0.6, **options: Any) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "writing" and done > after * total:
            raise Stopped

    with pytest.raises(Stopped):
        convert(plan, out, stop, **options)


def leftovers(out: Path) -> set[str]:
    return {path.name.removeprefix(out.name) for path in out.parent.glob(f"{out.name}*")}


@pytest.mark.usefixtures("often")
def test_resuming_does_only_what_is_left(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(plan_conversion(folder, "q4_k"), tmp_path / "whole.gguf")
    out = tmp_path / "a.gguf"
    interrupt(plan_conversion(folder, "q4_k"), out)
    assert leftovers(out) == {".part", ".part.journal"}
    lines = Path(f"{out}.part.journal").read_text().splitlines()
    recorded = [json.loads(line)["tensor"] for line in lines[1:]]
    assert len(recorded) > 5
    encoded = []
    real = stream.encode_slab
    monkeypatch.setattr(
        stream, "encode_slab", lambda source, row, *rest: (encoded.append(row.target), real(source, row, *rest))[1]
    )
    reports = []
    convert(plan_conversion(folder, "q4_k"), out, lambda *report: reports.append(report), resume=True)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert leftovers(out) == {""}
    assert encoded
    assert not set(encoded) & set(recorded)
    phases = [what for what, _, _ in reports]
    assert phases.index("verifying") < phases.index("writing")
    assert reports[-1][1] == reports[-1][2]


@pytest.mark.usefixtures("often")
def test_an_interrupted_conversion_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    interrupt(plan_conversion(folder, "q8_0"), out)
    before = Path(f"{out}.part.journal").read_bytes()
    message = r"a conversion was interrupted here; continue with --resume or delete .*a\.gguf\.part$"
    with pytest.raises(ConversionError, match=message):
        convert(plan_conversion(folder, "q8_0"), out)
    assert Path(f"{out}.part.journal").read_bytes() == before
    Path(f"{out}.part").unlink()
    convert(plan_conversion(folder, "q8_0"), out)
    assert leftovers(out) == {""}


@pytest.mark.usefixtures("often")
def test_other_options_or_another_source_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    interrupt(plan_conversion(folder, "q8_0"), out)
    plans = [
        plan_conversion(folder, "f16"),
        plan_conversion(folder, "q8_0", [parse_override("llm.blk.1.*=f16")]),
    ]
    change_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    for plan in [*plans, plan_conversion(folder, "q8_0")]:
        with pytest.raises(ConversionError, match="was begun from another source or with other options") as caught:
            convert(plan, out, resume=True)
        assert "\n" not in str(caught.value)
        assert leftovers(out) == {".part", ".part.journal"}


@pytest.mark.usefixtures("often")
def test_resuming_from_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "f32.gguf", tmp_path / "a.gguf"
    convert(plan_conversion(folder, "f32"), source)
    convert(plan_requantization(source, "q4_k"), tmp_path / "whole.gguf")
    interrupt(plan_requantization(source, "q4_k"), out)
    convert(plan_requantization(source, "q4_k"), out, resume=True)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    interrupt(plan_requantization(source, "q4_k"), out)
    source.touch()
    with pytest.raises(ConversionError, match="from another source"):
        convert(plan_requantization(source, "q4_k"), out, resume=True)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("damage", ["bytes", "short", "torn", "garbage", "empty journal", "no journal"])
def test_what_is_there_is_verified(folder: Path, tmp_path: Path, damage: str) -> None:
    """After a loss of power, say: whatever the disk kept, the file comes out right."""
    convert(plan_conversion(folder, "q8_0"), tmp_path / "whole.gguf")
    out = tmp_path / "a.gguf"
    interrupt(plan_conversion(folder, "q8_0"), out)
    part, diary = Path(f"{out}.part"), Path(f"{out}.part.journal")
    raw, text = bytearray(part.read_bytes()), diary.read_bytes()
    if damage == "bytes":
        raw[len(raw) // 3 : len(raw) // 2] = bytes(len(raw) // 2 - len(raw) // 3)
    part.write_bytes(raw[: len(raw) // 4] if damage == "short" else raw)
    if damage == "no journal":
        diary.unlink()
    else:
        cut = {"torn": text[:-9], "garbage": text[:-30] + bytes(25) + b"\n" + text[-80:], "empty journal": b""}
        diary.write_bytes(cut.get(damage, text))
    convert(plan_conversion(folder, "q8_0"), out, resume=True)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert leftovers(out) == {""}


def test_resume_with_nothing_to_resume(folder: Path, tmp_path: Path) -> None:
    for resume in (True, False, True):
        convert(plan_conversion(folder, "q8_0"), tmp_path / f"{resume}.gguf", resume=resume)
    assert (tmp_path / "True.gguf").read_bytes() == (tmp_path / "False.gguf").read_bytes()


def test_an_interruption_before_anything_is_recorded_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    interrupt(plan_conversion(folder, "q8_0"), tmp_path / "a.gguf")
    assert leftovers(tmp_path / "a.gguf") == set()


@pytest.mark.usefixtures("often")
def test_bad_weights_leave_nothing(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"][500, 3] = float("nan")

    change_tensors(folder, change)
    with pytest.raises(ConversionError, match=r"lm_head\.weight\[500, 3\] is nan"):
        convert(plan_conversion(folder, "q8_0"), tmp_path / "a.gguf")
    assert leftovers(tmp_path / "a.gguf") == set()


def test_a_disk_too_small_from_the_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"a\.gguf: the disk is full: [\d,]+ bytes needed, 1,000 free; make room or"):
        convert(plan_conversion(folder, "f32"), tmp_path / "a.gguf")
    assert leftovers(tmp_path / "a.gguf") == set()


@pytest.mark.usefixtures("often")
def test_a_disk_that_fills_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; and with room made, the work goes on."""
    out, real, room = tmp_path / "a.gguf", os.pwrite, 300_000

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal room
        if len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(data)
        return real(fd, data, offset)

    convert(plan_conversion(folder, "q8_0"), tmp_path / "whole.gguf")
    monkeypatch.setattr(os, "pwrite", pwrite)
    message = r"a\.gguf: the disk is full: [\d,]+ bytes needed, [\d,]+ free; .*; --resume goes on from .*a\.gguf\.part$"
    with pytest.raises(OutputError, match=message) as caught:
        convert(plan_conversion(folder, "q8_0"), out)
    assert "\n" not in str(caught.value)
    assert leftovers(out) == {".part", ".part.journal"}
    room = 100_000
    with pytest.raises(OutputError, match=message):
        convert(plan_conversion(folder, "q8_0"), out, resume=True)
    assert leftovers(out) == {".part", ".part.journal"}
    room = 10**9
    convert(plan_conversion(folder, "q8_0"), out, resume=True)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_one_process_at_a_time(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf.part.journal"
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match=r"a\.gguf is being written by another process"):
            convert(plan_conversion(folder, "q8_0"), tmp_path / "a.gguf")
        assert leftovers(tmp_path / "a.gguf") == {".part.journal"}


@pytest.mark.parametrize("type_name", ["q4_k", "bf16"])
def test_the_file_does_not_depend_on_the_number_of_jobs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_name: str
) -> None:
    files = []
    for jobs, n_weights in ((1, 1 << 20), (2, 1 << 12), (5, 999)):
        monkeypatch.setattr(slabs, "SLAB_WEIGHTS", n_weights)
        convert(plan_conversion(folder, type_name), tmp_path / "a.gguf", jobs=jobs)
        files.append((tmp_path / "a.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.usefixtures("often")
def test_resuming_with_other_jobs_and_slabs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(plan_conversion(folder, "q8_0"), tmp_path / "whole.gguf")
    interrupt(plan_conversion(folder, "q8_0"), tmp_path / "a.gguf", jobs=1)
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 555)
    convert(plan_conversion(folder, "q8_0"), tmp_path / "a.gguf", jobs=3, resume=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_journal_lines(folder: Path, tmp_path: Path, often: None) -> None:
    interrupt(plan_conversion(folder, "q8_0"), tmp_path / "a.gguf")
    first, *lines = Path(f"{tmp_path / 'a.gguf'}.part.journal").read_text().splitlines()
    assert re.fullmatch(r"[0-9a-f]{64}", json.loads(first)["fingerprint"])
    assert all(json.loads(line).keys() == {"tensor", "crc32"} for line in lines)
    assert (folder / WEIGHTS).exists()
