"""Weights times many tokens, on tensor cores: a tile of weights is decoded to f16 and meets a tile of tokens.

`prepare` comes first: it norms each token, and keeps it as f16 beside a power of two by which it was divided, so that
no value overflows (a residual stream has channels beyond 65504) and none loses more than f16 takes. Each run of columns
of a tile (see `tiles.py`) is one product, so what lies interleaved in memory need not be put in order. Sums are
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import PIECES_FIRST, VECTOR, by_piece, by_row

# The largest value of a token is brought to 2^14 .. 2^15, as f16 ends at 2^16. In a float32, 2^n is n + 127 << 23.
LARGEST: tl.constexpr = tl.constexpr(14)
INVERSE: tl.constexpr = tl.constexpr(127 + 127 + 14)  # minus the exponent of 2^n: that of 2^(14 - n)


@triton.jit
def prepare(
    x,
    gain,
    shift,
    eps,
    halves,
    factors,
    N_COLS: tl.constexpr,
    PITCH: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a program: x [n_tokens, N_COLS] -> halves f16 [n_tokens, PITCH] times factors [n_tokens].

    `BLOCK`: a power of two that no row exceeds; columns from N_COLS to PITCH become zero.
    """
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < N_COLS
    v = tl.load(x + token * N_COLS + column, mask=inside, other=0.0)
    if NORM == "layer":
        v = tl.where(inside, v - tl.sum(v, 0) / N_COLS, 0.0)
    if NORM != "none":
        v = v * tl.rsqrt(tl.sum(v * v, 0) / N_COLS + eps) * tl.load(gain + column, mask=inside, other=0.0)
    if NORM == "layer":
        v += tl.load(shift + column, mask=inside, other=0.0)
    largest = tl.max(tl.abs(v), 0)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, LARGEST + 1)
    power = (exponent - LARGEST) << 23
    inverse = -(exponent - INVERSE) << 23
    halves_at = halves + token * PITCH + column
    tl.store(halves_at, (v * inverse.to(tl.float32, bitcast=True)).to(tl.float16), mask=column < PITCH)
    tl.store(factors + token, power.to(tl.float32, bitcast=True))


@triton.jit
def decode_run(codes, scales, minima, r: tl.constexpr, SHAPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The weights of run r of a tile, in the order of their columns: f16 [ROWS, COLS]."""
    PER_WORD: tl.constexpr = SHAPE.per_word
    weights = ()
    for e in tl.static_range(PER_WORD):
        weight = codes[r * PER_WORD + e]
        if len(scales) > 0:
            weight = weight * (scales[r] * 2.0 ** (0 - SHAPE.code_shift * e - SHAPE.run_shift * r))
        if len(minima) > 0:
            weight = weight - minima[r]
        weight = weight.to(tl.float16)
        weights += (tl.permute(weight, (1, 0, 2)) if PIECES_FIRST else weight,)
    if PER_WORD == 4:
        joined = tl.join(tl.join(weights[0], weights[2]), tl.join(weights[1], weights[3]))
    elif PER_WORD == 2:
        joined = tl.join(weights[0], weights[1])
    else:
        joined = weights[0]
    return tl.reshape(joined, (ROWS, COLS))


@triton.jit
def tile_products(
    halves,
    w,
    row,
    token,
    n_rows,
    n_tokens,
    DECODE: tl.constexpr,
    SHAPE: tl.constexpr,
    N_COLS: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Rows of a matrix times tokens: float32 [ROWS, TOKENS]. Rows and tokens that do not exist repeat the last."""
    RUNS: tl.constexpr = SHAPE.runs
    WEIGHTS: tl.constexpr = SHAPE.weights
    PLANES: tl.constexpr = SHAPE.planes
    STRIDE: tl.constexpr = SHAPE.stride
    RUN: tl.constexpr = SHAPE.per_word * VECTOR
    N_PIECES: tl.constexpr = (N_COLS + WEIGHTS - 1) // WEIGHTS
    EVEN: tl.constexpr = N_COLS % (WEIGHTS * PIECES) == 0
    words = w + by_row(tl.minimum(row, n_rows - 1) * STRIDE)
    tokens = halves + (tl.minimum(token, n_tokens - 1) * PITCH)[None, :]
    inner = tl.arange(0, PIECES * RUN)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, N_PIECES, PIECES):
        piece = first + by_piece(tl.arange(0, PIECES))
        codes, scales, minima = DECODE(words, piece if EVEN else tl.minimum(piece, N_PIECES - 1), PLANES)
        p = first + inner // RUN
        column = p // 2 * (2 * WEIGHTS) + p % 2 * SHAPE.next_piece + inner % RUN
        for r in tl.static_range(RUNS):
            at = (column + r * SHAPE.next_run)[:, None]
            x = tl.load(tokens + at) if EVEN else tl.load(tokens + at, mask=at < PITCH, other=0.0)
            weights = decode_run(codes, scales, minima, r, SHAPE, ROWS, PIECES * RUN)
            sums = tl.dot(weights, x, sums)
    return sums


@triton.jit(do_not_specialize=["n_tokens"])
def matmul(
    halves,
    factors,
    w,
    up,
    bias,
    residual,
    out,
    n_rows,
    n_tokens,
    DECODE: tl.constexpr,
    DECODE_UP: tl.constexpr,
    SHAPE: tl.constexpr,
    SHAPE_UP: tl.constexpr,
    N_COLS: tl.constexpr,
    PITCH: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_UP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out [n_tokens, n_rows] = prepared tokens times w [n_rows, N_COLS] transposed, and what is fused after it.

    With `up`, a second matrix: silu(x w^T) * (x up^T). Programs that share rows follow each other, so that weights come
    from the L2 for all but the first.
    """
    tiles = tl.cdiv(n_tokens, TOKENS)
    program = tl.program_id(0)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    token = program % tiles * TOKENS + tl.arange(0, TOKENS)
    y = tile_products(halves, w, row, token, n_rows, n_tokens, DECODE, SHAPE, N_COLS, PITCH, ROWS, PIECES, TOKENS)
    column = token[None, :]
    inside = (row < n_rows)[:, None] & (column < n_tokens)
    factor = tl.load(factors + column, mask=column < n_tokens, other=0.0)
    y = y * factor
    if up is not None:
        ups = tile_products(
            halves, up, row, token, n_rows, n_tokens, DECODE_UP, SHAPE_UP, N_COLS, PITCH, ROWS, PIECES_UP, TOKENS
        )
        y = y / (1.0 + tl.exp(-y)) * (ups * factor)
    if bias is not None:
        y += tl.load(bias + row, mask=row < n_rows, other=0.0)[:, None]
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    at = column * n_rows + row[:, None]
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(out + at, y, mask=inside)
