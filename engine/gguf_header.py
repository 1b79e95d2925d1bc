"""Reads the header of one GGUF file: metadata with its types, and where each tensor lies.

Knows the container (GGUF version 2 and 3, little-endian) and checks every count, length and offset against the bytes
that are there before it acts on them. Does not know what a key means, nor that several files may be one (`gguf.py`).

Source of the layout: the GGUF format document of ggml.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.formats import BY_ID, Format
from ..kernels.quote import quote
from .gguf_cursor import ENTRY, NUMBERS, Cursor, GGUFError, ValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 2 and 3 differ only in that 3 may also be big-endian
DEFAULT_ALIGNMENT = 32  # bytes
MAX_ALIGNMENT = 1 << 24
MAX_DEPTH = 4  # arrays inside arrays
MAX_DIMS = 4
ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class Typed:
    """A metadata value with its type in the file; `item` is the element type of an array.

    `value` is a Python number, bool or str; for an array a NumPy array or sequence of numbers, a list of str,
    or, where `item` is ARRAY too, a list of `Typed`.
    """

    type: ValueType
    value: Any
    item: ValueType | None = None


def u32(x: int) -> Typed:
    return Typed(ValueType.UINT32, x)


def i32(x: int) -> Typed:
    return Typed(ValueType.INT32, x)


def u64(x: int) -> Typed:
    return Typed(ValueType.UINT64, x)


def f32(x: float) -> Typed:
    return Typed(ValueType.FLOAT32, x)


def boolean(x: bool) -> Typed:
    return Typed(ValueType.BOOL, x)


def string(x: str) -> Typed:
    return Typed(ValueType.STRING, x)


def strings(x: Sequence[str]) -> Typed:
    return Typed(ValueType.ARRAY, x, ValueType.STRING)


def i32s(x: Sequence[int] | np.ndarray) -> Typed:
    return Typed(ValueType.ARRAY, x, ValueType.INT32)


def u32s(x: Sequence[int] | np.ndarray) -> Typed:
    return Typed(ValueType.ARRAY, x, ValueType.UINT32)


def f32s(x: Sequence[float] | np.ndarray) -> Typed:
    return Typed(ValueType.ARRAY, x, ValueType.FLOAT32)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` outermost first (the reverse of the file's), `offset` from byte 0 of its file, which
    is number `part` of those a model is split into."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class Header:
    """One file: its keys, its tensors by name, and the map they lie in."""

    path: Path
    version: int
    alignment: int
    types: dict[str, Typed]
    tensors: dict[str, TensorInfo]
    map: mmap.mmap


def read_header(path: Path) -> Header:
    """Map a file and read all that stands before its tensor data. Raises GGUFError, with the field at fault."""
    cursor = Cursor(path, _map_file(path))
    version = _read_version(cursor)
    n_tensors, n_keys = cursor.integer(8, "the tensor count"), cursor.integer(8, "the key count")
    cursor.check_count(n_tensors, 8 + 4 + 8 + 4 + 8, "the tensor count", cost=ENTRY)
    cursor.check_count(n_keys, 8 + 4 + 1, "the key count", cost=ENTRY)
    types = _read_metadata(cursor, n_keys)
    alignment = _read_alignment(cursor, types)
    tensors = _read_tensors(cursor, n_tensors, alignment)
    _check_overlap(cursor, tensors)
    return Header(path, version, alignment, types, tensors, cursor.map)


def _map_file(path: Path) -> mmap.mmap:
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise GGUFError(f"{path} is a directory; give the .gguf file inside it")
        if not stat.S_ISREG(info.st_mode):  # opening a pipe could wait for ever
            raise GGUFError(f"{path} is not a regular file; save it to disk first")
        if info.st_size == 0:
            raise GGUFError(f"{path} is empty; fetch or convert it again")
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte, or the file was emptied meanwhile
        reason = getattr(error, "strerror", None) or error
        raise GGUFError(f"cannot open {path}: {reason}; check the path") from error


def _read_version(cursor: Cursor) -> int:
    magic = cursor.map[:4]
    if magic != MAGIC:
        cursor.fail(f"not a GGUF file: {_recognise(cursor.map[:4096])}")
    cursor.pos = 4
    version = cursor.integer(4, "the version")
    if version and version & 0xFFFF == 0:
        cursor.fail("the file is big-endian; convert it again as little-endian")
    if version not in VERSIONS:
        cursor.fail(f"GGUF version {version} is not known, expected 2 or 3; convert the file again")
    return version


def _recognise(head: bytes) -> str:
    """What a file that begins with `head` is, and what to do."""
    if _is_old_imatrix(head):
        return (
            "an importance matrix in llama.cpp's old format; make it one with "
            "llama-imatrix --in-file OLD -o NEW.gguf, or collect one with auricle imatrix"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors weights; convert their folder with auricle convert"
    if head[:4] == b"PK\3\4":
        return "a zip archive, perhaps PyTorch weights; give a .gguf file, or convert a checkpoint in safetensors"
    return f"it begins with {head[:4]!r}, expected {MAGIC!r}; give a .gguf file"


def _is_old_imatrix(head: bytes) -> bool:
    """int32 number of entries, then of each the length of a name, the name, how often it was seen, its numbers."""
    n_entries, length = (int.from_bytes(head[at : at + 4], "little") for at in (0, 4))
    name = head[8 : 8 + length]
    plausible = 0 < n_entries < 1 << 20 and 0 < length < 256 and len(name) == length
    return plausible and name.isascii() and name.decode("latin-1").isprintable()


def _read_metadata(cursor: Cursor, n_keys: int) -> dict[str, Typed]:
    types: dict[str, Typed] = {}
    for i in range(n_keys):
        key = cursor.string(f"the name of key {i}")
        if key in types:
            cursor.fail(f"key {quote(key)} occurs twice; convert the file again")
        what = f"key {quote(key)}"
        types[key] = _read_value(cursor, _read_type(cursor, f"the type of {what}"), what, depth=1)
    return types


def _read_type(cursor: Cursor, what: str) -> ValueType:
    number = cursor.integer(4, what)
    if number > max(ValueType):
        cursor.fail(f"{what} is {number}, expected 0 to {max(ValueType):d}; the file is damaged or of a newer kind")
    return ValueType(number)


def _read_value(cursor: Cursor, kind: ValueType, what: str, depth: int) -> Typed:
    if kind is ValueType.STRING:
        return Typed(kind, cursor.string(what))
    if kind is not ValueType.ARRAY:
        return Typed(kind, cursor.numbers(kind, 1, what)[0].item())
    if depth > MAX_DEPTH:
        cursor.fail(f"{what} nests arrays more than {MAX_DEPTH} deep; the file is damaged")
    item = _read_type(cursor, f"the element type of {what}")
    count = cursor.integer(8, f"the length of {what}")
    if item is ValueType.STRING:
        return Typed(kind, cursor.strings(count, what), item)
    if item is not ValueType.ARRAY:
        cursor.check_count(count, NUMBERS[item].itemsize, f"the length of {what}")
        return Typed(kind, cursor.numbers(item, count, what), item)
    cursor.check_count(count, 4 + 8, f"the length of {what}", cost=ENTRY)
    return Typed(kind, [_read_value(cursor, kind, what, depth + 1) for _ in range(count)], item)


def _read_alignment(cursor: Cursor, types: dict[str, Typed]) -> int:
    typed = types.get(ALIGNMENT_KEY, u32(DEFAULT_ALIGNMENT))
    if typed.type is not ValueType.UINT32:
        cursor.fail(f"key {ALIGNMENT_KEY!r} has type {typed.type.name}, expected UINT32; convert the file again")
    n: int = typed.value
    if not 8 <= n <= MAX_ALIGNMENT or n & (n - 1):
        cursor.fail(f"key {ALIGNMENT_KEY!r} is {n}, expected a power of two from 8 to {MAX_ALIGNMENT}; convert again")
    return n


def _read_tensors(cursor: Cursor, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for i in range(n_tensors):
        info = _read_tensor(cursor, i, alignment)
        if info.name in tensors:
            cursor.fail(f"tensor {quote(info.name)} occurs twice; convert the file again")
        tensors[info.name] = info
    data_start = align(cursor.pos, alignment)
    return {name: _place(cursor, info, data_start) for name, info in tensors.items()}


def _read_tensor(cursor: Cursor, i: int, alignment: int) -> TensorInfo:
    """One row of the tensor table; its `offset` still counts from the start of the tensor data."""
    name = cursor.string(f"the name of tensor {i}")
    what = f"tensor {quote(name)}"
    n_dims = cursor.integer(4, f"the number of dimensions of {what}")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{what} has {n_dims} dimensions, expected 1 to {MAX_DIMS}; the file is damaged")
    record = cursor.take(8 * n_dims + 4 + 8, f"the shape, type or offset of {what}")
    *dims, number, offset = struct.unpack(f"<{n_dims}QIQ", record)
    shape = tuple(dims[::-1])
    if 0 in shape:
        cursor.fail(f"{what} has a dimension of 0 in {list(shape)}; the file is damaged")
    fmt = BY_ID.get(number)
    if fmt is None:
        known = " ".join(f.name for f in BY_ID.values())
        cursor.fail(f"{what} has type {number}, which is not supported; convert the file to one of {known}")
    if shape[-1] % fmt.length:
        cursor.fail(f"{what} has rows of {shape[-1]}, not a multiple of the {fmt.length} of a {fmt} block")
    if offset % alignment:
        cursor.fail(f"{what} has offset {offset}, not a multiple of the alignment {alignment}; the file is damaged")
    return TensorInfo(name, shape, fmt, offset, fmt.tensor_bytes(shape))


def _place(cursor: Cursor, info: TensorInfo, data_start: int) -> TensorInfo:
    start = data_start + info.offset
    if start + info.nbytes > cursor.size:
        cursor.fail(
            f"tensor {quote(info.name)} takes {info.nbytes:,} bytes at byte {start:,}, but the file ends at "
            f"{cursor.size:,}; it is damaged or incomplete, fetch it again"
        )
    return TensorInfo(info.name, info.shape, info.format, start, info.nbytes)


def _check_overlap(cursor: Cursor, tensors: dict[str, TensorInfo]) -> None:
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for a, b in pairwise(ordered):
        if a.offset + a.nbytes > b.offset:
            names = f"{quote(a.name)} and {quote(b.name)}"
            cursor.fail(f"tensors {names} overlap at byte {b.offset:,}; the file is damaged")


def align(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment
