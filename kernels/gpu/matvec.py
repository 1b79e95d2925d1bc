"""Weights times a few tokens (1 to 16): every weight is read once, decoded in registers, and meets up to 8 tokens.

A program takes ROWS rows. LANES threads share a row, each takes a unit of it (see `units.py`) at a time, and a thread
may have several rows, which then meet tokens that are loaded once. Tokens come prepared (see `activations.py`), so that
nothing is loaded of them but 16 bytes at a time. Rounded to bytes, they are multiplied four at a time in integers; the
scale of a run of weights multiplies the sum of the run, and what a minimum multiplies is known already:

    sum((scale * code - minimum) * x) = scale * sum(code * x) - minimum * sum(x)

The lanes of a row are added up once, at the end. Which sums are made in which order depends on the matrix alone, and
products are joined to sums by `fma` where that is meant and nowhere else, so equal inputs give equal bits, whatever
other tokens are there.

Fused after the product: bias, GELU, residual, the SiLU gate, and the largest output of a program's rows. Up to three
weights share a launch, each of its own type. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import COLS, RECORD
from .vectors import add_dot, as_float, load_four


@triton.jit
def zeros(TOKENS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """A tile of zeros for each token."""
    tiles = ()
    for _ in tl.static_range(TOKENS):
        tiles += (tl.zeros((ROWS, LANES), tl.float32),)
    return tiles


@triton.jit
def add_rounded(total, codes, scales, minima, factor, record, UNIT: tl.constexpr):
    """total + the products of 64 weights of units [ROWS, LANES] and a token's records [1, LANES]."""
    SIGNED: tl.constexpr = UNIT.signed
    HALVES: tl.constexpr = UNIT.halves
    x_scales = load_four(record, 16)
    offsets = load_four(record, 20) if HALVES else (0, 0, 0, 0)
    part = total
    if HALVES:
        part = tl.zeros(total.shape, tl.float32)
    for g in tl.static_range(2):
        x = load_four(record, 8 * g) + load_four(record, 8 * g + 4)
        dots = ()
        for h in tl.static_range(2):
            dot = offsets[2 * g + h].to(tl.int32, bitcast=True) if HALVES else dots[0] if h > 0 else 0
            for i in tl.static_range(4):
                dot = add_dot(dot, codes[g * 8 + h * 4 + i], x[4 * h + i], SIGNED)
            dots += (dot,)
        if HALVES:
            dot = dots[0] * scales[2 * g] + dots[1] * scales[2 * g + 1]
            part = tl.fma(dot.to(tl.float32), as_float(x_scales[g]), part)
        else:
            part = tl.fma(dots[1].to(tl.float32) * as_float(x_scales[g]), scales[g], part)
            if len(minima) > 0:
                part = tl.fma(as_float(x_scales[2 + g]), -minima[g], part)
    return tl.fma(part, factor, total) if HALVES else part


@triton.jit
def float_codes(words, N: tl.constexpr, UNIT: tl.constexpr):
    """The four codes of word N, or four plain numbers, as float32."""
    CODED: tl.constexpr = UNIT.coded
    SIGNED: tl.constexpr = UNIT.signed
    values = ()
    for e in tl.static_range(4):
        if not CODED:
            value = words[4 * N + e]
        elif SIGNED:
            value = ((words[N].to(tl.int32, bitcast=True) << (24 - 8 * e)) >> 24).to(tl.float32)
        else:
            value = ((words[N] >> (8 * e)) & 255).to(tl.float32)
        values += (value,)
    return values


