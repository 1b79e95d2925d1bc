"""The table of GGML storage types: one record a type, and every byte offset comes from it.

Knows how a block is laid out. Does not know what its bytes mean (`dequantize.py`), how to make
one (`quantize.py`), or where it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Format:
    """One storage type: `length` weights are kept together in one block of `layout.itemsize` bytes.

    `id` is the type's number in a GGUF file; `layout` is packed, its fields in file order.
    Source: the GGUF format document and the block structures of ggml.
    """

    name: str
    id: int
    length: int
    layout: np.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.layout.itemsize

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.length

    def offset(self, field: str) -> int:
        """Byte offset of `field` inside a block."""
        return self.layout.fields[field][1]

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row of `n_cols` weights; `n_cols` must be a multiple of the block length."""
        assert n_cols % self.length == 0, f"{n_cols} columns do not fill blocks of {self.length} ({self.name})"
        return n_cols // self.length * self.block_bytes

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose innermost dimension is `shape[-1]`; a scalar counts as one weight."""
        n_rows = 1
        for n in shape[:-1]:
            n_rows *= n
        return n_rows * self.row_bytes(shape[-1] if shape else 1)

    def __repr__(self) -> str:
        return self.name


def _block(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


# Plain numbers: a block of one. BF16 is kept as the upper 16 bits of a float32.
F32 = Format("F32", 0, 1, np.dtype("<f4"))
F16 = Format("F16", 1, 1, np.dtype("<f2"))
BF16 = Format("BF16", 30, 1, np.dtype("<u2"))

# 32 weights with one scale `d` (and a minimum `m`); `qh` holds the fifth bits.
Q4_0 = Format("Q4_0", 2, 32, _block(("d", "<f2"), ("qs", "u1", 16)))
Q4_1 = Format("Q4_1", 3, 32, _block(("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)))
Q5_0 = Format("Q5_0", 6, 32, _block(("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)))
Q5_1 = Format("Q5_1", 7, 32, _block(("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)))
Q8_0 = Format("Q8_0", 8, 32, _block(("d", "<f2"), ("qs", "i1", 32)))

# K-quants: 256 weights in sub-blocks of 16 or 32, whose scales are themselves quantised.
Q2_K = Format("Q2_K", 10, 256, _block(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")))
Q3_K = Format("Q3_K", 11, 256, _block(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")))
Q4_K = Format("Q4_K", 12, 256, _block(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)))
Q5_K = Format(
    "Q5_K", 13, 256, _block(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128))
)
Q6_K = Format("Q6_K", 14, 256, _block(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")))

# Four bits that index a table of unevenly spaced values.
IQ4_NL = Format("IQ4_NL", 20, 32, _block(("d", "<f2"), ("qs", "u1", 16)))
IQ4_XS = Format("IQ4_XS", 23, 256, _block(("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)))

FORMATS: tuple[Format, ...] = (
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
)
BY_ID: dict[int, Format] = {f.id: f for f in FORMATS}
BY_NAME: dict[str, Format] = {f.name: f for f in FORMATS}
