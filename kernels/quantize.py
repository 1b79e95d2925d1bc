"""Encoders: float32 rows to packed blocks of every type in the table.

A block decodes to an evenly spaced grid, `scale * code - minimum` (or `scale * code`, with codes of either sign; or
`scale * table[code]`). Given the grid, the best code of a weight is the nearest point. Given the codes, the best scale
and minimum are a weighted least-squares fit with a closed form. What is hard is that codes and grid depend on one
another, and the search alternates between them:

1. Each run of weights (a sub-block of a K-quant, or a whole small block) is rounded on a few trial grids, whose ends
   lie a little inside or outside of the run's own range. For each, the fit to the codes so found is solved, and the
   fit with the least error is kept. Clipping the ends pays: a finer step helps all weights, and costs only one.
2. The scales of a super-block's runs become integers (4, 6 or 8 bits) of one half-precision scale, which is their
   largest over the last integer; so do the minima. Halves below 2**-14 are coarse, and weights are often that small:
   they are rounded outward, or the largest scales would be cut short.
3. With codes and integers fixed, the super-block's two half-precision scales are fitted again. With those fixed, each
   run moves its integers to the best neighbours, its codes following. Affine types do this twice.

Every error is weighted by the importance of the weight's column (the energy of the activations that meet it), or
counts alike without one. Rows are encoded independently, so results do not depend on slabs or threads.
What blocks cannot hold is clamped to the nearest they can: no infinity is ever written. The inner loops are compiled
(`search.py`), on first use. Does not know which tensor should get which type, or where blocks are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from .errors import AuricleError
from .formats import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Format,
)

HALF_MAX = np.float32(65504)
SLAB = 1 << 17  # weights encoded at a time: they and their codes stay near a core
IMPORTANCE_FLOOR = np.float32(1e-4)  # of the mean: a column that never fired still has a preference

Encoder = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
_ENCODERS: dict[Format, Encoder] = {}


class QuantizationError(AuricleError):
    """Weights or importances that cannot be encoded; `row` and `column` say where, counted in the array given."""

    def __init__(self, message: str, row: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.row, self.column = row, column


def quantize(x: np.ndarray, fmt: Format, importance: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """Encode rows of weights.

    `x`: float32 [n_rows, n_cols], n_cols a multiple of the block length. `importance`: float32 [n_cols], not negative,
    any unit; plain numbers and Q8_0 do not use it. Returns uint8 [n_rows, row_bytes]. The work releases the
    interpreter lock; `threads` > 1 shares it out by slabs of rows. Raises QuantizationError for a weight or an
    importance that is NaN or infinite.
    """
    assert (x.dtype, x.ndim) == (np.float32, 2), f"{x.dtype=} {x.shape=}"
    n_rows, n_cols = x.shape
    out = np.empty((n_rows, fmt.row_bytes(n_cols)), np.uint8)
    weights = None if importance is None else _usable_importance(importance, n_cols)

    def encode(first: int) -> None:
        slab = np.ascontiguousarray(x[first : first + step])
        _check_finite(slab, first)
        out[first : first + step] = _ENCODERS[fmt](slab, weights).view(np.uint8).reshape(len(slab), -1)

    step = max(1, SLAB // max(1, n_cols))
    slabs = range(0, n_rows if n_cols else 0, step)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(encode, slabs))
    else:
        for first in slabs:
            encode(first)
    return out


def pack_planes(codes: np.ndarray, width: int, bits: int) -> np.ndarray:
    """The inverse of `dequantize.unpack_planes`: uint8 [..., n] of codes below 2**bits -> uint8 [..., n * bits / 8]."""
    *outer, n = codes.shape
    n_runs = 8 // bits
    runs = codes.reshape(*outer, n // (width * n_runs), n_runs, width)
    packed = runs[..., 0, :].copy()
    for run in range(1, n_runs):
        packed |= runs[..., run, :] << np.uint8(bits * run)
    return packed.reshape(*outer, n * bits // 8)


def pack_scales_k4(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """The inverse of `dequantize.unpack_scales_k4`: two uint8 [..., 8] below 64 -> uint8 [..., 12]."""
    first = scales[..., :4] | scales[..., 4:] >> 4 << 6
    second = minima[..., :4] | minima[..., 4:] >> 4 << 6
    third = scales[..., 4:] & 15 | minima[..., 4:] << 4
    return np.concatenate([first, second, third], axis=-1)


def _usable_importance(importance: np.ndarray, n_cols: int) -> np.ndarray | None:
    """Importance with mean 1 and no zeros; None (all alike) if no column has any."""
    assert importance.shape == (n_cols,), f"{importance.shape=} for {n_cols} columns"
    bad = ~np.isfinite(importance) | (importance < 0)
    if bad.any():
        column = int(bad.argmax())
        raise QuantizationError(
            f"importance of column {column} is {importance[column]}; collect it again from finite activations",
            column=column,
        )
    mean = importance.sum(dtype=np.float64) / max(n_cols, 1)
    return np.maximum((importance / mean).astype(np.float32), IMPORTANCE_FLOOR) if mean > 0 else None


def _check_finite(x: np.ndarray, first_row: int) -> None:
    if np.isfinite(x.max()) and np.isfinite(x.min()):  # both are NaN if any weight is
        return
    row, column = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
    raise QuantizationError(
        f"weight at row {first_row + row}, column {column} is {x[row, column]}; only finite weights can be encoded",
        first_row + row,
        column,
    )


class Grid(NamedTuple):
    """What a type can express: weights of level * d * code - min_level * dmin."""

    run: int  # weights that share their levels
    group: int  # runs that share d and dmin
    bottom: int  # the lowest code, and the highest
    top: int
    low: int = 1  # the lowest level, and the highest; 1 and 1 if the type has none
    high: int = 1
    affine: bool = False  # has minima (then bottom is 0)
    floor: float = 0.0  # no minimum is below
    table: bool = False  # codes stand for the sixteen values of IQ4


class _Found(NamedTuple):
    codes: np.ndarray  # uint8 [n_blocks, block length], the lowest code is 0
    levels: np.ndarray  # int8 [n_blocks, n_runs]: integer factors of d
    min_levels: np.ndarray
    d: np.ndarray  # float32 [n_blocks]: exactly a half
    dmin: np.ndarray


def _search(x: np.ndarray, weights: np.ndarray | None, grid: Grid) -> _Found:
    from .search import new_panel, search  # numba takes its time to import, and most programs only decode

    runs = x.reshape(-1, grid.run)
    run_weights = np.empty((0, grid.run), np.float32) if weights is None else weights.reshape(-1, grid.run)
    n_blocks = len(runs) // grid.group
    codes = np.empty(runs.shape, np.uint8)
    levels, min_levels = np.empty((2, len(runs)), np.int8)
    d, dmin = np.empty((2, n_blocks), np.float32)
    search(new_panel(grid.run), runs, run_weights, grid, codes, levels, min_levels, d, dmin)
    of_blocks = (values.reshape(n_blocks, -1) for values in (codes, levels, min_levels))
    return _Found(*of_blocks, d, dmin)


def _encodes(fmt: Format) -> Callable[[Encoder], Encoder]:
    def register(encoder: Encoder) -> Encoder:
        _ENCODERS[fmt] = encoder
        return encoder

    return register


def _blocks(fmt: Format, **fields: np.ndarray) -> np.ndarray:
    assert set(fields) == set(fmt.layout.names), f"{fmt} has the fields {fmt.layout.names}"
    blocks = np.empty(len(fields["d"]), fmt.layout)
    for name, values in fields.items():
        blocks[name] = values
    return blocks


@_encodes(F32)
def _encode_f32(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return x.astype(F32.layout)


@_encodes(F16)
def _encode_f16(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.clip(x, -HALF_MAX, HALF_MAX).astype(F16.layout)


@_encodes(BF16)
def _encode_bf16(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
    return np.where(rounded & 0x7FFF == 0x7F80, rounded - 1, rounded).astype(BF16.layout)


@_encodes(Q8_0)
def _encode_q8_0(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The definition everybody uses, to the bit: the largest weight gets code 127, ties round away from zero."""
    runs = x.reshape(-1, Q8_0.length)
    largest = np.ascontiguousarray(np.abs(runs).T).max(axis=0)  # twice as fast as max(axis=1)
    d = np.minimum(largest / np.float32(127), HALF_MAX)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d >= np.finfo(np.float32).tiny)
    scaled = runs * inverse[:, None]
    np.clip(scaled, -127, 127, out=scaled)
    return _blocks(Q8_0, d=d, qs=scaled + np.copysign(np.float32(0.5), scaled))


