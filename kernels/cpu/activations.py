"""Activations as the int8 kernels take them: signed bytes, with a scale and a sum (for the minima) for each 16 or 32.

    x[i] ~ scale[i // 16] * code[i],  codes -127 .. 127

In two layouts: whole rows for the mat-vec, and groups of all tokens side by side for the mat-mat. A value that is not
finite makes its scale NaN, so that it is seen in every result. Knows no weights.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .jit import inline, kernel
from .simd import (
    absolute,
    lanes_float,
    load,
    max_lanes,
    round_to_int,
    store_narrow,
    sum_ints,
    sum_lanes,
)
from .tiles import GROUP, place

LIMIT = np.float32(127)


@inline
def _encode(x, i, codes, at, fine):
    """32 values to 32 codes; gives the scale of each half (if not `fine` they share one) and the sums of its codes."""
    a, b = load(x, i), load(x, i + 16)
    top_a, top_b = max_lanes(absolute(a)), max_lanes(absolute(b))
    if not fine:
        top_a = top_b = max(top_a, top_b)
    scale_a, scale_b = top_a / LIMIT, top_b / LIMIT
    low, high = round_to_int(a * _inverse(scale_a)), round_to_int(b * _inverse(scale_b))
    store_narrow(codes, at, low)
    store_narrow(codes, at + 16, high)
    unsound = sum_lanes((a + b) * lanes_float(np.float32(0)))  # NaN when a value is not finite, else 0
    return scale_a + unsound, scale_b + unsound, sum_ints(low), sum_ints(high)


@inline
def _inverse(scale):
    return lanes_float(np.float32(1) / scale if scale > 0 else np.float32(0))


@kernel()
def encode_rows(x, codes, scales, sums):
    """x float32 [n, k] to codes uint8 [n, k] in the order of tiles, scales and sums float32 [n, k / 16]."""
    n_tokens, k = x.shape
    for t in range(n_tokens):
        row, row_scales, row_sums, row_codes = x[t], scales[t], sums[t], codes[t]
        for g in range(k // GROUP):
            a, b, low, high = _encode(row, g * GROUP, row_codes, place(g) * GROUP, True)
            row_scales[2 * g], row_scales[2 * g + 1] = a, b
            row_sums[2 * g], row_sums[2 * g + 1] = a * np.float32(low), b * np.float32(high)


@kernel(parallel=True)
def encode_groups(x, fine, codes, scales, sums, half_scales, code_sums):
    """x float32 [n, k] to codes uint8 [k / 32, m, 32], scales and sums float32 [k / 32, m], half_scales float32 and
    code_sums int32 (without their scale) [k / 16, m], all in the order of tiles. Tokens n .. m - 1 become zero. `fine`:
    a scale for each 16; then `scales` and `sums` mean nothing."""
    n_tokens, k = x.shape
    for t in prange(scales.shape[1]):
        for g in range(k // GROUP):
            p = place(g)
            a = b = np.float32(0)
            low = high = np.int32(0)
            if t < n_tokens:
                a, b, low, high = _encode(x[t], g * GROUP, codes[p, t], 0, fine)
            else:
                codes[p, t] = 0
            scales[p, t] = a
            half_scales[2 * p, t], half_scales[2 * p + 1, t] = a, b
            code_sums[2 * p, t], code_sums[2 * p + 1, t] = low, high
            sums[p, t] = a * np.float32(low + high)
