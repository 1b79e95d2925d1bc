"""Weights times a few tokens (1 to 8): every weight is read once, decoded in registers, and meets all tokens.

A program takes ROWS rows, PIECES pieces of each at a time (see `tiles.py`). A thread sums what its own pieces give, and
scales the sum of a run rather than each weight of it:

    sum((scale * code - minimum) * x) = scale * sum(code * x) - minimum * sum(x)

Threads are added up once, at the end, in an order that is always the same, so equal inputs give equal bits.

Fused before the product: RMSNorm or LayerNorm of x. Fused after it: bias, GELU, residual, the SiLU gate, and the
largest output of a program's rows. Up to three weights share a launch, each of its own type. Sums are float32, as x is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import PIECES_FIRST, VECTOR, by_piece, by_row

STATISTICS: tl.constexpr = tl.constexpr(1024)  # columns that a program looks at at once, for LayerNorm


@triton.jit
def zeros(TOKENS: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr):
    """A tile of zeros for each token."""
    tiles = ()
    for _ in tl.static_range(TOKENS):
        if PIECES_FIRST:
            tile = tl.zeros((PIECES, ROWS, WORDS), tl.float32)
        else:
            tile = tl.zeros((ROWS, PIECES, WORDS), tl.float32)
        tiles += (tile,)
    return tiles


@triton.jit
def sum_rows(tile):
    """The sums of the rows of a tile: [ROWS]."""
    return tl.sum(tl.sum(tile, 2), 0) if PIECES_FIRST else tl.sum(tl.sum(tile, 2), 1)


@triton.jit
def moments(x, eps, N_COLS: tl.constexpr):
    """Mean, and one over the standard deviation, of a token: in two passes, since a mean can be large."""
    column = tl.arange(0, STATISTICS)
    total = tl.zeros((STATISTICS,), tl.float32)
    for first in range(0, N_COLS, STATISTICS):
        total += tl.load(x + first + column, mask=first + column < N_COLS, other=0.0)
    mean = tl.sum(total, 0) / N_COLS
    squares = tl.zeros((STATISTICS,), tl.float32)
    for first in range(0, N_COLS, STATISTICS):
        inside = first + column < N_COLS
        d = tl.where(inside, tl.load(x + first + column, mask=inside, other=0.0) - mean, 0.0)
        squares += d * d
    return mean, tl.rsqrt(tl.sum(squares, 0) / N_COLS + eps)


@triton.jit
def all_moments(x, eps, N_COLS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr):
    """(mean, 1 / deviation) of each token, where the norm needs them before the product."""
    means, factors = (), ()
    for t in tl.static_range(TOKENS):
        if NORM == "layer":
            mean, factor = moments(x + t * N_COLS, eps, N_COLS)
        else:
            mean, factor = 0.0, 1.0
        means += (mean,)
        factors += (factor,)
    return means, factors


@triton.jit
def load_columns(vector, column, N_COLS: tl.constexpr, SHAPE: tl.constexpr, EVEN: tl.constexpr):
    """What a vector of N_COLS numbers has for each of the codes of a piece: tensors [1, PIECES, 4], in their order.

    Small tensors, so that Triton has every thread load what it needs instead of passing it around.
    """
    RUNS: tl.constexpr = SHAPE.runs
    PER_WORD: tl.constexpr = SHAPE.per_word
    values = ()
    for r in tl.static_range(RUNS):
        for e in tl.static_range(PER_WORD):
            at = column + (r * SHAPE.next_run + e)
            values += (tl.load(vector + at) if EVEN else tl.load(vector + at, mask=at < N_COLS, other=0.0),)
    return values


@triton.jit
def dot_piece(codes, scales, minima, values, SHAPE: tl.constexpr):
    """The products of pieces and one token: [ROWS, PIECES, 1]."""
    RUNS: tl.constexpr = SHAPE.runs
    PER_WORD: tl.constexpr = SHAPE.per_word
    total = 0.0
    for r in tl.static_range(RUNS):
        plain = values[r * PER_WORD]
        dot = codes[r * PER_WORD] * (plain * 2.0 ** (0 - SHAPE.run_shift * r))
        for e in tl.static_range(1, PER_WORD):
            v = values[r * PER_WORD + e]
            dot += codes[r * PER_WORD + e] * (v * 2.0 ** (0 - SHAPE.code_shift * e - SHAPE.run_shift * r))
            plain += v
        total += dot * scales[r] if len(scales) > 0 else dot
        if len(minima) > 0:
            total -= plain * minima[r]
    return tl.sum(total, 2, keep_dims=True)


@triton.jit
def normalise(values, gains, shifts, mean, factor, NORM: tl.constexpr, N: tl.constexpr):
    """The N values of a token after the norm; RMSNorm's factor comes later. Also the sum of their squares before it."""
    results = ()
    squares = 0.0
    for i in tl.static_range(N):
        v = values[i]
        if NORM == "rms":
            squares += v * v
            v = v * gains[i]
        if NORM == "layer":
            v = (v - mean) * factor * gains[i] + shifts[i]
        results += (v,)
    return results, squares