@_encodes(Q4_0)
def _encode_q4_0(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=32, group=1, bottom=-8, top=7))
    return _blocks(Q4_0, d=found.d, qs=pack_planes(found.codes, 16, 4))


@_encodes(Q4_1)
def _encode_q4_1(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=32, group=1, bottom=0, top=15, affine=True, floor=-np.inf))
    return _blocks(Q4_1, d=found.d, m=0 - found.dmin, qs=pack_planes(found.codes, 16, 4))


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    """uint8 [n_blocks, 32] -> uint32 [n_blocks], lowest bit first."""
    return np.packbits(codes >> 4, axis=-1, bitorder="little").view("<u4")[:, 0]


@_encodes(Q5_0)
def _encode_q5_0(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=32, group=1, bottom=-16, top=15))
    return _blocks(Q5_0, d=found.d, qh=_fifth_bits(found.codes), qs=pack_planes(found.codes & 15, 16, 4))


@_encodes(Q5_1)
def _encode_q5_1(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=32, group=1, bottom=0, top=31, affine=True, floor=-np.inf))
    low = pack_planes(found.codes & 15, 16, 4)
    return _blocks(Q5_1, d=found.d, m=0 - found.dmin, qh=_fifth_bits(found.codes), qs=low)


@_encodes(Q2_K)
def _encode_q2_k(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=16, group=16, bottom=0, top=3, low=0, high=15, affine=True))
    scales = found.levels | found.min_levels << 4
    return _blocks(Q2_K, d=found.d, dmin=found.dmin, scales=scales.view(np.uint8), qs=pack_planes(found.codes, 32, 2))