@triton.jit
def add_floats(total, codes, scales, minima, factor, x, UNIT: tl.constexpr):
    """As `add_rounded`, with a token's columns as they are."""
    HALVES: tl.constexpr = UNIT.halves
    WEIGHTS: tl.constexpr = UNIT.weights
    RUN: tl.constexpr = 64 // len(scales) if len(scales) > 0 else WEIGHTS
    for r in tl.static_range(max(1, len(scales))):
        dot, plain = 0.0, 0.0
        for i in tl.static_range(RUN // 4):
            values = load_four(x, r * RUN + 4 * i)
            numbers = float_codes(codes, r * (RUN // 4) + i, UNIT)
            for e in tl.static_range(4):
                dot = tl.fma(numbers[e], as_float(values[e]), dot)
                plain += as_float(values[e])
        if HALVES:
            scale = scales[r].to(tl.float32) * factor
            total = tl.fma(plain, scale * -32.0, tl.fma(dot, scale, total))
        elif len(scales) > 0:
            total = tl.fma(dot, scales[r], total)
            if len(minima) > 0:
                total = tl.fma(plain, -minima[r], total)
        else:
            total += dot
    return total


@triton.jit
def products(
    x,
    w,
    first_row,
    n_rows,
    LOAD: tl.constexpr,
    DECODE: tl.constexpr,
    UNIT: tl.constexpr,
    N_COLS: tl.constexpr,
    PITCH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A matrix's rows from `first_row` on, times all tokens: a float32 [ROWS] for each token.

    Rows that the matrix does not have repeat its last. `AHEAD`: units that a thread has in flight.
    """
    WEIGHTS: tl.constexpr = UNIT.weights
    STRIDE: tl.constexpr = UNIT.stride
    PLANES: tl.constexpr = UNIT.planes
    ROUNDED: tl.constexpr = UNIT.rounded
    RECORDS: tl.constexpr = max(1, WEIGHTS // COLS)
    WORDS: tl.constexpr = RECORD if ROUNDED else min(WEIGHTS, COLS)  # of a token, for each of them
    N_UNITS: tl.constexpr = (N_COLS + WEIGHTS - 1) // WEIGHTS
    STEPS: tl.constexpr = (N_UNITS + LANES - 1) // LANES
    EVEN: tl.constexpr = N_UNITS % LANES == 0
    rows = w + (tl.minimum(first_row + tl.arange(0, ROWS), n_rows - 1) * STRIDE)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    sums = zeros(TOKENS, ROWS, LANES)
    for first in range(0, STEPS, AHEAD):
        loaded = ()
        for step in tl.static_range(AHEAD):
            unit = lane + (first + step) * LANES
            loaded += (LOAD(rows, unit if EVEN else tl.minimum(unit, N_UNITS - 1), PLANES, N_COLS),)
        if AHEAD > 1 or TOKENS == 1:
            tl.debug_barrier()  # else the compiler of machine code brings loads back to where they are needed
        for step in tl.static_range(AHEAD):
            unit = lane + (first + step) * LANES
            at = x + (unit if EVEN else tl.minimum(unit, N_UNITS)) * (RECORDS * WORDS)
            for r in tl.static_range(RECORDS):
                codes, scales, minima, factor = DECODE(loaded[step], unit, r)
                new_sums = ()
                for t in tl.static_range(TOKENS):
                    place = at + (t * PITCH + r * WORDS)
                    if ROUNDED:
                        total = add_rounded(sums[t], codes, scales, minima, factor, place, UNIT)
                    else:
                        total = add_floats(sums[t], codes, scales, minima, factor, place, UNIT)
                    new_sums += (total,)
                sums = new_sums
    results = ()
    for t in tl.static_range(TOKENS):
        results += (tl.sum(sums[t], 1),)
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
    first_token,
    n_tokens,
    first_row,
    n_rows,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What follows a product: bias, GELU, residual; stores rows, or the largest of them, of which equals the first."""
    row = first_row + tl.arange(0, ROWS)
    for t in tl.static_range(TOKENS):
        token = first_token + t
        inside = row < tl.where(token < n_tokens, n_rows, 0)
        y = sums[t]
        if bias is not None:
            y += tl.load(bias + row, mask=inside, other=0.0)
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        if residual is not None:
            y += tl.load(residual + token * n_rows + row, mask=inside, other=0.0)
        if out is not None:
            tl.store(out + token * n_rows + row, y, mask=inside)
        if best_value is not None:
            ranked = tl.where(y == y, y, float("inf"))  # a maximum leaves NaN out, and infinity is no token either
            ranked = tl.where(row < n_rows, ranked, float("-inf"))
            at = program * n_tokens + token
            tl.store(best_value + at, tl.max(ranked, 0), mask=token < n_tokens)
            tl.store(best_index + at, first_row + tl.argmax(ranked, 0), mask=token < n_tokens)


@triton.jit(do_not_specialize=["n_tokens"])
def matvec(
    x,
    w,
    bias,
    residual,
    out,
    best_value,
    best_index,
    n_rows,
    n_tokens,
    LOAD: tl.constexpr,
    DECODE: tl.constexpr,
    UNIT: tl.constexpr,
    N_COLS: tl.constexpr,
    PITCH: tl.constexpr,
    GELU: tl.constexpr,
    PASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """out [n_tokens, n_rows] = prepared x times w [n_rows, N_COLS] transposed, and what is fused after it.

    Programs that share rows follow each other, so that weights come from the L2 for the second pass.
    """
    program, token = tl.program_id(0) // PASSES, tl.program_id(0) % PASSES * TOKENS
    first = program * ROWS
    x += token * PITCH
    sums = products(x, w, first, n_rows, LOAD, DECODE, UNIT, N_COLS, PITCH, TOKENS, ROWS, LANES, AHEAD)
    finish(
        sums, bias, residual, out, best_value, best_index, program, token, n_tokens, first, n_rows, GELU, TOKENS, ROWS
    )


@triton.jit(do_not_specialize=["n_tokens"])
def matvec_three(
    x0,
    x1,
    x2,
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
    n_tokens,
    LOAD0: tl.constexpr,
    DECODE0: tl.constexpr,
    LOAD1: tl.constexpr,
    DECODE1: tl.constexpr,
    LOAD2: tl.constexpr,
    DECODE2: tl.constexpr,
    UNIT0: tl.constexpr,
    UNIT1: tl.constexpr,
    UNIT2: tl.constexpr,
    N_COLS: tl.constexpr,
    PITCH0: tl.constexpr,
    PITCH1: tl.constexpr,
    PITCH2: tl.constexpr,
    PASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES0: tl.constexpr,
    LANES1: tl.constexpr,
    LANES2: tl.constexpr,
    AHEAD0: tl.constexpr,
    AHEAD1: tl.constexpr,
    AHEAD2: tl.constexpr,
):
    """Three matrices and one x: the number of the program says which one it works on. The third may be None."""
    program, token = tl.program_id(0) // PASSES, tl.program_id(0) % PASSES * TOKENS
    programs0, programs1 = tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    if program < programs0:
        first = program * ROWS
        x = x0 + token * PITCH0
        sums = products(x, w0, first, n0, LOAD0, DECODE0, UNIT0, N_COLS, PITCH0, TOKENS, ROWS, LANES0, AHEAD0)
        finish(sums, bias0, None, out0, None, None, program, token, n_tokens, first, n0, False, TOKENS, ROWS)
    elif program < programs0 + programs1:
        first = (program - programs0) * ROWS
        x = x1 + token * PITCH1
        sums = products(x, w1, first, n1, LOAD1, DECODE1, UNIT1, N_COLS, PITCH1, TOKENS, ROWS, LANES1, AHEAD1)
        finish(sums, bias1, None, out1, None, None, program, token, n_tokens, first, n1, False, TOKENS, ROWS)
    elif w2 is not None:
        first = (program - programs0 - programs1) * ROWS
        x = x2 + token * PITCH2
        sums = products(x, w2, first, n2, LOAD2, DECODE2, UNIT2, N_COLS, PITCH2, TOKENS, ROWS, LANES2, AHEAD2)
        finish(sums, bias2, None, out2, None, None, program, token, n_tokens, first, n2, False, TOKENS, ROWS)


@triton.jit(do_not_specialize=["n_tokens"])
def matvec_gated(
    x0,
    x1,
    gate,
    up,
    out,
    n_rows,
    n_tokens,
    LOAD0: tl.constexpr,
    DECODE0: tl.constexpr,
    LOAD1: tl.constexpr,
    DECODE1: tl.constexpr,
    UNIT0: tl.constexpr,
    UNIT1: tl.constexpr,
    N_COLS: tl.constexpr,
    PITCH0: tl.constexpr,
    PITCH1: tl.constexpr,
    PASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES0: tl.constexpr,
    LANES1: tl.constexpr,
    AHEAD0: tl.constexpr,
    AHEAD1: tl.constexpr,
):
    """out = silu(x gate^T) * (x up^T): the inner half of SwiGLU."""
    program, token = tl.program_id(0) // PASSES, tl.program_id(0) % PASSES * TOKENS
    first = program * ROWS
    x0 += token * PITCH0
    x1 += token * PITCH1
    gates = products(x0, gate, first, n_rows, LOAD0, DECODE0, UNIT0, N_COLS, PITCH0, TOKENS, ROWS, LANES0, AHEAD0)
    ups = products(x1, up, first, n_rows, LOAD1, DECODE1, UNIT1, N_COLS, PITCH1, TOKENS, ROWS, LANES1, AHEAD1)
    row = first + tl.arange(0, ROWS)
    for t in tl.static_range(TOKENS):
        y = gates[t] / (1.0 + tl.exp(-gates[t])) * ups[t]
        inside = row < tl.where(token + t < n_tokens, n_rows, 0)
        tl.store(out + (token + t) * n_rows + row, y, mask=inside)
