"""Writes GGUF version 3: first the whole layout is planned, then bytes are put where the plan says.

Every offset and the file's size are known before a byte is written. Does not know what a tensor means or how it
was quantised, and never holds more of one than it is handed.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from ..kernels.formats import Format
from .gguf_cursor import NUMBERS, GGUFError, ValueType
from .gguf_header import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DEPTH,
    MAX_DIMS,
    TensorInfo,
    Typed,
    align,
    u32,
)
from .outputs import OutputError, disk_errors, replacing

VERSION = 3


@dataclass(frozen=True)
class Layout:
    """A file before it is written: `header` (padded, so its length is where tensor data begins), where each tensor
    lies, and the size of the whole."""

    header: bytes
    tensors: dict[str, TensorInfo]
    total_bytes: int


def plan_layout(
    metadata: Mapping[str, Typed],
    tensors: Sequence[tuple[str, tuple[int, ...], Format]],
    alignment: int = DEFAULT_ALIGNMENT,
) -> Layout:
    """Lay out a file with these keys and tensors (name, shape outermost first, format), both in the given order.

    `GGUFFile.types` of another file may serve as `metadata`. An alignment other than 32 adds its key.
    Raises GGUFError for a value that its type cannot hold.
    """
    assert 8 <= alignment <= MAX_ALIGNMENT, f"{alignment=}"
    assert alignment & (alignment - 1) == 0, f"{alignment=} is not a power of two"
    metadata = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT:
        metadata.setdefault(ALIGNMENT_KEY, u32(alignment))
    assert ALIGNMENT_KEY not in metadata or metadata[ALIGNMENT_KEY].value == alignment, f"{metadata[ALIGNMENT_KEY]}"
    placed, data_bytes = _place_tensors(tensors, alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(placed), len(metadata))]
    for key, typed in metadata.items():
        parts += [_encode_string(key, key), struct.pack("<I", typed.type), _encode(key, typed)]
    parts += [_encode_tensor(info) for info in placed]
    header = b"".join(parts)
    header = header.ljust(align(len(header), alignment), b"\0")
    infos = {t.name: TensorInfo(t.name, t.shape, t.format, len(header) + t.offset, t.nbytes) for t in placed}
    return Layout(header, infos, len(header) + data_bytes)


def _place_tensors(
    tensors: Sequence[tuple[str, tuple[int, ...], Format]], alignment: int
) -> tuple[list[TensorInfo], int]:
    """The tensors with offsets from the start of the tensor data, and the bytes of it all.

    The last tensor is padded too: some readers fetch whole aligned pieces.
    """
    placed: list[TensorInfo] = []
    names = set()
    end = 0
    for name, shape, fmt in tensors:
        assert 1 <= len(shape) <= MAX_DIMS, f"{name} {shape}"
        assert min(shape) > 0, f"{name} {shape}"
        assert name not in names, f"two tensors {name}"
        names.add(name)
        placed.append(TensorInfo(name, tuple(map(int, shape)), fmt, end, fmt.tensor_bytes(shape)))
        end = align(end + placed[-1].nbytes, alignment)
    return placed, end


def _encode_tensor(info: TensorInfo) -> bytes:
    dims = info.shape[::-1]
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, info.format.id, info.offset)
    return _encode_string(info.name, info.name) + numbers


def _encode(key: str, typed: Typed, depth: int = 1) -> bytes:
    if typed.type is ValueType.STRING:
        return _encode_string(key, typed.value)
    if typed.type is not ValueType.ARRAY:
        return _encode_numbers(key, typed.type, [typed.value])
    assert typed.item is not None, f"{key}: an array without an element type"
    assert depth <= MAX_DEPTH, f"{key}: {depth=}"
    head = struct.pack("<IQ", typed.item, len(typed.value))
    if typed.item is ValueType.STRING:
        return head + b"".join([_encode_string(key, text) for text in typed.value])
    if typed.item is ValueType.ARRAY:
        assert all(inner.type is ValueType.ARRAY for inner in typed.value), f"{key} mixes arrays and other values"
        inner = [_encode(key, inner, depth + 1) for inner in typed.value]
        return head + b"".join(inner)
    return head + _encode_numbers(key, typed.item, typed.value)


def _encode_string(key: str, text: str) -> bytes:
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GGUFError(
            f"{key!r}: {text!r:.80} is not valid Unicode (character {error.start}); mend the source"
        ) from error
    return len(raw).to_bytes(8, "little") + raw


def _encode_numbers(key: str, kind: ValueType, values: Sequence[float] | np.ndarray) -> bytes:
    """Numbers as `kind`. Integers and bools must fit exactly, floats must not become infinite."""
    dtype = NUMBERS[kind]
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            if dtype.kind == "f":
                given = np.asarray(values, np.float64)
                stored = given.astype(dtype)
                fits = np.isinf(stored) <= np.isinf(given)
            else:  # a list of large integers must not pass through float64
                given = values if isinstance(values, np.ndarray) else np.array(values, object)
                stored = given.astype(dtype)
                fits = stored == given
    except (TypeError, ValueError, OverflowError):
        if len(values) > 1:  # find the one at fault
            return b"".join([_encode_numbers(key, kind, [value]) for value in values])
        given, fits = values, np.zeros(1, bool)
    if not fits.all():
        wrong = given[int(np.argmin(fits))]
        raise GGUFError(f"{key!r}: {wrong!s:.80} does not fit in {kind.name}; mend the source or choose a wider type")
    return stored.tobytes()


class GGUFWriter:
    """Puts bytes where a layout says, in a new file that takes the place of `path` when all are there.

    A context manager, used from one thread. When its body raises, the new file goes and `path` is as before. With
    `part` the new file has that name and stays when the body raises; with `resume` it is continued: `read` its
    tensors, and `accept` those that are right. Raises OutputError where the disk is full (path, needed and free bytes)
    or does not take the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], layout: Layout, *, part: Path | None = None, resume: bool = False
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self._place = replacing(path, part=part, keep=part is not None, resume=resume)
        self._open = ExitStack()
        self._fd = -1
        self._written = 0
        self._spans: dict[str, list[tuple[int, int]]] = {name: [] for name in layout.tensors}

    def __enter__(self) -> GGUFWriter:
        with ExitStack() as opening:
            self._fd = opening.enter_context(self._place).fd
            with self._disk_errors():
                taken = os.fstat(self._fd).st_blocks * 512  # by a file that is continued
                if self.layout.total_bytes - taken > self._free():
                    raise self._full(taken)
                os.ftruncate(self._fd, self.layout.total_bytes)  # the padding between tensors reads as zeros
            self._put(memoryview(self.layout.header), 0)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fd = -1
        if kind is not None:
            self._open.__exit__(kind, error, trace)
            return
        with self._open:
            for name, info in self.layout.tensors.items():
                assert self._spans[name] == [(0, info.nbytes)], (
                    f"{name}: {self._spans[name]} of {info.nbytes} bytes written"
                )

    def write(self, name: str, data: np.ndarray | bytes, at: int = 0) -> None:
        """Place the bytes of `data` at byte `at` of tensor `name`: in any order, every byte exactly once."""
        assert self._fd >= 0, f"{self.path} is not open"
        info = self.layout.tensors[name]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else data
        view = memoryview(raw)
        assert 0 <= at <= info.nbytes - len(view), f"{name}: {len(view)} bytes at {at} of {info.nbytes}"
        if len(view):
            self._claim(name, at, at + len(view))
            self._put(view, info.offset + at)

    def read(self, name: str, chunk_bytes: int = 4 << 20) -> Iterator[bytes]:
        """What the file holds of tensor `name`, in order: as it was left, or as it was written."""
        info = self.layout.tensors[name]
        with self._disk_errors():
            for at in range(0, info.nbytes, chunk_bytes):
                yield os.pread(self._fd, min(chunk_bytes, info.nbytes - at), info.offset + at)

    def accept(self, name: str) -> None:
        """Take tensor `name` as the file holds it."""
        nbytes = self.layout.tensors[name].nbytes
        self._claim(name, 0, nbytes)
        self._written += nbytes

    def sync(self) -> None:
        """Return when all that is written is on the disk."""
        with self._disk_errors():
            os.fdatasync(self._fd)

    def _claim(self, name: str, start: int, stop: int) -> None:
        """Note that [start, stop) of tensor `name` is written; touching spans are joined."""
        spans = self._spans[name]
        i = bisect(spans, (start, stop))
        free = (i == 0 or spans[i - 1][1] <= start) and (i == len(spans) or stop <= spans[i][0])
        assert free, f"{name}: bytes {start} to {stop} were written before"
        if i < len(spans) and spans[i][0] == stop:
            stop = spans.pop(i)[1]
        if i > 0 and spans[i - 1][1] == start:
            i -= 1
            start = spans.pop(i)[0]
        spans.insert(i, (start, stop))

    def _put(self, data: memoryview, offset: int) -> None:
        with self._disk_errors():
            while data:  # one call writes 2 GiB at most, and less on a full disk
                n = os.pwrite(self._fd, data, offset)
                data, offset, self._written = data[n:], offset + n, self._written + n

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            with disk_errors(self.path):
                yield
        except OutputError as error:
            if getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(self._written) from error.__cause__
            raise

    def _free(self) -> int:
        return shutil.disk_usage(Path(os.path.realpath(self.path)).parent).free

    def _full(self, taken: int) -> OutputError:
        needed = self.layout.total_bytes - taken
        return OutputError(
            f"{self.path}: the disk is full: {needed:,} bytes needed, {self._free():,} free; "
            "make room or write elsewhere"
        )
