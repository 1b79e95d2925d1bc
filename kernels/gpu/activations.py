"""Up to 16 tokens as the mat-vec takes them: normed, and rounded to bytes or as they are, in the order of threads.

A *record* is 64 columns of a token in 96 bytes, of which a thread loads 16 at a time:

    64 signed bytes: codes, -127 .. 127     x[i] ~ scale * code[i]
    2 float32: the scale of each 32
    2 float32: the scale times the sum of the codes of each 32, for minima
    4 int32: -32 times the sum of the codes of each 16, for codes of Q6_K, which are 32 too large

The other form is float32, column after column. Both end in zeros, for threads that a row has no weights for. A value
that is not finite makes its scale NaN, so that it is seen in every result. Knows no weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLS: tl.constexpr = tl.constexpr(64)  # of a record
RECORD: tl.constexpr = tl.constexpr(24)  # words
MOST_WEIGHTS = 128  # of a unit, see `units.py`: so many zeros follow a row
LIMIT: tl.constexpr = tl.constexpr(127.0)
TINY: tl.constexpr = tl.constexpr(1e-30)  # the least that the largest of 32 values is taken for
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added loses its fraction
ROUND_BITS: tl.constexpr = tl.constexpr(0x4B400000)


def padded_cols(n_cols: int) -> int:
    """Columns of a prepared token: whole units and one more, zeros."""
    return (-(-n_cols // MOST_WEIGHTS) + 1) * MOST_WEIGHTS


def record_words(n_cols: int) -> int:
    """32-bit words of a token that is rounded."""
    return padded_cols(n_cols) // COLS.value * RECORD.value


@triton.jit
def normalise(v, column, gain, shift, eps, N_COLS: tl.constexpr, NORM: tl.constexpr):
    """A token after RMSNorm or LayerNorm; `v` is all of it, and zero where a column does not exist."""
    inside = column < N_COLS
    if NORM == "layer":
        v = tl.where(inside, v - tl.sum(v) / N_COLS, 0.0)
    if NORM != "none":
        v = v * tl.rsqrt(tl.sum(v * v) / N_COLS + eps) * tl.load(gain + column, mask=inside, other=0.0)
    if NORM == "layer":
        v += tl.load(shift + column, mask=inside, other=0.0)
    return v


@triton.jit
def prepare_few(
    x,
    gain,
    shift,
    eps,
    records,
    floats,
    n_tokens,
    N_COLS: tl.constexpr,
    PADDED: tl.constexpr,
    NORM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x [n_tokens, N_COLS] -> `records` and `floats` [tokens, PADDED columns], either of which may be None.

    A program takes CHUNK records of a token, with a norm all of them. Tokens that do not exist repeat the last.
    """
    token = tl.program_id(0)
    unit = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[:, None, None, None]
    half, quarter = tl.arange(0, 2)[None, :, None, None], tl.arange(0, 2)[None, None, :, None]
    column = unit * COLS + half * 32 + quarter * 16 + tl.arange(0, 16)[None, None, None, :]
    at = tl.minimum(token, n_tokens - 1) * N_COLS + column
    v = normalise(tl.load(x + at, mask=column < N_COLS, other=0.0), column, gain, shift, eps, N_COLS, NORM)
    if floats is not None:
        tl.store(floats + token * PADDED + column, v, mask=column < PADDED)
    if records is not None:
        top = tl.maximum(tl.max(tl.max(tl.abs(v), 3, keep_dims=True), 2, keep_dims=True), TINY)
        rounded = v * (LIMIT / top) + ROUND
        codes = rounded.to(tl.int32, bitcast=True) - ROUND_BITS
        sums = tl.sum(codes, 3, keep_dims=True)
        unsound = tl.sum(tl.sum(v * 0.0, 3, keep_dims=True), 2, keep_dims=True)  # NaN when a value is not finite
        scale = top / LIMIT + unsound
        inside = unit < PADDED // COLS
        record = records + (token * (PADDED // COLS) + unit) * RECORD
        bytes_at = record.to(tl.pointer_type(tl.int8)) + half * 32 + quarter * 16
        tl.store(bytes_at + tl.arange(0, 16)[None, None, None, :], codes.to(tl.int8), mask=inside)
        scales_at = record.to(tl.pointer_type(tl.float32)) + 16 + half
        tl.store(scales_at, scale, mask=inside)
        tl.store(scales_at + 2, scale * tl.sum(sums, 2, keep_dims=True).to(tl.float32), mask=inside)
        tl.store(record + 20 + half * 2 + quarter, sums * -32, mask=inside)
