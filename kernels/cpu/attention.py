"""Attention of a few new tokens over the KV cache: every key and every value is read once.

A thread takes a KV head with all query heads that share it. Scores of all slots, their softmax, then the weighted sum
of values, in blocks of slots that stay in the cache while the vector of each sixteen dimensions runs over them. Knows
how a cache keeps its rows only by the loader it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from ..formats import F16, F32, Q8_0, Format
from .emit import LANES
from .functions import exponential
from .jit import inline, kernel, specialise
from .simd import (
    fma,
    half_number,
    lane,
    lanes_float,
    load,
    load_half,
    load_signed,
    load_u16,
    max_lanes,
    maximum,
    prefetch,
    repeat_float,
    store,
    store_half,
    sum_four,
    sum_lanes,
    to_float,
)

SLOTS = 32  # whose values stay in the first-level cache
HEADS = 4  # query heads at a time
AHEAD = 8  # slots: how far ahead keys are asked for
LINE = 64  # bytes of a cache line

Q8_BYTES, Q8_QS = Q8_0.block_bytes, Q8_0.offset("qs")


@inline
def _load_f32(rows, at, i):
    return load(rows, at + 4 * i)


@inline
def _load_f16(rows, at, i):
    return load_half(rows, at + 2 * i)


@inline
def _load_q8_0(rows, at, i):
    block = at + i // 32 * Q8_BYTES
    scale = lanes_float(half_number(load_u16(rows, block)))
    return to_float(load_signed(rows, block + Q8_QS + i % 32)) * scale


@inline
def _score(load_row, q, query, d, last, keys, first, step, width, n_slots, scale, scores, to, stride):
    """Scores of heads 0 … last (at most four) for all slots."""
    q1, q2, q3 = query + min(1, last) * d, query + min(2, last) * d, query + min(3, last) * d
    for slot in range(n_slots):
        at = first + slot * step
        for line in range(0, width, LINE):
            prefetch(keys, at + AHEAD * step + line)
        s0 = lanes_float(0.0)
        s1, s2, s3 = s0, s0, s0
        for i in range(0, d, LANES):
            k = load_row(keys, at, i)
            s0, s1 = fma(k, load(q, query + i), s0), fma(k, load(q, q1 + i), s1)
            s2, s3 = fma(k, load(q, q2 + i), s2), fma(k, load(q, q3 + i), s3)
        four = sum_four(s0, s1, s2, s3)
        for h in range(last + 1):
            scores[to + h * stride + slot] = lane(four, h) * scale


@inline
def _soften(scores, at, n):
    """Scores to their exponentials, relative to the largest; gives the sum. The rest of the last vector is lost."""
    whole = (n + LANES - 1) // LANES * LANES
    for i in range(at + n, at + whole):
        scores[i] = -np.inf
    top = lanes_float(-np.inf)
    for i in range(at, at + whole, LANES):
        top = maximum(top, load(scores, i))
    most, total = lanes_float(max_lanes(top)), lanes_float(0.0)
    for i in range(at, at + whole, LANES):
        e = exponential(load(scores, i) - most)
        store(scores, i, e)
        total = total + e
    return sum_lanes(total)


@inline
def _mix(load_row, weights, at, stride, last, values, first, step, width, n_slots, d, out, to):
    """Adds the values of all slots, weighted, to the rows of heads 0 … last in `out`."""
    w1, w2, w3 = at + min(1, last) * stride, at + min(2, last) * stride, at + min(3, last) * stride
    for start in range(0, n_slots, SLOTS):
        stop = min(start + SLOTS, n_slots)
        for slot in range(start, stop):
            for line in range(0, width, LINE):
                prefetch(values, first + (slot + SLOTS) * step + line)
        for i in range(0, d, LANES):
            a = lanes_float(0.0)
            b, c, e = a, a, a
            for slot in range(start, stop):
                v = load_row(values, first + slot * step, i)
                a, b = fma(v, repeat_float(weights, at + slot), a), fma(v, repeat_float(weights, w1 + slot), b)
                c, e = fma(v, repeat_float(weights, w2 + slot), c), fma(v, repeat_float(weights, w3 + slot), e)
            _add(out, to + i, a)
            if last >= 1:
                _add(out, to + d + i, b)
            if last >= 2:
                _add(out, to + 2 * d + i, c)
            if last >= 3:
                _add(out, to + 3 * d + i, e)


@inline
def _add(out, i, vector):
    store(out, i, load(out, i) + vector)


def attend(q, n_head, d, keys, values, n_kv_head, width, positions, scale, scores, stride, out):
    """q, out float32 [n_tokens * n_head * d], flat; d a multiple of 16; keys, values uint8 [n_ctx * n_kv_head * width],
    flat: `width` bytes are the row of a head. Token t sees slots 0 .. positions[t]. scores float32 [n_head * stride],
    stride at least n_ctx and a multiple of 16."""
    group = n_head // n_kv_head
    step = n_kv_head * width
    for kv_head in prange(n_kv_head):
        first = kv_head * width
        for t in range(positions.shape[0]):
            n_slots = positions[t] + 1
            for h in range(kv_head * group, (kv_head + 1) * group, HEADS):
                last = min(HEADS, (kv_head + 1) * group - h) - 1
                query, at = (t * n_head + h) * d, h * stride
                _score(load_row, q, query, d, last, keys, first, step, width, n_slots, scale, scores, at, stride)
                for k in range(last + 1):
                    share = np.float32(1) / _soften(scores, at + k * stride, n_slots)
                    for slot in range(at + k * stride, at + k * stride + n_slots):
                        scores[slot] *= share
                out[query : query + (last + 1) * d] = 0
                _mix(load_row, scores, at, stride, last, values, first, step, width, n_slots, d, out, query)


@kernel()
def store_row(row, cache, at):
    """row float32 [n], n a multiple of 16, as F16 to the bytes of `cache` from `at` on."""
    for i in range(0, row.shape[0], LANES):
        store_half(cache, at + 2 * i, load(row, i))


load_row = None  # given by `specialise`

KERNELS: dict[Format, Any] = {
    fmt: specialise(attend, fmt.name, parallel=True, load_row=loader)
    for fmt, loader in ((F32, _load_f32), (F16, _load_f16), (Q8_0, _load_q8_0))
}
