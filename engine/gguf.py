"""Reads a GGUF file over a memory map: metadata as Python values, tensors as views of the file.

Knows the container (GGUF version 2 and 3, little-endian) and checks every count, length and offset against
the bytes that are there before it acts on them. Does not know what a key means, what a model needs, or how
weights are decoded. `gguf_write.py` writes the same container.

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
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ..kernels.formats import BY_ID, Format
from .gguf_cursor import ENTRY, NUMBERS, Cursor, GGUFError, ValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 2 and 3 differ only in that 3 may also be big-endian
DEFAULT_ALIGNMENT = 32  # bytes
MAX_ALIGNMENT = 1 << 24
MAX_DEPTH = 4  # arrays inside arrays
MAX_DIMS = 4
ALIGNMENT_KEY = "general.alignment"

Kind = TypeVar("Kind", int, float, str, bool, list)


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
    """Where a tensor lies: `shape` outermost first (the reverse of the file's), `offset` from byte 0 of the file."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    nbytes: int


class GGUFFile:
    """An open file, made by `open_gguf`. Several threads may read from it at once.

    `metadata` has plain values in file order: int, float, bool, str, list[str], read-only NumPy arrays of numbers
    (copies), lists of those for arrays inside arrays. `types` has the same keys with the types in the file.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        alignment: int,
        types: dict[str, Typed],
        tensors: dict[str, TensorInfo],
        data: mmap.mmap,
    ) -> None:
        self.path = path
        self.version = version
        self.alignment = alignment
        self.types = types
        self.metadata: dict[str, Any] = {key: _plain(typed) for key, typed in types.items()}
        self.tensors = tensors
        self._map: mmap.mmap | None = data

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the file lacks it."""
        return self.metadata.get(key, default)

    def require(self, key: str, kind: type[Kind]) -> Kind:
        """The value of `key`, which must be an int, float, str, bool or list as `kind` says; nothing is converted,
        except that an array of numbers comes as a list.

        Raises GGUFError where the key is missing or of another kind (a bool is not an int).
        """
        if key not in self.metadata:
            raise GGUFError(f"{self.path}: key {_show(key)} is missing; the file is incomplete or of another model")
        value = self.metadata[key]
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if type(value) is not kind:
            raise GGUFError(
                f"{self.path}: key {_show(key)} is {type(value).__name__}, expected {kind.__name__}; convert again"
            )
        return value

    def tensor(self, name: str) -> TensorInfo:
        """The record of tensor `name`. Raises GGUFError where the file lacks it."""
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: tensor {_show(name)} is missing; the file is incomplete or of another model")
        return self.tensors[name]

    def data(self, name: str) -> np.ndarray:
        """The stored bytes of tensor `name`: uint8 [*shape[:-1], row_bytes], a read-only view of the file.

        Raises GGUFError where the file lacks the tensor.
        """
        assert self._map is not None, f"{self.path} is closed"
        info = self.tensor(name)
        flat = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)
        return flat.reshape(*info.shape[:-1], info.format.row_bytes(info.shape[-1]))

    def forget(self, name: str) -> None:
        """Tensor `name` will not be read soon: its pages leave this process's memory. They stay in the system's cache
        while there is room, and a later read maps them again."""
        assert self._map is not None, f"{self.path} is closed"
        info = self.tensor(name)
        first, end = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE, info.offset + info.nbytes
        n_bytes = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if n_bytes > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, n_bytes)

    def check_size(self) -> None:
        """Raises GGUFError where the file on disk is shorter than it was when it was opened: to read what it lacks now
        ends the process with SIGBUS, and the rest of the last page reads as zeros."""
        assert self._map is not None, f"{self.path} is closed"
        size = self._map.size()  # of the file that was opened, whatever its name stands for now
        if size < len(self._map):
            raise GGUFError(
                f"{self.path} was cut from {len(self._map):,} to {size:,} bytes while it was in use; fetch it again"
            )

    def close(self) -> None:
        """Let go of the map. Views handed out before stay valid: the last of them to die unmaps the file."""
        data, self._map = self._map, None
        if data is not None:
            try:
                data.close()
            except BufferError:
                return  # views are alive, and each holds a reference to the map

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and read its header; tensor data stays on disk until it is looked at.

    Raises GGUFError, with the field at fault, for a file that is missing, empty, of another kind or version,
    truncated, or inconsistent. The file must not shrink while it is open: the system answers that with SIGBUS.
    """
    path = Path(path)
    cursor = Cursor(path, _map_file(path))
    version = _read_version(cursor)
    n_tensors, n_keys = cursor.integer(8, "the tensor count"), cursor.integer(8, "the key count")
    cursor.check_count(n_tensors, 8 + 4 + 8 + 4 + 8, "the tensor count", cost=ENTRY)
    cursor.check_count(n_keys, 8 + 4 + 1, "the key count", cost=ENTRY)
    types = _read_metadata(cursor, n_keys)
    alignment = _read_alignment(cursor, types)
    tensors = _read_tensors(cursor, n_tensors, alignment)
    _check_overlap(cursor, tensors)
    return GGUFFile(path, version, alignment, types, tensors, cursor.map)


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
        raise GGUFError(f"cannot open {str(path)!r}: {reason}; check the path") from error


def _read_version(cursor: Cursor) -> int:
    magic = cursor.map[:4]
    if magic != MAGIC:
        cursor.fail(f"not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}; give a .gguf file")
    cursor.pos = 4
    version = cursor.integer(4, "the version")
    if version and version & 0xFFFF == 0:
        cursor.fail("the file is big-endian; convert it again as little-endian")
    if version not in VERSIONS:
        cursor.fail(f"GGUF version {version} is not known, expected 2 or 3; convert the file again")
    return version


def _read_metadata(cursor: Cursor, n_keys: int) -> dict[str, Typed]:
    types: dict[str, Typed] = {}
    for i in range(n_keys):
        key = cursor.string(f"the name of key {i}")
        if key in types:
            cursor.fail(f"key {_show(key)} occurs twice; convert the file again")
        what = f"key {_show(key)}"
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
            cursor.fail(f"tensor {_show(info.name)} occurs twice; convert the file again")
        tensors[info.name] = info
    data_start = align(cursor.pos, alignment)
    return {name: _place(cursor, info, data_start) for name, info in tensors.items()}


def _read_tensor(cursor: Cursor, i: int, alignment: int) -> TensorInfo:
    """One row of the tensor table; its `offset` still counts from the start of the tensor data."""
    name = cursor.string(f"the name of tensor {i}")
    what = f"tensor {_show(name)}"
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
            f"tensor {_show(info.name)} takes {info.nbytes:,} bytes at byte {start:,}, but the file ends at "
            f"{cursor.size:,}; it is damaged or incomplete, fetch it again"
        )
    return TensorInfo(info.name, info.shape, info.format, start, info.nbytes)


def _check_overlap(cursor: Cursor, tensors: dict[str, TensorInfo]) -> None:
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for a, b in pairwise(ordered):
        if a.offset + a.nbytes > b.offset:
            cursor.fail(
                f"tensors {_show(a.name)} and {_show(b.name)} overlap at byte {b.offset:,}; the file is damaged"
            )


def align(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def _plain(typed: Typed) -> Any:
    return [_plain(inner) for inner in typed.value] if typed.item is ValueType.ARRAY else typed.value


def _show(name: str) -> str:
    """A name from the file, fit for one line of text whatever it holds."""
    return repr(name if len(name) <= 80 else name[:80] + "…")
