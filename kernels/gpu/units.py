"""The unit decoders: what a thread of the mat-vec takes of a row at once, read from GPU memory.

A row of weights is a row of *units*, of 64 or 128 consecutive weights in types with scales: many share what a scale
costs. A tile of [ROWS, LANES] units is tensors of that shape; a thread holds the same numbers of each.

`load(row, unit, PLANES, N_COLS)` gives the words of units, uint32, for `decode(words, unit, RECORD)`, so that more can
be on its way while something is computed. `row`: pointers to where rows begin [ROWS, 1]; `unit`: numbers of units
[1, LANES]; `PLANES`: as in `tiles.py`. Of types whose codes fit bytes, `decode` gives 64 weights of a unit, those that
meet record number RECORD of its tokens (see `activations.py`), as `(codes, scales, minima, factor)`:

- `codes`: 16 words of four codes, in the order of their columns;
- `scales[g]` and `minima[g]`: float32, of each 32 weights; `minima` is empty where the type has none, and
  weight = scale * code - minimum;
- or, where `halves` is set, `scales[h]`: int32, of each 16 weights, and weight = factor * scale * (code - 32).

For plain numbers `codes` are the values themselves, float32, in the order of their columns, and the rest is empty.
Offsets come from `formats.py`; see `dequantize.py` for what the bytes mean.
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
from .vectors import as_float, high_half, load_four, load_one, load_two, low_half, rotate

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


# Plain numbers.


@triton.jit
def load_f32(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    return load_vectors(row, unit * 2, (N_COLS + 3) // 4 - 1, 2, N_COLS % 8 != 0)


@triton.jit
def decode_f32(words, unit, RECORD: tl.constexpr):
    values = ()
    for i in tl.static_range(8):
        values += (as_float(words[i]),)
    return values, (), (), 1.0


@triton.jit
def load_16_bits(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    return load_vectors(row, unit * 2, (N_COLS + 7) // 8 - 1, 2, N_COLS % 16 != 0)


@triton.jit
def decode_f16(words, unit, RECORD: tl.constexpr):
    values = ()
    for i in tl.static_range(8):
        values += (low_half(words[i]), high_half(words[i]))
    return values, (), (), 1.0


@triton.jit
def decode_bf16(words, unit, RECORD: tl.constexpr):
    """A BF16 is the upper half of a float32."""
    values = ()
    for i in tl.static_range(8):
        values += (as_float(words[i] << 16), as_float(words[i] & 0xFFFF0000))
    return values, (), (), 1.0


# Blocks of 32 with one scale, in planes: a unit is two blocks. Of an odd number, what would be the last has scale 0.


@triton.jit
def load_q8_0(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    codes = load_vectors(row + PLANES[0], unit * 4, N_COLS // 16 - 1, 4, N_COLS % 64 != 0)
    codes += (load_one(row + PLANES[1], unit),)
    return codes


@triton.jit
def decode_q8_0(words, unit, RECORD: tl.constexpr):
    return words, (low_half(words[16]), high_half(words[16])), (), 1.0


@triton.jit
def load_q4_0(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    codes = load_vectors(row + PLANES[0], unit * 2, N_COLS // 32 - 1, 2, N_COLS % 64 != 0)
    codes += (load_one(row + PLANES[1], unit),)
    return codes


@triton.jit
def decode_q4_0(words, unit, RECORD: tl.constexpr):
    """The first half of a block is in low nibbles, the second in high ones; codes mean code - 8."""
    codes = ()
    for b in tl.static_range(2):
        for i in tl.static_range(4):
            codes += (words[4 * b + i] & LOW,)
        for i in tl.static_range(4):
            codes += ((words[4 * b + i] >> 4) & LOW,)
    first, second = low_half(words[8]), high_half(words[8])
    return codes, (first, second), (first * 8.0, second * 8.0), 1.0


# Blocks of 256. Q4_K and Q5_K have a scale and a minimum for each 32, and stay as they are in the file: four units.


@triton.jit
def k_scales(words, within, HIGH_SCALE: tl.constexpr):
    """Scales and minima of sub-blocks 2 * within and 2 * within + 1 of Q4_K and Q5_K, which begin with `words`.

    Of the eight six-bit scales, the first four are in the bytes of the second word; the others have their low nibbles
    in those of the fourth, and their upper two bits where bytes of the second have room. Minima: the third word, and
    the fourth's high nibbles. Codes of the second sub-block are 1 / HIGH_SCALE too large.
    """
    d, dmin = low_half(words[0]), high_half(words[0])
    at = (within & 1) * 16
    w0, w1, w2 = words[1] >> at, words[2] >> at, words[3] >> at
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
def load_q4_k(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """What the scales are made from, and 32 bytes of codes."""
    block = row + (unit >> 2) * Q4_BLOCK
    return load_four(block, 0) + load_vectors(block + Q4_QS, (unit & 3) * 2, 0, 2, False)


@triton.jit
def decode_q4_k(words, unit, RECORD: tl.constexpr):
    """Low nibbles are one sub-block, the high nibbles, left where they are, the next."""
    scales, minima = k_scales(words, unit & 3, 0.0625)
    low, high = (), ()
    for i in tl.static_range(4, 12):
        low += (words[i] & LOW,)
        high += (words[i] & HIGH,)
    return low + high, scales, minima, 1.0


@triton.jit
def load_q5_k(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """As Q4_K, and all of `qh`."""
    block = row + (unit >> 2) * Q5_BLOCK
    codes = load_vectors(block + Q5_QS, (unit & 3) * 2, 0, 2, False)
    return load_four(block, 0) + codes + load_vectors(block + Q5_QH, 0, 0, 2, False)


@triton.jit
def decode_q5_k(words, unit, RECORD: tl.constexpr):
    """As Q4_K; bit j of byte l in `qh` is the fifth bit of weight 32 j + l. It is turned to where it belongs."""
    within = unit & 3
    scales, minima = k_scales(words, within, 1.0)
    right = (within * 2 + 28) & 31
    low, high = (), ()
    for i in tl.static_range(4, 12):
        fifth = rotate(words[i + 8], right)
        low += ((words[i] & LOW) | (fifth & FIFTH),)
        high += (((words[i] >> 4) & LOW) | ((fifth >> 1) & FIFTH),)
    return low + high, scales, minima, 1.0


@triton.jit
def signed_byte(word, N: tl.constexpr):
    return (word.to(tl.int32, bitcast=True) << (24 - 8 * N)) >> 24


@triton.jit
def load_q6_k(row, unit, PLANES: tl.constexpr, N_COLS: tl.constexpr):
    """Half a block: 64 bytes of `ql`, 32 of `qh`, 8 scales, and the pair of halves in which the block's is."""
    codes = load_vectors(row + PLANES[0], unit * 4, 0, 4, False) + load_vectors(row + PLANES[1], unit * 2, 0, 2, False)
    return codes + load_two(row + PLANES[2], unit * 2) + (load_one(row + PLANES[3], unit >> 2),)


