"""What the GGUF writer promises: the planned bytes and no others, the old file until the end, clear errors."""

from __future__ import annotations

import errno
import math
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from auricle.engine.gguf import GGUFError, f32, f32s, i32s, open_gguf, string, strings, u32, u32s, u64
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.outputs import OutputError
from auricle.kernels.formats import BF16, F32, Q4_K, Q8_0
from gguf_samples import METADATA, TENSORS, fill


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment_is_honoured(tmp_path, alignment):
    contents = fill(tmp_path / "a.gguf", METADATA, TENSORS, alignment)
    file = open_gguf(tmp_path / "a.gguf")
    assert file.alignment == alignment
    assert file.metadata.get("general.alignment") == (None if alignment == 32 else alignment)
    assert all(info.offset % alignment == 0 for info in file.tensors.values())
    assert all(file.data(name).tobytes() == raw for name, raw in contents.items())


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        (u32(-1), "-1 does not fit in UINT32"),
        (u32(2**32), "4294967296 does not fit"),
        (u32(1.5), "1.5 does not fit"),
        (u64(2**64), "18446744073709551616 does not fit"),
        (u64(float("nan")), "nan does not fit"),
        (f32(1e300), "1e\\+300 does not fit in FLOAT32"),
        (u32("12x"), "12x does not fit"),
        (u32(None), "None does not fit"),
        (i32s([1, 2**31]), "2147483648 does not fit in INT32"),
        (u32s(np.array([3, -7])), "-7 does not fit in UINT32"),
        (string("\ud800"), "not valid Unicode"),
        (strings(["ok", "\udfff"]), "not valid Unicode"),
    ],
)
def test_a_value_that_does_not_fit_its_type_is_named(typed, part):
    with pytest.raises(GGUFError, match=f"'some.key'.*{part}"):
        plan_layout({"some.key": typed}, [])


def test_floats_keep_infinity_and_nan():
    layout = plan_layout({"k": f32s([float("inf"), float("-inf"), float("nan")])}, [])
    assert np.isnan(np.frombuffer(layout.header, "<f4", 1, layout.header.index(struct.pack("<f", -math.inf)) + 4))


def test_pieces_in_any_order_make_the_same_file(tmp_path):
    contents = fill(tmp_path / "a.gguf", METADATA, TENSORS)
    pieces = [
        (name, at, raw[at : at + n])
        for (name, raw), n in zip(contents.items(), (100, 3, 50, 1000), strict=True)
        for at in range(0, len(raw), n)
    ]
    np.random.default_rng(2).shuffle(pieces)
    with GGUFWriter(tmp_path / "b.gguf", plan_layout(METADATA, TENSORS)) as writer:
        for name, at, raw in pieces:
            writer.write(name, np.frombuffer(raw, np.uint8), at=int(at))
        writer.write("w", b"", at=5)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert not (tmp_path / "b.gguf.part").exists()


def test_arrays_of_any_type_and_stride_are_written_by_their_bytes(tmp_path):
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    blocks = np.zeros((2, 2), Q8_0.layout)
    blocks["d"] = 1.5
    with GGUFWriter(tmp_path / "a.gguf", plan_layout({}, [("w", (4, 3), F32), ("q", (2, 64), Q8_0)])) as writer:
        writer.write("w", wide.T)
        writer.write("q", blocks)
    file = open_gguf(tmp_path / "a.gguf")
    np.testing.assert_array_equal(file.data("w").view("<f4"), wide.T)
    assert (file.data("q").view(Q8_0.layout)["d"] == 1.5).all()


def write_badly(path: Path, how: str) -> None:
    with GGUFWriter(path, plan_layout({}, [("norm", (5,), F32)])) as writer:
        assert len(os.listdir(path.parent)) == 2
        if how == "incomplete":
            writer.write("norm", bytes(19))
        elif how == "twice":
            writer.write("norm", bytes(12))
            writer.write("norm", bytes(12), at=8)
        elif how == "over":
            writer.write("norm", bytes(4), at=8)
            writer.write("norm", bytes(12))
        elif how == "beyond":
            writer.write("norm", bytes(12), at=9)
        elif how == "before":
            writer.write("norm", bytes(4), at=-4)
        else:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("how", "error", "part"),
    [
        ("incomplete", AssertionError, "of 20 bytes written"),
        ("twice", AssertionError, "bytes 8 to 20 were written before"),
        ("over", AssertionError, "bytes 0 to 12 were written before"),
        ("beyond", AssertionError, "12 bytes at 9 of 20"),
        ("before", AssertionError, "4 bytes at -4 of 20"),
        ("interrupted", KeyboardInterrupt, None),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, how, error, part):
    (tmp_path / "a.gguf").write_text("old")
    with pytest.raises(error, match=part):
        write_badly(tmp_path / "a.gguf", how)
    assert (tmp_path / "a.gguf").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_disk_known_to_be_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    layout = plan_layout({}, [("w", (1000,), BF16)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1234))
    needed = f"{layout.total_bytes:,}"
    with (
        pytest.raises(OutputError, match=rf"a\.gguf: the disk is full: {needed} bytes needed, 1,234 free"),
        GGUFWriter(tmp_path / "a.gguf", layout),
    ):
        pytest.fail("entered")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_disk_that_fills_up_while_writing_is_named(tmp_path, monkeypatch, code, room):
    """The stand-in takes `room` bytes in short writes of 7, then reports a full disk as the system does."""
    real, taken = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal taken
        if taken >= room:
            raise OSError(code, os.strerror(code))
        taken += min(7, len(data))
        return real(fd, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    layout = plan_layout(METADATA, [("w", (1000,), F32)])
    with (
        pytest.raises(OutputError, match=r"a\.gguf: the disk is full: [\d,]+ bytes needed, [\d,]+ free") as caught,
        GGUFWriter(tmp_path / "a.gguf", layout) as writer,
    ):
        writer.write("w", bytes(4000))
    assert f"{layout.total_bytes - taken:,} bytes needed" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:501], offset))
    contents = fill(tmp_path / "a.gguf", METADATA, TENSORS)
    assert open_gguf(tmp_path / "a.gguf").data("conv").tobytes() == contents["conv"]


def test_places_that_cannot_be_written_give_one_line(tmp_path):
    layout = plan_layout({}, [])
    (tmp_path / "folder").mkdir()
    for path, reason in [
        (tmp_path / "folder", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "absent" / "a.gguf", "No such file or directory"),
    ]:
        with pytest.raises(OutputError, match=f"cannot write {path}: .*{reason}"), GGUFWriter(path, layout):
            pytest.fail("entered")
    assert os.listdir(tmp_path / "folder") == []


def test_a_file_may_be_replaced_while_it_is_read(tmp_path):
    contents = fill(tmp_path / "a.gguf", METADATA, TENSORS)
    old = open_gguf(tmp_path / "a.gguf")
    with GGUFWriter(tmp_path / "a.gguf", plan_layout(old.types, [("w", (3, 256), Q4_K)])) as writer:
        writer.write("w", old.data("w")[::-1])
    assert old.data("w").tobytes() == contents["w"]
    np.testing.assert_array_equal(open_gguf(tmp_path / "a.gguf").data("w"), old.data("w")[::-1])
