"""Prefill and encoder: a weight matrix times many tokens, with products of bytes.

Sixteen rows of weights are unpacked side by side, one a lane, a panel of tiles at a time, into work space that stays in
the cache; then every token goes over them. So no sum ever runs across lanes, a matrix is never in memory twice, and
one inner loop serves every type: only the tile decoder differs. Products of bytes are summed exactly in int32 over a
group of 16 or 32 weights, then scaled in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import get_thread_id, prange

from ..formats import Format
from . import block
from .emit import LANES
from .jit import inline, specialise
from .simd import lanes_float, load, prefetch, store, store_bytes, transpose
from .tiles import GROUP, TILE, TILES, Tile, place

STRIPS = 4  # of sixteen rows, unpacked by a thread at a time
PANEL = 8  # tiles of a row, unpacked at a time
TOKENS = 32  # that go over a panel before the next ones do: their sums stay in the first-level cache

# The work space of a thread, in bytes: for each strip its codes, scales and minima; one tile of each lane's row on its
# way there; and the sums of each strip, LANES floats a token.
CODE_BYTES = LANES * PANEL * TILE
SCALE_BYTES = 4 * LANES * PANEL * TILE // 16
STRIP_BYTES = CODE_BYTES + 2 * SCALE_BYTES + 1088
SPARE = STRIPS * STRIP_BYTES
ROW_BYTES = TILE + 128  # codes, scales, minima
TOTALS = SPARE + LANES * ROW_BYTES

BLOCK_STRIPS, BLOCK_TOKENS = block.STRIPS, block.TOKENS


def padded(n_tokens: int) -> int:
    """Tokens that are computed: whole blocks."""
    return -(-n_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def work_bytes(n_tokens: int) -> int:
    """Work space of one thread."""
    return TOTALS + 4 * LANES * STRIPS * padded(n_tokens)


@inline
def _unpack(decode, parts, n_bytes, blocks, first, last, row_bytes, n_tiles, work, floats, to):
    """Rows first … first + 15 (the last row again for those beyond it), `n_tiles` tiles from the start of `blocks`, to
    codes [word of 4 weights][lane], scales and, with six `parts`, negative minima [16 weights][lane] from byte `to` of
    `work` on."""
    for tile in range(n_tiles):
        for lane in range(LANES):
            c0, c1, c2, c3, scales, minima = decode(blocks, min(first + lane, last) * row_bytes + tile * n_bytes)
            row = SPARE + lane * ROW_BYTES
            store_bytes(work, row, c0)
            store_bytes(work, row + 64, c1)
            store_bytes(work, row + 128, c2)
            store_bytes(work, row + 192, c3)
            store(floats, (row + TILE) // 4, scales)
            if parts == 6:
                store(floats, (row + TILE + 64) // 4, lanes_float(0.0) - minima)
        scaled = to + CODE_BYTES + tile * 64 * LANES
        for part in range(parts):  # of a row's 64 bytes each: codes, scales, minima
            target = to + (4 * tile + part) * 64 * LANES if part < 4 else scaled + (part - 4) * SCALE_BYTES
            transpose(work, SPARE + 64 * part, ROW_BYTES, work, target)


@inline
def _multiply_panel(add, group, work, n_groups, codes, scales, sums, first_group, n):
    """Adds the products of the unpacked strips with all tokens to the strips' totals."""
    step = 4 * LANES * n
    for t0 in range(0, n, TOKENS):
        for g in range(n_groups):
            i = (first_group + g) * (GROUP // group) * n
            factors = CODE_BYTES + place(g) * 128
            for s in range(STRIPS):
                for line in range(0, 512, 64):
                    prefetch(work, s * STRIP_BYTES + (g + 1) * 512 + line)
            for t in range(t0, min(n, t0 + TOKENS), BLOCK_TOKENS):
                for s in range(0, STRIPS, BLOCK_STRIPS):
                    totals = TOTALS + 4 * LANES * (s * n + t)
                    start, at = s * STRIP_BYTES, ((first_group + g) * n + t) * GROUP
                    words = start + g * 512
                    add(work, words, start + factors, totals, step, codes, at, scales, sums, i + t, n)


@inline
def _write(floats, n, n_tokens, first, n_out, out, stride):
    """The totals of a strip to the columns first … first + 15 of `out`, as far as there are that many."""
    for t in range(n_tokens):
        if first + LANES <= n_out:
            store(out, t * stride + first, load(floats, t * LANES))
        else:
            for lane in range(n_out - first):
                out[t * stride + first + lane] = floats[t * LANES + lane]


def multiply(weight, n_tokens, n, codes, scales, sums, work, out, stride):
    """weight uint8 [n_out, row_bytes] times `n_tokens` tokens, padded to `n`, as `encode_groups` makes them (flat), to
    columns 0 .. n_out - 1 of out float32, whose rows are `stride` long (flat). `scales` and
    `sums` (of codes, int32, for a type without minima) are those of the type's groups.
    work uint8 [n_threads, work_bytes(n)]."""
    n_out, row_bytes = weight.shape
    n_tiles = row_bytes // n_bytes
    blocks = weight.reshape(-1)
    rows = LANES * STRIPS
    for chunk in prange((n_out + rows - 1) // rows):
        own = work[get_thread_id()]
        floats = own.view(np.float32)
        floats[TOTALS // 4 : TOTALS // 4 + rows * n] = 0
        for tile in range(0, n_tiles, PANEL):
            n_panel = min(PANEL, n_tiles - tile)
            for s in range(STRIPS):
                first, to = chunk * rows + s * LANES, s * STRIP_BYTES
                panel = blocks[tile * n_bytes :]
                _unpack(decode, parts, n_bytes, panel, first, n_out - 1, row_bytes, n_panel, own, floats, to)
            _multiply_panel(add, group, own, n_panel * 8, codes, scales, sums, tile * 8, n)
        for s in range(STRIPS):
            first = chunk * rows + s * LANES
            if first < n_out:
                _write(floats[TOTALS // 4 + s * LANES * n :], n, n_tokens, first, n_out, out, stride)


decode = add = group = n_bytes = parts = None  # given by `specialise`


def _for_type(tile: Tile) -> Any:
    step = block.make_block(tile, STRIP_BYTES, SCALE_BYTES)
    given = {"decode": tile.decode, "add": step, "group": tile.group, "n_bytes": tile.n_bytes}
    given["parts"] = 5 if tile.zero else 6
    return specialise(multiply, tile.format.name, parallel=True, **given)


KERNELS: dict[Format, Any] = {fmt: _for_type(tile) for fmt, tile in TILES.items()}
