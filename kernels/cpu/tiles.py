"""The tile decoders: 256 weights of a row, straight from the file's bytes, in the one form that all kernels take.

    weight[i] = scale[i // 16] * code[i] - minimum[i // 16]

`decode(blocks, at)` gives `(c0, c1, c2, c3, scales, minima)`: four vectors of 64 codes (bytes), and sixteen scales and
minima. A kernel is written once and takes the decoder of the type. The codes come in groups of 32 weights, in the order
in which Q4_K unpacks without moving a lane: groups 0 and 2 in c0, 1 and 3 in c1, 4 and 6 in c2, 5 and 7 in c3 (see
`place`). Codes of Q8_0 reach 255 and need `dot4_wide`; the others stay below 64. Knows layouts (`formats.py` has the
offsets); see `dequantize.py` for what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..formats import Q4_K, Q5_K, Q6_K, Q8_0, Format
from .jit import inline
from .simd import (
    half_number,
    half_to_float,
    high_halves,
    lanes,
    lanes_float,
    load_bytes,
    load_halves,
    load_signed,
    load_u16,
    load_u32,
    low_halves,
    pairs_of_halfwords,
    shift_halves,
    spread_bytes,
    to_float,
)

TILE = 256  # weights
GROUP = 32  # weights that lie together

NIBBLES, SIXES, FIVES, TWOS, HIGHS = 0x0F0F0F0F, 0x3F3F3F3F, 0x10101010, 0x30303030, 0x80808080

K_SCALES, K_QS = Q4_K.offset("scales"), Q4_K.offset("qs")
Q5_QH, Q5_QS = Q5_K.offset("qh"), Q5_K.offset("qs")
Q6_QL, Q6_QH, Q6_SCALES, Q6_D = (Q6_K.offset(name) for name in ("ql", "qh", "scales", "d"))
Q8_BYTES, Q8_QS = Q8_0.block_bytes, Q8_0.offset("qs")


@inline
def place(group):
    """Where codes have a group, or which group they have there: the two middle ones of each four change places."""
    return group ^ 3 if (group & 3) in (1, 2) else group


@inline
def _k_scales(blocks, at):
    """Scales and minima of Q4_K and Q5_K: eight numbers of six bits each, in twelve bytes, times two halves."""
    u0 = load_u32(blocks, at + K_SCALES)
    u1 = load_u32(blocks, at + K_SCALES + 4)
    u2 = load_u32(blocks, at + K_SCALES + 8)
    scales = spread_bytes(u0 & SIXES, (u2 & NIBBLES) | ((u0 >> 2) & TWOS))
    minima = spread_bytes(u1 & SIXES, ((u2 >> 4) & NIBBLES) | ((u1 >> 2) & TWOS))
    d = lanes_float(half_number(load_u16(blocks, at)))
    dmin = lanes_float(half_number(load_u16(blocks, at + 2)))
    return to_float(scales) * d, to_float(minima) * dmin


@inline
def decode_q4_k(blocks, at):
    scales, minima = _k_scales(blocks, at)
    mask = lanes(NIBBLES)
    a, b = load_bytes(blocks, at + K_QS), load_bytes(blocks, at + K_QS + 64)
    return a & mask, (a >> 4) & mask, b & mask, (b >> 4) & mask, scales, minima


@inline
def decode_q5_k(blocks, at):
    """As Q4_K; bit j of byte l in `qh` is the fifth bit of weight 32 j + l."""
    scales, minima = _k_scales(blocks, at)
    mask, fifth = lanes(NIBBLES), lanes(FIVES)
    a, b = load_bytes(blocks, at + Q5_QS), load_bytes(blocks, at + Q5_QS + 64)
    high = load_halves(blocks, at + Q5_QH, at + Q5_QH)
    return (
        (a & mask) | ((shift_halves(high, 0, 2) << 4) & fifth),
        ((a >> 4) & mask) | ((shift_halves(high, 1, 3) << 4) & fifth),
        (b & mask) | (shift_halves(high, 0, 2) & fifth),
        ((b >> 4) & mask) | (shift_halves(high, 1, 3) & fifth),
        scales,
        minima,
    )


@inline
def decode_q6_k(blocks, at):
    """Codes are four bits of `ql` and two of `qh`, 128 weights at a time; they mean code - 32."""
    scales = to_float(load_signed(blocks, at + Q6_SCALES)) * lanes_float(half_number(load_u16(blocks, at + Q6_D)))
    c0, c1 = _six_bits(blocks, at + Q6_QL, at + Q6_QH)
    c2, c3 = _six_bits(blocks, at + Q6_QL + 64, at + Q6_QH + 32)
    return c0, c1, c2, c3, scales, scales * lanes_float(32.0)


@inline
def _six_bits(blocks, ql, qh):
    """The four low bits lie in the order of the weights: weights 0 .. 63, then 64 .. 127 in the high halves."""
    four, two = lanes(NIBBLES), lanes(TWOS)
    a, high = load_bytes(blocks, ql), load_halves(blocks, qh, qh)
    first = (a & four) | ((shift_halves(high, 0, 2) << 4) & two)
    second = ((a >> 4) & four) | (shift_halves(high, 0, 2) & two)
    return low_halves(first, second), high_halves(first, second)


@inline
def decode_q8_0(blocks, at):
    """Eight small blocks; signed bytes become codes by flipping the highest bit: code - 128."""
    flip = lanes(HIGHS)
    q = at + Q8_QS
    scales = half_to_float(pairs_of_halfwords(blocks, at, Q8_BYTES))
    return (
        load_halves(blocks, q, q + 2 * Q8_BYTES) ^ flip,
        load_halves(blocks, q + Q8_BYTES, q + 3 * Q8_BYTES) ^ flip,
        load_halves(blocks, q + 4 * Q8_BYTES, q + 6 * Q8_BYTES) ^ flip,
        load_halves(blocks, q + 5 * Q8_BYTES, q + 7 * Q8_BYTES) ^ flip,
        scales,
        scales * lanes_float(128.0),
    )


@dataclass(frozen=True)
class Tile:
    """How kernels read a type. `group`: how many products of bytes the mat-mat sums up before it scales them: 32, or 16
    where each 16 weights have a scale, or where weights are so exact that the rounding of activations costs most, so
    that those need one. `zero`: the code of the weight 0, a power of two, where it is the same everywhere; then the
    minima say nothing that the scales do not."""

    format: Format
    decode: Any
    group: int
    zero: int = 0

    @property
    def wide(self) -> bool:
        """Whether codes reach 255."""
        return self.zero > 64

    @property
    def n_bytes(self) -> int:
        """Bytes of a tile."""
        return self.format.row_bytes(TILE)


TILES: dict[Format, Tile] = {
    tile.format: tile
    for tile in (
        Tile(Q4_K, decode_q4_k, 32),
        Tile(Q5_K, decode_q5_k, 32),
        Tile(Q6_K, decode_q6_k, 16, zero=32),
        Tile(Q8_0, decode_q8_0, 16, zero=128),
    )
}
