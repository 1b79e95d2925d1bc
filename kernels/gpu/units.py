"""The unit decoders: what a thread of the mat-vec takes of a row at once, read from GPU memory.

A row of weights is a row of *units* of 64 or 128 consecutive weights, so large that what their scales cost is shared
by many. A tile of [ROWS, LANES] units is tensors of that shape, and a thread holds the same numbers of each.

`decode(row, unit, PLANES)` gives `(codes, scales, minima, factor)`. For types whose codes fit bytes:

- `codes`: uint32 words of four codes, in the order of their columns;
- `scales[g]` and `minima[g]`: float32, of each 32 weights; `minima` is empty where the type has none, and
  weight = scale * code - minimum;
- or, where `halves` is set, `scales[h]`: int32, of each 16 weights, and weight = factor * scale * (code - 32).

For plain numbers `codes` are the values themselves, float32, in the order of their columns, and the rest is empty.

`row`: pointers to where rows begin [ROWS, 1]; `unit`: numbers of units [1, LANES]; `PLANES`: as in `tiles.py`. Offsets
come from `formats.py`; see `dequantize.py` for what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formats import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Format
from ..layouts import find_layout
from .tiles import Q4_BLOCK, Q4_QS, Q5_BLOCK, Q5_QH, Q5_QS, WORD
from .tune import unit_of
from .vectors import as_float, high_half, load_four, load_one, load_two, low_half

LOW: tl.constexpr = tl.constexpr(0x0F0F0F0F)
HIGH: tl.constexpr = tl.constexpr(0xF0F0F0F0)
FIFTH: tl.constexpr = tl.constexpr(0x10101010)
UPPER: tl.constexpr = tl.constexpr(0x30303030)


@triton.jit
def load_vectors(row, first, last, N: tl.constexpr, CLAMP: tl.constexpr):
    """4 N words from vector `first` on; with CLAMP, vectors beyond `last` repeat it."""
    words = ()
    for i in tl.static_range(N):
        words += load_four(row, (tl.minimum(first + i, last) if CLAMP else first + i) * 4)
    return words


@triton.jit
def masked(words, MASK: tl.constexpr):
    results = ()
    for i in tl.static_range(len(words)):
        results += (words[i] & MASK,)
    return results


# Plain numbers.


@triton.jit
def decode_f32(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    words = load_vectors(row, unit * 2, (N_COLS + 3) // 4 - 1, 2, N_COLS % 8 != 0)
    values = ()
    for i in tl.static_range(8):
        values += (as_float(words[i]),)
    return values, (), (), 1.0


@triton.jit
def decode_f16(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    words = load_vectors(row, unit * 2, (N_COLS + 7) // 8 - 1, 2, N_COLS % 16 != 0)
    values = ()
    for i in tl.static_range(8):
        values += (low_half(words[i]), high_half(words[i]))
    return values, (), (), 1.0


@triton.jit
def decode_bf16(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """A BF16 is the upper half of a float32."""
    words = load_vectors(row, unit * 2, (N_COLS + 7) // 8 - 1, 2, N_COLS % 16 != 0)
    values = ()
    for i in tl.static_range(8):
        values += (as_float(words[i] << 16), as_float(words[i] & 0xFFFF0000))
    return values, (), (), 1.0


# Blocks of 32 with one scale, in planes: a unit is two blocks. Of an odd number, what would be the last has scale 0.


@triton.jit
def decode_q8_0(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    codes = load_vectors(row + PLANES[0], unit * 4, N_COLS // 16 - 1, 4, N_COLS % 64 != 0)
    both = load_one(row + PLANES[1], unit)
    return codes, (low_half(both), high_half(both)), (), 1.0


@triton.jit
def decode_q4_0(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """The first half of a block is in low nibbles, the second in high ones; codes mean code - 8."""
    q = load_vectors(row + PLANES[0], unit * 2, N_COLS // 32 - 1, 2, N_COLS % 64 != 0)
    both = load_one(row + PLANES[1], unit)
    codes = ()
    for b in tl.static_range(2):
        for i in tl.static_range(4):
            codes += (q[4 * b + i] & LOW,)
        for i in tl.static_range(4):
            codes += ((q[4 * b + i] >> 4) & LOW,)
    first, second = low_half(both), high_half(both)
    return codes, (first, second), (first * 8.0, second * 8.0), 1.0


# Blocks of 256. Q4_K and Q5_K have a scale and a minimum for each 32, and stay as they are in the file: four units.


@triton.jit
def k_scales(head, within, HIGH_SCALE: tl.constexpr):
    """Scales and minima of sub-blocks 2 * within and 2 * within + 1 of Q4_K and Q5_K, whose first words are `head`.

    Of the eight six-bit scales, the first four are in the bytes of the second word; the others have their low nibbles
    in those of the fourth, and their upper two bits where bytes of the second have room. Minima: the third word, and
    the fourth's high nibbles. Codes of the second sub-block are 1 / HIGH_SCALE too large.
    """
    d, dmin = low_half(head[0]), high_half(head[0])
    at = (within & 1) * 16
    w0, w1, w2 = head[1] >> at, head[2] >> at, head[3] >> at
    second = within >= 2
    scales = tl.where(second, (w2 & 0x0F0F) | ((w0 >> 2) & 0x3030), w0 & 0x3F3F)
    minima = tl.where(second, ((w2 >> 4) & 0x0F0F) | ((w1 >> 2) & 0x3030), w1 & 0x3F3F)
    return (
        (d * byte(scales, 0), (d * HIGH_SCALE) * byte(scales, 1)),
        (dmin * byte(minima, 0), dmin * byte(minima, 1)),
    )


@triton.jit
def byte(word, N: tl.constexpr):
    """An unsigned byte of a word, as float32."""
    return ((word >> (8 * N)) & 255).to(tl.float32)


@triton.jit
def decode_q4_k(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """32 bytes: their low nibbles are one sub-block, the high nibbles, left where they are, the next."""
    block, within = row + (unit >> 2) * Q4_BLOCK, unit & 3
    head = load_four(block, 0)
    q = load_vectors(block + Q4_QS, within * 2, 0, 2, False)
    scales, minima = k_scales(head, within, 0.0625)
    return masked(q, LOW) + masked(q, HIGH), scales, minima, 1.0


@triton.jit
def decode_q5_k(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """As Q4_K; bit j of byte l in `qh` is the fifth bit of weight 32 j + l. It is turned to where it belongs."""
    block, within = row + (unit >> 2) * Q5_BLOCK, unit & 3
    head = load_four(block, 0)
    q = load_vectors(block + Q5_QS, within * 2, 0, 2, False)
    h = load_vectors(block + Q5_QH, 0, 0, 2, False)
    scales, minima = k_scales(head, within, 1.0)
    right = (within * 2 + 28) & 31
    left = (36 - within * 2) & 31
    low, high = (), ()
    for i in tl.static_range(8):
        fifth = (h[i] >> right) | (h[i] << left)
        low += ((q[i] & LOW) | (fifth & FIFTH),)
        high += (((q[i] >> 4) & LOW) | ((fifth >> 1) & FIFTH),)
    return low + high, scales, minima, 1.0


@triton.jit
def signed_byte(word, N: tl.constexpr):
    return (word.to(tl.int32, bitcast=True) << (24 - 8 * N)) >> 24


@triton.jit
def decode_q6_k(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """Half a block: 64 bytes of `ql`, and 32 of `qh`, whose bytes hold two bits for each of the four runs of 32."""
    q = load_vectors(row + PLANES[0], unit * 4, 0, 4, False)
    h = load_vectors(row + PLANES[1], unit * 2, 0, 2, False)
    pair = load_two(row + PLANES[2], unit * 2)
    both = load_one(row + PLANES[3], unit >> 2)
    d = low_half(both >> ((unit & 2) * 8))
    c0, c1, c2, c3 = (), (), (), ()
    for i in tl.static_range(8):
        c0 += ((q[i] & LOW) | ((h[i] << 4) & UPPER),)
        c1 += ((q[i + 8] & LOW) | ((h[i] << 2) & UPPER),)
        c2 += (((q[i] >> 4) & LOW) | (h[i] & UPPER),)
        c3 += (((q[i + 8] >> 4) & LOW) | ((h[i] >> 2) & UPPER),)
    scales = ()
    for i in tl.static_range(8):
        scales += (signed_byte(pair[i // 4], i % 4),)
    return c0 + c1 + c2 + c3, scales, (), d


class Unit(NamedTuple):
    """All numbers that the mat-vec must know about a matrix when it is compiled: see the module's text.

    `weights`: of a unit; `coded`: words of four codes, `signed` or not, instead of plain numbers; `rounded`: they meet
    tokens that are rounded to bytes; `planes`, `stride`: of a row, in words. A kernel reads a field of it only where it
    says `name: tl.constexpr = UNIT.field`, since Triton 3.6 takes it for a variable elsewhere.
    """

    weights: int
    coded: bool = True
    signed: bool = False
    halves: bool = False
    rounded: bool = False
    planes: tuple[int, ...] = (0,)
    stride: int = 0


@dataclass(frozen=True)
class UnitKind:
    """How the mat-vec reads a type."""

    format: Format
    decode: Any
    unit: Unit

    def matrix(self, n_cols: int, exact: bool) -> Unit:
        """The numbers for rows of `n_cols` weights. `exact`: tokens are not rounded."""
        layout = find_layout(self.format, n_cols)
        planes = tuple(at // WORD for at in layout.planes.values()) or (0,)
        rounded = self.unit.coded and not exact
        return self.unit._replace(rounded=rounded, planes=planes, stride=layout.stride // WORD)


def _kind(fmt: Format, decode: Any, **rest: bool) -> UnitKind:
    return UnitKind(fmt, decode, Unit(unit_of(fmt.name), **rest))


UNITS: dict[Format, UnitKind] = {
    kind.format: kind
    for kind in (
        _kind(F32, decode_f32, coded=False),
        _kind(F16, decode_f16, coded=False),
        _kind(BF16, decode_bf16, coded=False),
        _kind(Q8_0, decode_q8_0, signed=True),
        _kind(Q4_0, decode_q4_0),
        _kind(Q4_K, decode_q4_k),
        _kind(Q5_K, decode_q5_k),
        _kind(Q6_K, decode_q6_k, halves=True),
    )
}