@triton.jit
def decode_q6_k(words, unit, RECORD: tl.constexpr):
    """Bytes of `qh` hold two bits for each of the four runs of 32; `ql` has the first two in its low nibbles."""
    first, second = (), ()
    for i in tl.static_range(8):
        high = words[16 + i]
        if RECORD == 0:
            first += ((words[i] & LOW) | ((high << 4) & UPPER),)
            second += ((words[i + 8] & LOW) | ((high << 2) & UPPER),)
        else:
            first += (((words[i] >> 4) & LOW) | (high & UPPER),)
            second += (((words[i + 8] >> 4) & LOW) | ((high >> 2) & UPPER),)
    scales = ()
    for i in tl.static_range(4):
        scales += (signed_byte(words[24 + RECORD], i),)
    return first + second, scales, (), low_half(words[26] >> ((unit & 2) * 8))


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
    load: Any
    decode: Any
    unit: Unit

    def matrix(self, n_cols: int, exact: bool) -> Unit:
        """The numbers for rows of `n_cols` weights. `exact`: tokens are not rounded."""
        layout = find_layout(self.format, n_cols)
        planes = tuple(at // WORD for at in layout.planes.values()) or (0,)
        rounded = self.unit.coded and not exact
        return self.unit._replace(rounded=rounded, planes=planes, stride=layout.stride // WORD)


def _kind(fmt: Format, load: Any, decode: Any, **rest: bool) -> UnitKind:
    return UnitKind(fmt, load, decode, Unit(unit_of(fmt.name), **rest))


UNITS: dict[Format, UnitKind] = {
    kind.format: kind
    for kind in (
        _kind(F32, load_f32, decode_f32, coded=False),
        _kind(F16, load_16_bits, decode_f16, coded=False),
        _kind(BF16, load_16_bits, decode_bf16, coded=False),
        _kind(Q8_0, load_q8_0, decode_q8_0, signed=True),
        _kind(Q4_0, load_q4_0, decode_q4_0),
        _kind(Q4_K, load_q4_k, decode_q4_k),
        _kind(Q5_K, load_q5_k, decode_q5_k),
        _kind(Q6_K, load_q6_k, decode_q6_k, halves=True),
    )
}
