"""Decoding: a weight matrix times one to eight tokens, straight on the bytes of the file, each read once.

The loop runs along a row: a tile of 256 weights is decoded in registers and multiplied with every token. Knows no
type: the tile decoder is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import prange

from ..formats import Format
from .jit import inline, specialise
from .simd import (
    dot4,
    dot4_wide,
    fma,
    lanes,
    lanes_float,
    load,
    load_bytes,
    prefetch,
    spread_0,
    spread_2,
    spread_8,
    spread_10,
    store,
    sum_lanes,
    to_float,
)
from .tiles import TILE, TILES, Tile

MAX_TOKENS = 8
ROWS = 16  # that a thread takes at a time
AHEAD = 2048  # bytes: how far ahead of the work memory is asked for
LINE = 64  # bytes of a cache line


@inline
def _products(dot, c0, c1, c2, c3, weight_scales, codes, at, scales, i):
    """A decoded tile times one token: two vectors whose lanes add up to it, but for the minima."""
    factors = weight_scales * load(scales, i)
    zero = lanes(0)
    p0 = to_float(dot(zero, c0, load_bytes(codes, at))) * spread_0(factors)
    p1 = to_float(dot(zero, c1, load_bytes(codes, at + 64))) * spread_2(factors)
    p0 = fma(to_float(dot(zero, c2, load_bytes(codes, at + 128))), spread_8(factors), p0)
    p1 = fma(to_float(dot(zero, c3, load_bytes(codes, at + 192))), spread_10(factors), p1)
    return p0, p1


def multiply_one(weight, codes, scales, sums, out):
    """weight uint8 [n_out, row_bytes] times one token as `encode_rows` makes it (all flat) to out float32 [n_out]."""
    n_out, row_bytes = weight.shape
    n_tiles = row_bytes // n_bytes
    blocks = weight.reshape(-1)
    for row in prange(n_out):
        a = lanes_float(0.0)
        b, c = a, a
        at = row * row_bytes
        for tile in range(n_tiles):
            for line in range(0, n_bytes, LINE):
                prefetch(blocks, at + AHEAD + line)
            c0, c1, c2, c3, weight_scales, minima = decode(blocks, at)
            p0, p1 = _products(dot, c0, c1, c2, c3, weight_scales, codes, tile * TILE, scales, tile * 16)
            a, b, c = a + p0, b + p1, fma(minima, load(sums, tile * 16), c)
            at += n_bytes
        out[row] = sum_lanes(a + b - c)


def multiply_few(weight, n_tokens, codes, scales, sums, out):
    """As `multiply_one`, for up to MAX_TOKENS tokens: out float32 [n_tokens, n_out], flat."""
    n_out, row_bytes = weight.shape
    n_tiles = row_bytes // n_bytes
    k = n_tiles * TILE
    blocks = weight.reshape(-1)
    for chunk in prange((n_out + ROWS - 1) // ROWS):
        totals = np.empty(MAX_TOKENS * 16, np.float32)
        for row in range(chunk * ROWS, min(n_out, (chunk + 1) * ROWS)):
            totals[:] = 0
            at = row * row_bytes
            for tile in range(n_tiles):
                for line in range(0, n_bytes, LINE):
                    prefetch(blocks, at + AHEAD + line)
                c0, c1, c2, c3, weight_scales, minima = decode(blocks, at)
                for t in range(n_tokens):
                    i = (t * k + tile * TILE) // 16
                    p0, p1 = _products(dot, c0, c1, c2, c3, weight_scales, codes, i * 16, scales, i)
                    store(totals, t * 16, load(totals, t * 16) + (p0 + p1 - minima * load(sums, i)))
                at += n_bytes
            for t in range(n_tokens):
                out[t * n_out + row] = sum_lanes(load(totals, t * 16))


decode = dot = n_bytes = None  # given by `specialise`


def dot_of(tile: Tile) -> Any:
    return dot4_wide if tile.wide else dot4


def _for_every_type(template: Callable[..., Any]) -> dict[Format, Any]:
    return {
        fmt: specialise(template, fmt.name, parallel=True, decode=tile.decode, dot=dot_of(tile), n_bytes=tile.n_bytes)
        for fmt, tile in TILES.items()
    }


ONE, FEW = _for_every_type(multiply_one), _for_every_type(multiply_few)
