"""Decoding with weights that are plain numbers, F16 or BF16: a mat-vec in float32, straight on the file's bytes."""

from __future__ import annotations

from typing import Any

from numba import prange

from ..formats import BF16, F16, Format
from .emit import LANES
from .jit import specialise
from .simd import fma, lanes_float, load, load_bf16, load_half, prefetch, sum_lanes

AHEAD = 1024  # bytes: how far ahead of the work memory is asked for


def multiply(weight, x, n_tokens, out):
    """weight uint8 [n_out, 2 k], k a multiple of 32; x float32 [n_tokens * k], flat; out [n_tokens * n_out], flat."""
    n_out, row_bytes = weight.shape
    k = row_bytes // 2
    numbers = weight.reshape(-1)
    for row in prange(n_out):
        at = row * row_bytes
        for t in range(n_tokens):  # a row stays in the first-level cache
            even = odd = lanes_float(0.0)
            for i in range(0, k, 2 * LANES):
                prefetch(numbers, at + 2 * i + AHEAD)
                even = fma(read(numbers, at + 2 * i), load(x, t * k + i), even)
                odd = fma(read(numbers, at + 2 * i + 2 * LANES), load(x, t * k + i + LANES), odd)
            out[t * n_out + row] = sum_lanes(even + odd)


read = None  # given by `specialise`

MULTIPLE = 2 * LANES  # that a row's length must be of
KERNELS: dict[Format, Any] = {
    fmt: specialise(multiply, fmt.name, parallel=True, read=reader)
    for fmt, reader in ((F16, load_half), (BF16, load_bf16))
}
