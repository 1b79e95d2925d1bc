"""What happens to rows between the matrices: RMSNorm, rotary positions, the gate of SwiGLU.

Formulas: `engine/backends/reference.py`. Rows whose length is no multiple of sixteen end in plain loops.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from .emit import LANES
from .functions import silu
from .jit import inline, specialise
from .simd import fma, lanes_float, load, store, sum_lanes


@inline
def _sum_squares(x, at, d):
    whole = d // LANES * LANES
    total = lanes_float(0.0)
    for i in range(0, whole, LANES):
        v = load(x, at + i)
        total = fma(v, v, total)
    rest = np.float32(0)
    for i in range(whole, d):
        rest += x[at + i] * x[at + i]
    return sum_lanes(total) + rest


@inline
def _normalise(x, at, d, weight, eps, out):
    """out = x / sqrt(mean(x^2) + eps) * weight, for the row of length d from `at` on."""
    factor = np.float32(1) / np.float32(math.sqrt(_sum_squares(x, at, d) / np.float32(d) + eps))
    whole, factors = d // LANES * LANES, lanes_float(factor)
    for i in range(0, whole, LANES):
        store(out, at + i, load(x, at + i) * factors * load(weight, i))
    for i in range(whole, d):
        out[at + i] = x[at + i] * factor * weight[i]


def rms_norm(x, weight, eps, out):
    """x, out float32 [n * d], flat; weight [d]."""
    d = weight.shape[0]
    for row in prange(x.shape[0] // d):
        _normalise(x, row * d, d, weight, eps, out)


def add_rms_norm(a, b, weight, eps, total, out):
    """total = a + b and its norm; all float32 [n * d], flat; weight [d]."""
    d = weight.shape[0]
    for row in prange(a.shape[0] // d):
        whole = row * d + d // LANES * LANES
        for i in range(row * d, whole, LANES):
            store(total, i, load(a, i) + load(b, i))
        for i in range(whole, row * d + d):
            total[i] = a[i] + b[i]
        _normalise(total, row * d, d, weight, eps, out)


def norm_rope(x, weight, eps, positions, frequencies, n_head, out):
    """RMSNorm of each head, then rotary positions. x, out float32 [n_tokens * n_head * d_head], flat; weight [d_head];
    frequencies float32 [d_head / 2]."""
    d = weight.shape[0]
    half = d // 2
    for t in prange(positions.shape[0]):
        position = np.float32(positions[t])
        for head in range(n_head):
            at = (t * n_head + head) * d
            _normalise(x, at, d, weight, eps, out)
        for i in range(half):
            angle = position * frequencies[i]
            cos, sin = math.cos(angle), math.sin(angle)
            for head in range(n_head):
                at = (t * n_head + head) * d + i
                a, b = out[at], out[at + half]
                out[at], out[at + half] = a * cos - b * sin, b * cos + a * sin


def gate(gates, first, stride, ups, n_tokens, n_cols):
    """gates[t, first + i] = silu(gates[t, first + i]) * ups[t, i]; gates has rows of `stride`, ups of n_cols (flat)."""
    whole = n_cols // LANES * LANES
    for t in prange(n_tokens):
        a, b = t * stride + first, t * n_cols
        for i in range(0, whole, LANES):
            store(gates, a + i, silu(load(gates, a + i)) * load(ups, b + i))
        for i in range(whole, n_cols):
            x = gates[a + i]
            gates[a + i] = x / (np.float32(1) + math.exp(-x)) * ups[b + i]


# Each for a few rows and for many: starting the threads costs more than some rows do.
RMS_NORM, ADD_RMS_NORM, NORM_ROPE, GATE = (
    {parallel: specialise(f, "many" if parallel else "few", parallel=parallel) for parallel in (False, True)}
    for f in (rms_norm, add_rms_norm, norm_rope, gate)
)
