"""The tile decoders: a tile of a matrix of weights, read from GPU memory in the one form that all kernels take.

A row of weights is a row of *pieces*: what one thread takes at once, a vector of four 32-bit words. So a tile of
[ROWS, PIECES] pieces is tensors of shape [ROWS, PIECES, 4] (or [PIECES, ROWS, 4], see `by_row`), and every operation on
them is done by all threads alike, on what each of them holds. Three facts about a type say which weight is where:

- a word holds `per_word` codes, of consecutive columns;
- so a piece is a run of 4 * `per_word` consecutive columns, or several such runs (one in the low bits of its bytes, one
  in the high bits) that begin `next_run` columns apart;
- of each pair of pieces the second begins `next_piece` columns after the first.

`decode(words, piece, PLANES)` gives `(codes, scales, minima)`, three tuples: `codes[r * per_word + e]`, float32
[ROWS, PIECES, 4], is the e-th code in the words for run r; `scales[r]` and `minima[r]`, float32 [ROWS, PIECES, 1], are
those of the run, and a tuple is empty where the type has none:

    weight = scale * code / 2^(code_shift * e + run_shift * r) - minimum

Codes are left where they are in a word, and so are too large by powers of two that are known when a kernel is compiled.

`words`: pointers to 32-bit words where each row begins, `by_row`; `piece`: numbers of pieces, `by_piece`;
`PLANES`: offsets in words of the planes of a row, for types that `layouts.py` takes apart. Offsets come from
`formats.py`; see `dequantize.py` for what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formats import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Format
from ..layouts import find_layout

WORD = 4  # bytes
VECTOR: tl.constexpr = tl.constexpr(4)  # words that a thread loads at once: 16 bytes


def _words(n_bytes: int) -> tl.constexpr:
    assert n_bytes % WORD == 0, f"{n_bytes} bytes are not whole words"
    return tl.constexpr(n_bytes // WORD)


FLIP: tl.constexpr = tl.constexpr(-0x7F7F7F80)  # 0x80808080: flips the signs of bytes
Q4_BLOCK, Q4_SCALES, Q4_QS = (_words(n) for n in (Q4_K.block_bytes, Q4_K.offset("scales"), Q4_K.offset("qs")))
Q5_BLOCK, Q5_SCALES, Q5_QH, Q5_QS = (
    _words(n) for n in (Q5_K.block_bytes, Q5_K.offset("scales"), Q5_K.offset("qh"), Q5_K.offset("qs"))
)


# Threads run along one axis of a tile first. Where memory does not say which (numbers that lie apart in both ways),
# Triton 3.6 takes the first axis, later ones the last; it must be that of the pieces, which lie side by side.
PIECES_FIRST: tl.constexpr = tl.constexpr(triton.__version__.startswith("3.6."))


@triton.jit
def by_row(values):
    """A number for each row of a tile."""
    return values[None, :, None] if PIECES_FIRST else values[:, None, None]


@triton.jit
def by_piece(values):
    """A number for each piece of a row of a tile."""
    return values[:, None, None] if PIECES_FIRST else values[None, :, None]


@triton.jit
def load_vector(words, vector):
    """The four words of each vector; `vector` counts from where `words` points."""
    return tl.load(words + vector * VECTOR + tl.arange(0, VECTOR)[None, None, :])


@triton.jit
def load_half(words, index):
    """A half, as float32; `index` counts halves from where `words` points."""
    return tl.load(words.to(tl.pointer_type(tl.float16)) + index).to(tl.float32)


@triton.jit
def low_half(word):
    """The half in the low 16 bits of a word, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def four(words, MASK: tl.constexpr):
    """A code in each of the four bytes of a word, as float32: the bits of MASK, left where they are in the word.

    So the code in byte e is 2^(8 e) times too large; to shift it down would cost as much as to use it.
    """
    unsigned = words.to(tl.uint32, bitcast=True)
    return (
        (unsigned & MASK).to(tl.float32),
        (unsigned & (MASK << 8)).to(tl.float32),
        (unsigned & (MASK << 16)).to(tl.float32),
        (unsigned & (MASK << 24)).to(tl.float32),
    )


