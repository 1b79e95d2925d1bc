"""Functions of vectors of floats that no instruction computes.

Source of the exponential: the usual reduction to exp(r) 2^n with |r| <= ln(2) / 2, r in two parts (Cody and Waite), and
the Taylor polynomial of degree 7; its error there is below 6e-9, under the rounding of float32.
"""

from __future__ import annotations

from .jit import inline
from .simd import as_float, clamp, divide, fma, lanes, lanes_float, round_to_int, to_float

LOG2_E = 1.4426950408889634
LN_2_HIGH = -0.693359375  # few bits: its product with n is exact
LN_2_LOW = 2.12194440e-4
LEAST, MOST = -87.3, 88.3  # between these the power of two that is nearest is a normal float32


@inline
def exponential(x):
    """e^x of each lane; below -87.3 it is about 1e-38, above 88.3 about 2e38, of NaN NaN."""
    bounded = clamp(x, lanes_float(LEAST), lanes_float(MOST))
    n = round_to_int(bounded * lanes_float(LOG2_E))
    k = to_float(n)
    r = fma(k, lanes_float(LN_2_LOW), fma(k, lanes_float(LN_2_HIGH), bounded))
    y = fma(lanes_float(1 / 5040), r, lanes_float(1 / 720))
    y = fma(y, r, lanes_float(1 / 120))
    y = fma(y, r, lanes_float(1 / 24))
    y = fma(y, r, lanes_float(1 / 6))
    y = fma(y, r, lanes_float(0.5))
    y = fma(y, r, lanes_float(1.0))
    y = fma(y, r, lanes_float(1.0))
    return y * as_float((n + lanes(127)) << 23)


@inline
def silu(x):
    """x / (1 + e^-x) of each lane."""
    one = lanes_float(1.0)
    return divide(x, one + exponential(lanes_float(0.0) - x))
