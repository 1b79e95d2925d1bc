"""Attention inside windows, in both directions: what the audio encoder does.

A program takes a tile of queries of one head of one window and runs over the window's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .cache import load_rows
from .launch import launch
from .softmax import HIDDEN, attend_tile, score_scale
from .static import Case

if TYPE_CHECKING:
    import torch

ROWS, KEYS = 64, 64  # queries of a program, keys of a step: a window of the encoder has 50
WARPS, STAGES = 4, 2


@triton.jit(do_not_specialize=["n_tokens"])
def _window_attention(
    queries,
    keys,
    values,
    lengths,
    out,
    n_tokens,
    n_head,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid: (tiles of queries, heads, windows). Queries, keys and values are rounded to float16 as they are loaded."""
    head, window = tl.program_id(1), tl.program_id(2)
    first = window * n_tokens
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = (first + token) * n_head + head
    inside = token < n_tokens
    q = (load_rows(queries, None, row, inside, D, D_PAD) * scale).to(tl.float16)

    peak = tl.full((ROWS,), HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, D_PAD), tl.float32)
    length = tl.load(lengths + window)
    for start in range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < length
        key_row = (first + key) * n_head + head
        k = load_rows(keys, None, key_row, seen, D, D_PAD).to(tl.float16)
        v = load_rows(values, None, key_row, seen, D, D_PAD).to(tl.float16)
        peak, total, mixed = attend_tile(q, k, v, seen[None, :], peak, total, mixed)

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # an empty window gives zeros
    column = tl.arange(0, D_PAD)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(out + row[:, None] * D + column[None, :], mixed, mask=mask)


def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor
) -> None:
    """Every token of a window sees the first lengths[b] tokens of its window.

    q, k, v, out float32 [n_windows, n_tokens, n_head, d_head], lengths int32 [n_windows]. A window of length 0 gives 0.
    """
    n_windows, n_tokens, n_head, d = q.shape
    grid = (triton.cdiv(n_tokens, ROWS), n_head, n_windows)
    width = max(16, triton.next_power_of_2(d))
    launch(
        _window_attention,
        grid,
        q,
        k,
        v,
        lengths,
        out,
        n_tokens,
        n_head,
        score_scale(d),
        d,
        width,
        ROWS,
        KEYS,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def static_cases() -> Iterator[Case]:
    signature = dict.fromkeys(("queries", "keys", "values", "out"), "*fp32")
    signature |= {"lengths": "*i32", "n_tokens": "i32", "n_head": "i32", "scale": "fp32"}
    constants = {"D": 64, "D_PAD": 64, "ROWS": ROWS, "KEYS": KEYS}
    weights = ("keys", "values")
    yield Case("window_attention", "F32", constants, _window_attention, signature, constants, WARPS, STAGES, weights)