@_encodes(Q3_K)
def _encode_q3_k(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=16, group=16, bottom=-4, top=3, low=-32, high=31))
    levels = (found.levels + np.int8(32)).view(np.uint8)
    scales = np.concatenate([pack_planes(levels & 15, 8, 4), pack_planes(levels >> 4, 4, 2)], axis=-1)
    low, high = pack_planes(found.codes & 3, 32, 2), pack_planes(found.codes >> 2, 32, 1)
    return _blocks(Q3_K, d=found.d, scales=scales, qs=low, hmask=high)


def _search_k4(x: np.ndarray, weights: np.ndarray | None, top: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    found = _search(x, weights, Grid(run=32, group=8, bottom=0, top=top, low=0, high=63, affine=True))
    scales = pack_scales_k4(found.levels.view(np.uint8), found.min_levels.view(np.uint8))
    return found.codes, {"d": found.d, "dmin": found.dmin, "scales": scales}


@_encodes(Q4_K)
def _encode_q4_k(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    codes, scales = _search_k4(x, weights, 15)
    return _blocks(Q4_K, **scales, qs=pack_planes(codes, 32, 4))


@_encodes(Q5_K)
def _encode_q5_k(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    codes, scales = _search_k4(x, weights, 31)
    return _blocks(Q5_K, **scales, qh=pack_planes(codes >> 4, 32, 1), qs=pack_planes(codes & 15, 32, 4))


@_encodes(Q6_K)
def _encode_q6_k(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=16, group=16, bottom=-32, top=31, low=-128, high=127))
    low, high = pack_planes(found.codes & 15, 64, 4), pack_planes(found.codes >> 4, 32, 2)
    return _blocks(Q6_K, d=found.d, scales=found.levels, ql=low, qh=high)


@_encodes(IQ4_NL)
def _encode_iq4_nl(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=32, group=1, bottom=-127, top=113, table=True))
    return _blocks(IQ4_NL, d=found.d, qs=pack_planes(found.codes, 16, 4))


@_encodes(IQ4_XS)
def _encode_iq4_xs(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    found = _search(x, weights, Grid(run=32, group=8, bottom=-127, top=113, low=-32, high=31, table=True))
    levels = (found.levels + np.int8(32)).view(np.uint8)  # [n_blocks, 8]
    low = levels[:, 0::2] & 15 | (levels[:, 1::2] & 15) << 4
    high = ((levels >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=-1, dtype=np.uint16)
    return _blocks(IQ4_XS, d=found.d, scales_h=high, scales_l=low, qs=pack_planes(found.codes, 16, 4))
