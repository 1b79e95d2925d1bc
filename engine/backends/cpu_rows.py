"""Norms, rotary positions and attention of the CPU backend with compiled kernels.

Formulas: `reference.py`. Attention of many tokens is PyTorch's, a block of queries and a head of the cache at a time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ...kernels.cpu import attention, norms
from ...kernels.cpu.emit import LEVEL
from ...kernels.formats import F16
from ..graph import Node
from . import reference
from .backend import Bound
from .cpu_attention import Call, bind_block_attention, block_scratch
from .cpu_int8 import FEW, MANY_NUMBERS, kernel_arrays, use_threads

Tensor = torch.Tensor
LANES = 16


def bind_rms_norm(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    use_threads()
    x, weight, out = kernel_arrays(*inputs, *outputs)
    kernel, eps = norms.RMS_NORM[x.size >= MANY_NUMBERS], np.float32(node.attrs["eps"])
    return lambda: kernel(x, weight, eps, out)


def bind_add_rms_norm(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    use_threads()
    a, b, weight, total, out = kernel_arrays(*inputs, *outputs)
    kernel, eps = norms.ADD_RMS_NORM[a.size >= MANY_NUMBERS], np.float32(node.attrs["eps"])
    return lambda: kernel(a, b, weight, eps, total, out)


def bind_norm_rope(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    use_threads()
    x, weight, positions = inputs
    flat, scale, out = kernel_arrays(x, weight, outputs[0])
    n_head, d = x.shape[1:]
    kernel, eps, where = norms.NORM_ROPE[flat.size >= MANY_NUMBERS], np.float32(node.attrs["eps"]), positions.numpy()
    exponents = torch.arange(0, d, 2, dtype=torch.float32) / d
    frequencies = (1.0 / node.attrs["theta"] ** exponents).numpy()
    return lambda: kernel(flat, scale, eps, where, frequencies, n_head, out)


def bind_kv_attention(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Call:
    q, k_cache, v_cache, positions = inputs
    n_tokens, n_head, d = q.shape
    if n_tokens > FEW or d % LANES:
        return bind_block_attention(node, inputs, outputs, scratch)
    use_threads()
    n_ctx, n_kv_head, _ = k_cache.shape
    kernel = attention.KERNELS[k_cache.format]
    keys, values = (c.data.view(torch.uint8).numpy().reshape(-1) for c in (k_cache, v_cache))
    width = keys.size // (n_ctx * n_kv_head)
    flat_q, out = kernel_arrays(q, outputs[0])
    where, scale, stride = positions.numpy(), np.float32(1 / math.sqrt(d)), row_stride(n_ctx)
    scores = scratch.view(torch.float32).numpy()[: n_head * stride]

    def call() -> None:
        n = np.count_nonzero(where >= 0)
        kernel(flat_q, n_head, d, keys, values, n_kv_head, width, where[:n], scale, scores, stride, out)
        out[n * n_head * d :] = 0

    return call


def row_stride(n_ctx: int) -> int:
    """Scores of a head, in whole vectors."""
    return -(-n_ctx // LANES) * LANES


def kv_attention_scratch(node: Node) -> int:
    q, k = node.inputs[:2]
    n_tokens, n_head, d = q.shape
    if n_tokens > FEW or d % LANES:
        return block_scratch(node)
    return 4 * n_head * row_stride(k.shape[0])


def bind_kv_store(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    """One row of F16 goes straight to its slot."""
    cache, rows, positions = inputs
    if rows.shape[0] > 1 or cache.format is not F16 or LEVEL == "generic" or rows.numel() % LANES:
        return lambda: reference.kv_store(cache, rows, positions)
    where, row, data = positions.numpy(), rows.numpy().reshape(-1), cache.data.view(torch.uint8).numpy().reshape(-1)

    def call() -> None:
        if where[0] >= 0:
            attention.store_row(row, data, 2 * row.size * int(where[0]))

    return call
