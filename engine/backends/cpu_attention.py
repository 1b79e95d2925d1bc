"""Attention of the CPU backend in PyTorch arithmetic: a head of the cache at a time, and a block of the query tokens
that see it, so that little work space is needed at any depth."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..graph import Node
from ..kv_cache import CacheTensor
from .backend import Bound
from .reference import count_tokens

Tensor = torch.Tensor
Call = Callable[[], None]

SCORE_BYTES = 32 << 20  # of attention scores at a time
BLOCK_TOKENS = 128  # query tokens at a time: few enough that little is multiplied that causality hides
HEAD_BYTES = 16 << 20  # of keys and values in float32 at a time, but always one head


def bind_block_attention(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Call:
    q, k_cache, v_cache, positions = inputs
    (out,) = outputs
    n_head, d = q.shape[1:]
    n_ctx, n_kv_head, _ = k_cache.shape
    group = n_head // n_kv_head
    half = head_floats(n_ctx, n_kv_head, d) // 2
    keys, values, scores = scratch.view(torch.float32).split([half, half, n_scores(node)])

    def call() -> None:
        n = count_tokens(positions)
        out[n:] = 0
        if n == 0:
            return
        n_slots = int(positions[n - 1]) + 1
        n_heads = min(n_kv_head, half // (n_slots * d), max(1, scores.numel() // (group * n_slots)))
        for first in range(0, n_kv_head, n_heads):
            h = min(n_heads, n_kv_head - first)
            k, v = (
                read_heads(cache, range(first, first + h), memory[: h * n_slots * d].view(h, n_slots, d))
                for cache, memory in ((k_cache, keys), (v_cache, values))
            )
            heads = slice(first * group, (first + h) * group)
            step = min(BLOCK_TOKENS, max(1, scores.numel() // (group * h * n_slots)))
            for start in range(0, n, step):
                tokens = slice(start, min(start + step, n))
                out[tokens, heads] = attend(q[tokens, heads], k, v, positions[tokens], scores)

    return call


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scores: Tensor) -> Tensor:
    """Queries [n, h * group, d] on the keys and values [h, n_slots, d] up to their positions [n]; in q's shape.
    `scores`: flat work space. What no query of the block may see is not multiplied at all."""
    n, (h, _, d) = q.shape[0], k.shape
    n_slots = int(positions[-1]) + 1
    k, v = k[:, :n_slots], v[:, :n_slots]
    rows = q.reshape(n, h, -1, d).permute(1, 2, 0, 3).reshape(h, -1, d)  # [h, group * n, d]
    weights = scores[: rows.shape[0] * rows.shape[1] * n_slots].view(h, -1, n_slots)
    later = torch.arange(n_slots) > positions[:, None]
    weights.view(h, -1, n, n_slots).copy_(torch.zeros(n, n_slots).masked_fill_(later, -math.inf))
    weights.baddbmm_(rows, k.transpose(1, 2), alpha=1 / math.sqrt(d))
    torch.softmax(weights, -1, out=weights)
    mixed = torch.bmm(weights, v, out=rows).view(h, -1, n, d)
    return mixed.permute(2, 0, 1, 3).reshape(q.shape)


def read_heads(cache: CacheTensor, heads: range, out: Tensor) -> Tensor:
    """The first rows of some heads into out float32 [n_heads, n_slots, d]."""
    for i, head in enumerate(heads):
        rows = cache.read_head(head, out[i])
        if rows.data_ptr() != out[i].data_ptr():
            out[i] = rows
    return out


def head_floats(n_ctx: int, n_kv_head: int, d: int) -> int:
    """Keys and values of as many heads as are read at a time."""
    one = 2 * n_ctx * d
    return max(one, min(n_kv_head * one, HEAD_BYTES // 4))


def n_scores(node: Node) -> int:
    """The most scores that are there at a time."""
    (n_tokens, n_head, _), (n_ctx, n_kv_head, _) = (x.shape for x in node.inputs[:2])
    one_token = n_head // n_kv_head * n_ctx  # of one head of the cache
    return min(min(n_tokens, BLOCK_TOKENS) * n_head * n_ctx, max(one_token, SCORE_BYTES // 4))


def block_scratch(node: Node) -> int:
    return 4 * (head_floats(*node.inputs[1].shape) + n_scores(node))


def block_bytes(node: Node) -> int:
    """The mask of a block in two types, its queries, and what a matrix library packs of one head's keys and values."""
    q, k = node.inputs[:2]
    n_ctx, _, d = k.shape
    n = min(q.shape[0], BLOCK_TOKENS, max(1, SCORE_BYTES // (4 * n_ctx)))
    return n_ctx * (5 * n + 8 * d) + 2 * q.nbytes
