"""Damaged and malicious GGUF files, put together byte by byte: each is refused in one line that names the field."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auricle.engine import gguf_cursor
from auricle.engine.gguf import GGUFError, open_gguf

U8, U32, F32_TYPE, BOOL, STRING, ARRAY, U64, F64 = 0, 4, 6, 7, 8, 9, 10, 12
F32, Q4_K, IQ2_XXS = 0, 12, 16
MANY = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text(x: str | bytes) -> bytes:
    raw = x if isinstance(x, bytes) else x.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def row(name: str, dims: list[int], kind: int = F32, offset: int = 0, n_dims: int | None = None) -> bytes:
    n = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n, *dims, kind, offset)


def build(
    pairs: list[bytes] = (),
    rows: list[bytes] = (),
    data: bytes = b"",
    n_rows: int | None = None,
    n_pairs: int | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    counts = (len(rows) if n_rows is None else n_rows, len(pairs) if n_pairs is None else n_pairs)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(rows)
    return head + bytes(-len(head) % alignment) + data


def refused(tmp_path: Path, raw: bytes, *parts: str) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    for part in parts:
        assert part in message, message
    return message


GOOD = build(
    [
        pair("general.architecture", STRING, text("test")),
        pair("tokens", ARRAY, array(STRING, 5, b"".join(map(text, ["a", "ñ", "日本", "", "end"])))),
        pair("ids", ARRAY, array(U32, 3, struct.pack("<3I", 1, 2, 3))),
        pair("nested", ARRAY, array(ARRAY, 2, array(BOOL, 2, b"\0\1") + array(STRING, 1, text("x")))),
        pair("n", U64, struct.pack("<Q", 9)),
        pair("eps", F64, struct.pack("<d", 1e-6)),
    ],
    [row("w", [256, 2], Q4_K, 0), row("norm", [3], F32, 288)],
    bytes(range(256)) + bytes(32) + struct.pack("<3f", 1, 2, 3),
)


def test_the_good_file_opens(tmp_path):
    (tmp_path / "a.gguf").write_bytes(GOOD)
    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata["tokens"] == ["a", "ñ", "日本", "", "end"]
    assert file.metadata["nested"][0].tolist() == [False, True]
    assert file.metadata["nested"][1] == ["x"]
    assert file.data("norm").view("<f4").tolist() == [1, 2, 3]
    assert file.data("w").shape == (2, 144)


def test_every_truncation_is_refused(tmp_path):
    for n in range(len(GOOD)):
        refused(tmp_path, GOOD[:n])


def opens_or_is_refused(path: Path) -> bool:
    """Whether it opened; then every tensor must lie inside the file and be readable to its last byte."""
    try:
        file = open_gguf(path)
    except GGUFError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert "\n" not in message
        return False
    size = path.stat().st_size
    for name, info in file.tensors.items():
        assert 0 <= info.offset <= info.offset + info.nbytes <= size
        view = file.data(name)
        assert view.nbytes == info.nbytes
        view.sum()
    return True


def test_every_single_damaged_byte_opens_or_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    header = GOOD.index(bytes(range(256)))
    outcomes = []
    for i in range(header):
        for value in {0, 1, 255, GOOD[i] ^ 0x80, GOOD[i] ^ 1} - {GOOD[i]}:
            path.write_bytes(GOOD[:i] + bytes([value]) + GOOD[i + 1 :])
            outcomes.append(opens_or_is_refused(path))
    assert 0.2 < sum(outcomes) / len(outcomes) < 0.9


@MANY
@given(
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    numbers=st.lists(st.tuples(st.integers(4, len(GOOD) - 9), st.integers(0, 2**64 - 1)), max_size=2),
    end=st.integers(0, len(GOOD)) | st.just(len(GOOD)),
)
def test_random_damage_opens_or_is_refused(tmp_path, flips, numbers, end):
    raw = bytearray(GOOD)
    for i, value in flips:
        raw[i] = value
    for i, value in numbers:
        raw[i : i + 8] = struct.pack("<Q", value)
    (tmp_path / "a.gguf").write_bytes(raw[:end])
    opens_or_is_refused(tmp_path / "a.gguf")


@MANY
@given(tail=st.binary(max_size=300))
def test_random_bytes_after_the_magic_are_harmless(tmp_path, tail):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + tail)
    opens_or_is_refused(tmp_path / "a.gguf")


def test_things_that_are_not_gguf_files(tmp_path):
    refused(tmp_path, b"", "is empty")
    refused(tmp_path, b"GG", "not a GGUF file")
    refused(tmp_path, b"Dear reader,\nthis is text", "not a GGUF file: it begins with b'Dear'")
    refused(tmp_path, b"\n\0\n\0\n\0\n\0", "not a GGUF file")
    refused(tmp_path, build(version=1), "version 1 is not known")
    refused(tmp_path, build(version=4), "version 4 is not known")
    refused(tmp_path, build(version=0), "version 0 is not known")
    refused(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian")
    os.mkfifo(tmp_path / "pipe")
    for path, part in [
        (tmp_path, "is a directory"),
        (tmp_path / "absent.gguf", "No such file or directory; check the path"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "a\0b", "null byte"),
        (tmp_path / ("n" * 300), "File name too long"),
    ]:
        with pytest.raises(GGUFError, match=part) as caught:
            open_gguf(path)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(GOOD)
    (tmp_path / "a.gguf").chmod(0)
    with pytest.raises(GGUFError, match="Permission denied"):
        open_gguf(tmp_path / "a.gguf")


HUGE = [2**64 - 1, 2**63, 2**63 - 1, 2**61, 2**40]


@pytest.mark.parametrize("n", HUGE)
def test_counts_and_lengths_beyond_the_file(tmp_path, n):
    length = struct.pack("<Q", n)
    refused(tmp_path, build(n_rows=n), "tensor count")
    refused(tmp_path, build(n_pairs=n), "key count")
    refused(tmp_path, build([length + b"key"]), "the name of key 0", f"{n:,} bytes")
    refused(tmp_path, build([pair("k", STRING, length + b"abc")]), "key 'k'", f"{n:,} bytes")
    refused(tmp_path, build([pair("k", ARRAY, array(U8, n))]), "length of key 'k'", f"{n:,}")
    refused(tmp_path, build([pair("k", ARRAY, array(F64, n))]), "length of key 'k'", f"{n:,}")
    refused(tmp_path, build([pair("k", ARRAY, array(STRING, n))]), "length of key 'k'", f"{n:,}")
    refused(tmp_path, build([pair("k", ARRAY, array(ARRAY, n))]), "length of key 'k'", f"{n:,}")
    refused(tmp_path, build([pair("k", ARRAY, array(STRING, 2, text("a") + length))]), "element 1 of key 'k'")
    refused(tmp_path, build(rows=[length + b"name"]), "the name of tensor 0")
    refused(tmp_path, build(rows=[row("w", [n])], data=bytes(64)), "tensor 'w'")
    refused(tmp_path, build(rows=[row("w", [256, n, n, n], Q4_K)], data=bytes(64)), "tensor 'w'")
    refused(tmp_path, build(rows=[row("w", [4], offset=n & -32)], data=bytes(64)), "tensor 'w'", "the file ends at")


def test_dimension_products_that_wrap_to_nothing(tmp_path):
    """2^32 * 2^32 is 0 in 64 bits, and 2^62 * 4 bytes too."""
    refused(tmp_path, build(rows=[row("w", [2**32, 2**32])], data=bytes(64)), "tensor 'w'", "the file ends at")
    refused(tmp_path, build(rows=[row("w", [2**62])], data=bytes(64)), "tensor 'w'", "the file ends at")
    refused(tmp_path, build(rows=[row("w", [4], offset=2**64 - 32)], data=bytes(64)), "tensor 'w'")


def test_bad_tensors(tmp_path):
    data = bytes(1024)
    for raw, *parts in [
        (build(rows=[row("w", [])], data=data), "tensor 'w' has 0 dimensions"),
        (build(rows=[row("w", [1] * 5)], data=data), "tensor 'w' has 5 dimensions"),
        (build(rows=[row("w", [4], n_dims=2**32 - 1)], data=data), "tensor 'w' has 4294967295 dimensions"),
        (build(rows=[row("w", [0])], data=data), "tensor 'w' has a dimension of 0"),
        (build(rows=[row("w", [4, 0, 2])], data=data), "tensor 'w' has a dimension of 0 in [2, 0, 4]"),
        (build(rows=[row("w", [256], IQ2_XXS)], data=data), "tensor 'w' has type 16", "Q4_K"),
        (build(rows=[row("w", [256], 2**32 - 1)], data=data), "tensor 'w' has type 4294967295"),
        (build(rows=[row("w", [128, 2], Q4_K)], data=data), "tensor 'w' has rows of 128", "256"),
        (build(rows=[row("w", [4], offset=4)], data=data), "tensor 'w' has offset 4", "alignment 32"),
        (build(rows=[row("w", [256], offset=32)], data=data[:1055]), "tensor 'w'", "the file ends at"),
        (build(rows=[row("a", [4]), row("a", [4], offset=32)], data=data), "tensor 'a' occurs twice"),
        (build(rows=[row("b", [9], offset=32), row("a", [9])], data=data), "tensors 'a' and 'b' overlap"),
        (build(rows=[row("a", [4]), row("b", [4])], data=data), "'a'", "'b'", "overlap"),
        (build(rows=[row("line\nbreak\x1b[2J", [])], data=data), r"'line\nbreak\x1b[2J'"),
        (build(rows=[row("long" * 1000, [])], data=data), "longlong"),
    ]:
        refused(tmp_path, raw, *parts)


def test_bad_keys(tmp_path):
    number = struct.pack("<I", 1)
    for raw, *parts in [
        (build([pair("k", U32, number), pair("k", U32, number)]), "key 'k' occurs twice"),
        (build([pair("k", 13, number)]), "type of key 'k' is 13"),
        (build([pair("k", 2**32 - 1, number)]), "type of key 'k'"),
        (build([pair("k", ARRAY, array(13, 0))]), "element type of key 'k' is 13"),
        (build([pair("k", BOOL, b"\2")]), "key 'k' is a bool stored as 2"),
        (build([pair("k", ARRAY, array(BOOL, 2, b"\1\xff"))]), "key 'k' is a bool stored as 255"),
        (build([pair("k", STRING, text(b"ab\xff"))]), "key 'k' is not valid UTF-8 (byte 2"),
        (build([pair("k", STRING, text(b"\xed\xa0\x80"))]), "key 'k' is not valid UTF-8"),
        (build([pair("k", ARRAY, array(STRING, 2, text("a") + text(b"\xc3")))]), "element 1 of key 'k' is not valid"),
        (build([pair(b"\xff", U32, number)]), "the name of key 0 is not valid UTF-8"),
        (build(rows=[text(b"\xff") + row("", [1])[8:]]), "the name of tensor 0 is not valid UTF-8"),
    ]:
        refused(tmp_path, raw, *parts)


@pytest.mark.parametrize("value", [0, 1, 4, 7, 33, 48, 2**25, 2**31, 2**32 - 1])
def test_bad_alignment(tmp_path, value):
    raw = build([pair("general.alignment", U32, struct.pack("<I", value))], [row("w", [4])], bytes(64))
    refused(tmp_path, raw, f"key 'general.alignment' is {value}", "power of two")


def test_alignment_of_a_wrong_type(tmp_path):
    refused(tmp_path, build([pair("general.alignment", U64, struct.pack("<Q", 32))]), "general.alignment", "UINT64")
    refused(tmp_path, build([pair("general.alignment", STRING, text("32"))]), "general.alignment", "STRING")


def test_nesting_bombs(tmp_path):
    deep = b"".join(array(ARRAY, 1) for _ in range(5000)) + array(U8, 0)
    refused(tmp_path, build([pair("k", ARRAY, deep)]), "key 'k' nests arrays more than 4 deep")
    n = 2**17 + 1
    refused(tmp_path, build([pair("k", ARRAY, array(ARRAY, n, array(U8, 0) * n))]), "length of key 'k'", "131,072")
    half = array(ARRAY, n // 2, array(U8, 0) * (n // 2))
    refused(tmp_path, build([pair("a", ARRAY, half), pair("b", ARRAY, half)]), "length of key 'b'", "131,072")


def test_four_arrays_deep_is_allowed(tmp_path):
    inner = array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 2, array(U8, 1, b"\5") + array(U8, 0))))
    (tmp_path / "a.gguf").write_bytes(build([pair("k", ARRAY, inner)]))
    value = open_gguf(tmp_path / "a.gguf").metadata["k"]
    assert [x.tolist() for x in value[0][0]] == [[5], []]
    refused(tmp_path, build([pair("k", ARRAY, array(ARRAY, 1, inner))]), "more than 4 deep")


def test_a_header_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cursor, "MAX_HEADER", 4096)
    message = refused(tmp_path, build([pair("k", STRING, text("x" * 5000))], data=bytes(100)), "key 'k'")
    assert "beyond byte 4,096" in message
    tokens = array(STRING, 600, text("a") * 600)
    refused(tmp_path, build([pair("k", ARRAY, tokens)]), "length of key 'k' is 600, too many")


def peak_memory(path: Path) -> int:
    """Most bytes taken at once while the file is opened, whether it opens or not."""
    tracemalloc.start()
    try:
        opens_or_is_refused(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


MEBIBYTE = 1 << 20
QUARTER = 1 << 18
LIES = {
    "tensors": build(n_rows=2**60, data=bytes(MEBIBYTE)),
    "keys": build(n_pairs=2**60, data=bytes(MEBIBYTE)),
    "rows": build(n_rows=2**14, data=b"\xff" * MEBIBYTE),
    "pairs": build(n_pairs=2**16, data=b"\xff" * MEBIBYTE),
    "length": build([struct.pack("<Q", 2**60)], data=bytes(MEBIBYTE)),
    "bytes": build([pair("k", ARRAY, array(U8, 2**60))], data=bytes(MEBIBYTE)),
    "strings": build([pair("k", ARRAY, array(STRING, 2**17))], data=b"\xff" * MEBIBYTE),
    "arrays": build([pair("k", ARRAY, array(ARRAY, 2**16))], data=b"\xff" * MEBIBYTE),
    "dimension": build(rows=[row("w", [2**60])], data=bytes(MEBIBYTE)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_count_takes_neither_memory_nor_time(tmp_path, lie):
    (tmp_path / "a.gguf").write_bytes(LIES[lie])
    start = time.process_time()
    assert peak_memory(tmp_path / "a.gguf") < MEBIBYTE
    assert time.process_time() - start < 2
    refused(tmp_path, LIES[lie])


def test_too_many_strings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cursor, "MAX_COST", 1000)
    halves = [pair(key, ARRAY, array(STRING, 500, text("") * 500)) for key in "ab"]
    (tmp_path / "a.gguf").write_bytes(build(halves[:1]))
    assert len(open_gguf(tmp_path / "a.gguf").metadata["a"]) == 500
    refused(tmp_path, build(halves), "length of key 'b' is 500, too many", "1,000 strings")


@pytest.mark.parametrize("word", ["", "a", "ab", "\0", "é", "🙂", "a" * 300])
def test_memory_for_strings_is_a_small_multiple_of_their_bytes(tmp_path, word):
    """A Python string of two letters takes 51 bytes and a place in the list, where the file has ten."""
    n = QUARTER // len(text(word))
    (tmp_path / "a.gguf").write_bytes(build([pair("k", ARRAY, array(STRING, n, text(word) * n))]))
    assert opens_or_is_refused(tmp_path / "a.gguf")
    assert peak_memory(tmp_path / "a.gguf") < 16 * QUARTER