@triton.jit
def products(
    x,
    gain,
    shift,
    eps,
    w,
    first_row,
    n_rows,
    DECODE: tl.constexpr,
    SHAPE: tl.constexpr,
    N_COLS: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """A matrix's rows from `first_row` on, times all tokens: a float32 [ROWS] for each token.

    Rows that the matrix does not have repeat its last. RMSNorm costs no pass of its own: its root only scales the
    result, so the squares are summed up on the way.
    """
    WEIGHTS: tl.constexpr = SHAPE.weights
    STRIDE: tl.constexpr = SHAPE.stride
    PLANES: tl.constexpr = SHAPE.planes
    N: tl.constexpr = SHAPE.runs * SHAPE.per_word
    N_PIECES: tl.constexpr = (N_COLS + WEIGHTS - 1) // WEIGHTS
    EVEN: tl.constexpr = N_COLS % (WEIGHTS * PIECES) == 0
    means, factors = all_moments(x, eps, N_COLS, TOKENS, NORM)
    row = tl.minimum(first_row + tl.arange(0, ROWS), n_rows - 1)
    words = w + by_row(row * STRIDE)
    word = tl.arange(0, VECTOR)[None, None, :]
    sums = zeros(TOKENS, ROWS, PIECES, 1)
    squares = zeros(TOKENS, 1, PIECES, VECTOR)
    for first in range(0, N_PIECES, PIECES):
        piece = first + by_piece(tl.arange(0, PIECES))
        column = piece // 2 * (2 * WEIGHTS) + piece % 2 * SHAPE.next_piece + SHAPE.per_word * word
        codes, scales, minima = DECODE(words, piece if EVEN else tl.minimum(piece, N_PIECES - 1), PLANES)
        gains, shifts = (), ()
        if NORM != "none":
            gains = load_columns(gain, column, N_COLS, SHAPE, EVEN)
        if NORM == "layer":
            shifts = load_columns(shift, column, N_COLS, SHAPE, EVEN)
        new_sums, new_squares = (), ()
        for t in tl.static_range(TOKENS):
            values = load_columns(x + t * N_COLS, column, N_COLS, SHAPE, EVEN)
            values, more = normalise(values, gains, shifts, means[t], factors[t], NORM, N)
            new_sums += (sums[t] + dot_piece(codes, scales, minima, values, SHAPE),)
            new_squares += (squares[t] + more,)
        sums, squares = new_sums, new_squares
    results = ()
    for t in tl.static_range(TOKENS):
        y = sum_rows(sums[t])
        if NORM == "rms":
            y = y * tl.rsqrt(tl.sum(sum_rows(squares[t]), 0) / N_COLS + eps)
        results += (y,)
    return results


@triton.jit
def finish(
    sums,
    bias,
    residual,
    out,
    best_value,
    best_index,
    program,
    first_row,
    n_rows,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What follows a product: bias, GELU, residual; stores rows, or the largest of them, of which equals the first."""
    row = first_row + tl.arange(0, ROWS)
    inside = row < n_rows
    for t in tl.static_range(TOKENS):
        y = sums[t]
        if bias is not None:
            y += tl.load(bias + row, mask=inside, other=0.0)
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        if residual is not None:
            y += tl.load(residual + t * n_rows + row, mask=inside, other=0.0)
        if out is not None:
            tl.store(out + t * n_rows + row, y, mask=inside)
        if best_value is not None:
            ranked = tl.where(y == y, y, float("inf"))  # a maximum leaves NaN out, and infinity is no token either
            ranked = tl.where(inside, ranked, float("-inf"))
            tl.store(best_value + program * TOKENS + t, tl.max(ranked, 0))
            tl.store(best_index + program * TOKENS + t, first_row + tl.argmax(ranked, 0))


@triton.jit
def matvec(
    x,
    gain,
    shift,
    eps,
    w,
    bias,
    residual,
    out,
    best_value,
    best_index,
    n_rows,
    DECODE: tl.constexpr,
    SHAPE: tl.constexpr,
    N_COLS: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """out [TOKENS, n_rows] = x [TOKENS, N_COLS] times w [n_rows, N_COLS] transposed, and what is fused around it."""
    program = tl.program_id(0)
    first = program * ROWS
    sums = products(x, gain, shift, eps, w, first, n_rows, DECODE, SHAPE, N_COLS, NORM, TOKENS, ROWS, PIECES)
    finish(sums, bias, residual, out, best_value, best_index, program, first, n_rows, GELU, TOKENS, ROWS)


@triton.jit
def matvec_three(
    x,
    gain,
    shift,
    eps,
    w0,
    w1,
    w2,
    bias0,
    bias1,
    bias2,
    out0,
    out1,
    out2,
    n0,
    n1,
    n2,
    DECODE0: tl.constexpr,
    DECODE1: tl.constexpr,
    DECODE2: tl.constexpr,
    SHAPE0: tl.constexpr,
    SHAPE1: tl.constexpr,
    SHAPE2: tl.constexpr,
    N_COLS: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES0: tl.constexpr,
    PIECES1: tl.constexpr,
    PIECES2: tl.constexpr,
):
    """Three matrices and one x: the number of the program says which one it works on. The third may be None."""
    program = tl.program_id(0)
    programs0, programs1 = tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    if program < programs0:
        first = program * ROWS
        sums = products(x, gain, shift, eps, w0, first, n0, DECODE0, SHAPE0, N_COLS, NORM, TOKENS, ROWS, PIECES0)
        finish(sums, bias0, None, out0, None, None, program, first, n0, False, TOKENS, ROWS)
    elif program < programs0 + programs1:
        first = (program - programs0) * ROWS
        sums = products(x, gain, shift, eps, w1, first, n1, DECODE1, SHAPE1, N_COLS, NORM, TOKENS, ROWS, PIECES1)
        finish(sums, bias1, None, out1, None, None, program, first, n1, False, TOKENS, ROWS)
    elif w2 is not None:
        first = (program - programs0 - programs1) * ROWS
        sums = products(x, gain, shift, eps, w2, first, n2, DECODE2, SHAPE2, N_COLS, NORM, TOKENS, ROWS, PIECES2)
        finish(sums, bias2, None, out2, None, None, program, first, n2, False, TOKENS, ROWS)


@triton.jit
def matvec_gated(
    x,
    gain,
    shift,
    eps,
    gate,
    up,
    out,
    n_rows,
    DECODE0: tl.constexpr,
    DECODE1: tl.constexpr,
    SHAPE0: tl.constexpr,
    SHAPE1: tl.constexpr,
    N_COLS: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES0: tl.constexpr,
    PIECES1: tl.constexpr,
):
    """out = silu(x gate^T) * (x up^T): the inner half of SwiGLU."""
    first = tl.program_id(0) * ROWS
    gates = products(x, gain, shift, eps, gate, first, n_rows, DECODE0, SHAPE0, N_COLS, NORM, TOKENS, ROWS, PIECES0)
    ups = products(x, gain, shift, eps, up, first, n_rows, DECODE1, SHAPE1, N_COLS, NORM, TOKENS, ROWS, PIECES1)
    row = first + tl.arange(0, ROWS)
    for t in tl.static_range(TOKENS):
        y = gates[t] / (1.0 + tl.exp(-gates[t])) * ups[t]
        tl.store(out + t * n_rows + row, y, mask=row < n_rows)