@triton.jit
def six_bits(words, SHIFT: tl.constexpr):
    return ((words >> SHIFT) & 63).to(tl.float32)


# Plain numbers: nothing to scale.


@triton.jit
def decode_f32(words, piece, PLANES: tl.constexpr):
    return (load_vector(words, piece).to(tl.float32, bitcast=True),), (), ()


@triton.jit
def decode_f16(words, piece, PLANES: tl.constexpr):
    q = load_vector(words, piece)
    return (low_half(q), low_half(q >> 16)), (), ()


@triton.jit
def decode_bf16(words, piece, PLANES: tl.constexpr):
    """A BF16 is the upper half of a float32."""
    q = load_vector(words, piece)
    return ((q << 16).to(tl.float32, bitcast=True), ((q >> 16) << 16).to(tl.float32, bitcast=True)), (), ()


# Blocks of 32 with one scale, in planes: codes, then scales.


@triton.jit
def decode_q8_0(words, piece, PLANES: tl.constexpr):
    """A piece is half a block; codes are signed bytes; with the sign flipped they mean code - 128."""
    q = load_vector(words + PLANES[0], piece)
    d = load_half(words + PLANES[1], piece // 2)
    return four(q ^ FLIP, 255), (d,), (d * 128.0,)


@triton.jit
def decode_q4_0(words, piece, PLANES: tl.constexpr):
    """A piece is a block; codes mean code - 8."""
    q = load_vector(words + PLANES[0], piece)
    d = load_half(words + PLANES[1], piece)
    return four(q, 0x0F) + four(q, 0xF0), (d, d), (d * 8.0, d * 8.0)


# Blocks of 256. Q4_K and Q5_K have a scale and a minimum for each 32, and stay as they are in the file.


@triton.jit
def k_scales(block, pair, SCALES: tl.constexpr):
    """Scales and minima of sub-blocks 2 * pair and 2 * pair + 1 of Q4_K and Q5_K; `block` points to a block.

    Of the eight six-bit scales, the first four are in the bytes of word 0; the others have their low nibbles in those
    of word 2, and their upper two bits where bytes of word 0 have room. Minima: word 1, and word 2's high nibbles.
    """
    both = tl.load(block)
    d, dmin = low_half(both), low_half(both >> 16)
    at = (pair % 2) * 16
    w0 = tl.load(block + SCALES) >> at
    w1 = tl.load(block + SCALES + 1) >> at
    w2 = tl.load(block + SCALES + 2) >> at
    second = pair >= 2
    scales = tl.where(second, (w2 & 0x0F0F) | ((w0 >> 2) & 0x3030), w0 & 0x3F3F)
    minima = tl.where(second, ((w2 >> 4) & 0x0F0F) | ((w1 >> 2) & 0x3030), w1 & 0x3F3F)
    return (
        (d * six_bits(scales, 0), d * six_bits(scales, 8)),
        (dmin * six_bits(minima, 0), dmin * six_bits(minima, 8)),
    )


@triton.jit
def decode_q4_k(words, piece, PLANES: tl.constexpr):
    """Eight pieces a block; the low nibbles of two pieces are one sub-block, the high nibbles the next."""
    block, within = words + piece // 8 * Q4_BLOCK, piece % 8
    q = load_vector(block + Q4_QS, within)
    scales, minima = k_scales(block, within // 2, Q4_SCALES)
    return four(q, 0x0F) + four(q, 0xF0), scales, minima


@triton.jit
def decode_q5_k(words, piece, PLANES: tl.constexpr):
    """As Q4_K; bit j of byte l in `qh` is the fifth bit of weight 32 j + l."""
    block, within = words + piece // 8 * Q5_BLOCK, piece % 8
    q = load_vector(block + Q5_QS, within)
    high = load_vector(block + Q5_QH, within % 2) >> (within // 2 * 2)
    scales, minima = k_scales(block, within // 2, Q5_SCALES)
    low = (q & 0x0F0F0F0F) | ((high << 4) & 0x10101010)
    top = ((q >> 4) & 0x0F0F0F0F) | ((high << 3) & 0x10101010)
    return four(low, 31) + four(top, 31), scales, minima


@triton.jit
def decode_q6_k(words, piece, PLANES: tl.constexpr):
    """Four pieces a block: two vectors of `ql`, 32 bytes apart, and one of `qh`, whose bytes hold two bits for each of
    the four runs. Each run of 16 has a scale; codes mean code - 32."""
    half, within = piece // 2, piece % 2
    q0 = load_vector(words + PLANES[0], half * 4 + within)
    q1 = load_vector(words + PLANES[0], half * 4 + within + 2)
    high = load_vector(words + PLANES[1], piece)
    d = load_half(words + PLANES[3], piece // 4)
    scale = (words + PLANES[2]).to(tl.pointer_type(tl.int8)) + half * 8 + within
    s0, s1 = d * tl.load(scale).to(tl.float32), d * tl.load(scale + 2).to(tl.float32)
    s2, s3 = d * tl.load(scale + 4).to(tl.float32), d * tl.load(scale + 6).to(tl.float32)
    c0 = (q0 & 0x0F0F0F0F) | ((high << 4) & 0x30303030)
    c1 = (q1 & 0x0F0F0F0F) | ((high << 2) & 0x30303030)
    c2 = ((q0 >> 4) & 0x0F0F0F0F) | (high & 0x30303030)
    c3 = ((q1 >> 4) & 0x0F0F0F0F) | ((high >> 2) & 0x30303030)
    codes = four(c0, 63) + four(c1, 63) + four(c2, 63) + four(c3, 63)
    return codes, (s0, s1, s2, s3), (s0 * 32.0, s1 * 32.0, s2 * 32.0, s3 * 32.0)


class Shape(NamedTuple):
    """All numbers that a kernel must know about a matrix when it is compiled: see the module's text.

    `weights`: of a piece; `planes`, `stride`: of a row, in words. A kernel reads a field of it only where it says
    `name: tl.constexpr = SHAPE.field`, since Triton 3.6 takes it for a variable elsewhere.
    """

    runs: int
    per_word: int
    next_run: int
    next_piece: int
    code_shift: int
    run_shift: int
    weights: int
    planes: tuple[int, ...] = (0,)
    stride: int = 0


@dataclass(frozen=True)
class Tile:
    """How kernels read a type."""

    format: Format
    decode: Any
    shape: Shape

    def matrix(self, n_cols: int) -> Shape:
        """The numbers for rows of `n_cols` weights."""
        layout = find_layout(self.format, n_cols)
        planes = tuple(at // WORD for at in layout.planes.values()) or (0,)
        return self.shape._replace(planes=planes, stride=layout.stride // WORD)


def _tile(fmt: Format, decode: Any, next_piece: int, per_word: int = 4, *, runs: int = 1, **rest: int) -> Tile:
    numbers = {"next_run": 0, "code_shift": 0, "run_shift": 0} | rest
    weights = runs * VECTOR.value * per_word
    return Tile(fmt, decode, Shape(runs, per_word, next_piece=next_piece, weights=weights, **numbers))


TILES: dict[Format, Tile] = {
    tile.format: tile
    for tile in (
        _tile(F32, decode_f32, 4, per_word=1),
        _tile(F16, decode_f16, 8, per_word=2),
        _tile(BF16, decode_bf16, 8, per_word=2),
        _tile(Q8_0, decode_q8_0, 16, code_shift=8),
        _tile(Q4_0, decode_q4_0, 32, runs=2, next_run=16, code_shift=8, run_shift=4),
        _tile(Q4_K, decode_q4_k, 16, runs=2, next_run=32, code_shift=8, run_shift=4),
        _tile(Q5_K, decode_q5_k, 16, runs=2, next_run=32, code_shift=8),
        _tile(Q6_K, decode_q6_k, 16, runs=4, next_run=32, code_shift=8),
    )
}
