"""How rows of blocks are kept in GPU memory, so that a thread can take 16 bytes of codes at once.

A type whose blocks fill multiples of 16 bytes stays as it is in the file. The fields of the others are taken apart:
all bytes of the first field of a row come first, then all of the second, and so on; each such plane starts on 16 bytes.
Nothing is lost: `unpack` gives the file's bytes back. Every row is packed by itself, so an upload can go in slabs of
any number of rows. Knows sizes and offsets, not what the bytes mean (`dequantize.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .formats import Q4_0, Q6_K, Q8_0, Format

ALIGN = 16  # bytes: the widest load of a thread

# Types that are taken apart, and their planes: those that every thread reads in full come first.
PLANES: dict[Format, tuple[str, ...]] = {
    Q4_0: ("qs", "d"),
    Q8_0: ("qs", "d"),
    Q6_K: ("ql", "qh", "scales", "d"),
}


@dataclass(frozen=True)
class Layout:
    """Where a row of `n_cols` weights lies in GPU memory: `stride` bytes from one row to the next, a multiple of 16;
    `planes`: byte offset of each field's plane in a row, empty where blocks stay as they are in the file."""

    format: Format
    n_cols: int
    stride: int
    planes: dict[str, int]


def find_layout(fmt: Format, n_cols: int) -> Layout:
    """The layout of rows of `n_cols` weights; `n_cols` must fill blocks of the type."""
    at, planes = 0, {}
    for name in PLANES.get(fmt, ()):
        planes[name] = at
        at += _align(n_cols // fmt.length * _field_bytes(fmt, name))
    return Layout(fmt, n_cols, at if planes else _align(fmt.row_bytes(n_cols)), planes)


def packed_bytes(fmt: Format, n_rows: int, n_cols: int) -> int:
    """Bytes of a matrix in GPU memory."""
    return n_rows * find_layout(fmt, n_cols).stride


def pack(rows: np.ndarray, fmt: Format) -> np.ndarray:
    """Rows of a file, uint8 [n_rows, row_bytes], as they lie in GPU memory: uint8 [n_rows, stride], gaps zero."""
    n_cols = rows.shape[1] // fmt.block_bytes * fmt.length
    packed = np.empty((len(rows), find_layout(fmt, n_cols).stride), dtype=np.uint8)
    pack_into(packed, rows, fmt)
    return packed


def pack_into(packed: np.ndarray, rows: np.ndarray, fmt: Format) -> None:
    """As `pack`, into memory that is there."""
    assert rows.dtype == packed.dtype == np.uint8, f"{rows.dtype=} {packed.dtype=}"
    n_rows, row_bytes = rows.shape
    layout = find_layout(fmt, row_bytes // fmt.block_bytes * fmt.length)
    assert packed.shape == (n_rows, layout.stride), f"{packed.shape=} {layout.stride=}"
    if layout.stride != row_bytes:
        packed[:] = 0
    if not layout.planes:
        packed[:, :row_bytes] = rows
        return
    blocks = rows.reshape(n_rows, -1, fmt.block_bytes)
    for plane, field in _fields(layout):
        packed[:, plane] = blocks[:, :, field].reshape(n_rows, -1)


def unpack(packed: np.ndarray, fmt: Format, n_cols: int) -> np.ndarray:
    """The opposite of `pack`: uint8 [n_rows, stride] -> uint8 [n_rows, row_bytes]."""
    layout = find_layout(fmt, n_cols)
    n_rows, row_bytes = len(packed), fmt.row_bytes(n_cols)
    assert packed.shape == (n_rows, layout.stride), f"{packed.shape=} {layout.stride=}"
    if not layout.planes:
        return packed[:, :row_bytes].copy()
    blocks = np.empty((n_rows, n_cols // fmt.length, fmt.block_bytes), dtype=np.uint8)
    for plane, field in _fields(layout):
        blocks[:, :, field] = packed[:, plane].reshape(n_rows, blocks.shape[1], -1)
    return blocks.reshape(n_rows, row_bytes)


def _fields(layout: Layout) -> list[tuple[slice, slice]]:
    """For each plane: its bytes in a packed row, and the bytes of its field in a block of the file."""
    fmt, slices = layout.format, []
    for name, at in layout.planes.items():
        size, offset = _field_bytes(fmt, name), fmt.offset(name)
        n_bytes = layout.n_cols // fmt.length * size
        slices.append((slice(at, at + n_bytes), slice(offset, offset + size)))
    return slices


def _field_bytes(fmt: Format, name: str) -> int:
    return fmt.layout.fields[name][0].itemsize


def _align(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN) * ALIGN
