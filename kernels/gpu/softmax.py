"""The step that all attention kernels share: a softmax taken over scores that arrive a tile at a time.

Formulas: Milakov and Gimelshein, arXiv 1805.02867; for attention, Dao et al., arXiv 2205.14135. Scores are in units of
log2(e), so that the exponential is a power of two, which the hardware has.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # the score of a hidden key. Not -inf: the difference of two infinities is no number


def score_scale(d_head: int) -> float:
    """What queries are multiplied by: 1/sqrt(d_head), in units of log2(e)."""
    return math.log2(math.e) / math.sqrt(d_head)


@triton.jit
def multiply(a, b):
    """a times b on the tensor cores, summed in float32: halves as they are, float32 in three parts."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def attend_tile(q, k, v, visible, peak, total, mixed):
    """Attention over one more tile of keys k and values v [n_keys, d] for the queries q [n_rows, d].

    visible [n_rows, n_keys]; peak, total [n_rows] and mixed [n_rows, d], all float32, are what was seen so far: the
    highest score, the sum of 2^(score - peak), and the values weighted by these. Returns the three anew.

    A row that has only hidden keys so far weighs them by one; the first visible key sets its past to zero.
    """
    scores = tl.where(visible, multiply(q, tl.trans(k)), HIDDEN)
    higher = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2(peak - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None] + multiply(weights.to(v.dtype), v)
    return higher, total, mixed
