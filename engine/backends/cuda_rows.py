"""Norms, rotary positions, the cache, attention and rows of the CUDA backend: operands bound to Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...kernels.gpu import cache as kv_cache
from ...kernels.gpu import kv_attention, norms, rope, rows, window_attention
from ...kernels.gpu.launch import record
from ..graph import Node
from .backend import Bound, Kernel

Tensor = torch.Tensor
Call = Callable[[], None]


def bind_rms_norm(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    x, weight = inputs
    return record(norms.rms_norm, x, weight, node.attrs["eps"], outputs[0])


def bind_add_rms_norm(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    return record(norms.add_rms_norm, *inputs, node.attrs["eps"], *outputs)


def bind_layer_norm(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    return record(norms.layer_norm, *inputs, node.attrs["eps"], outputs[0])


@cache
def frequencies(d_head: int, theta: float, device: torch.device) -> Tensor:
    """Of rotary positions, once for all layers."""
    return rope.rope_frequencies(d_head, theta).to(device)


def bind_rope(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    x, positions = inputs
    turns = frequencies(x.shape[-1], node.attrs["theta"], x.device)
    return record(rope.rope, x, turns, positions, outputs[0])


def bind_norm_rope(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    x, weight, positions = inputs
    turns = frequencies(x.shape[-1], node.attrs["theta"], x.device)
    return record(rope.norm_rope, x, weight, node.attrs["eps"], turns, positions, outputs[0])


def bind_norm_rope_store(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    q, k, v, q_weight, k_weight, keys, values, positions = inputs
    turns, eps = frequencies(q.shape[-1], node.attrs["theta"], q.device), node.attrs["eps"]
    planes = (keys.planes, values.planes)
    return record(rope.norm_rope_store, q, k, v, q_weight, k_weight, eps, turns, positions, outputs[0], *planes)


def bind_kv_store(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    cache, new, positions = inputs
    return record(kv_cache.kv_store, new, positions, cache.planes)


def bind_kv_attention(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor | None) -> Call:
    q, keys, values, positions = inputs
    work = None if scratch is None else scratch.view(torch.float32)
    return record(kv_attention.kv_attention, q, keys.planes, values.planes, positions, outputs[0], work)


def kv_attention_bytes(node: Node) -> int:
    return kv_attention.kv_attention_scratch_bytes(*node.inputs[0].shape)


def bind_norm_rope_attention(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Call:
    q, k, v, q_weight, k_weight, keys, values, positions = inputs
    turns, eps = frequencies(q.shape[-1], node.attrs["theta"], q.device), node.attrs["eps"]
    rest = (keys.planes, values.planes, positions, outputs[0], scratch.view(torch.float32))
    return record(kv_attention.step_attention, q, k, v, q_weight, k_weight, eps, turns, *rest)


def bind_window_attention(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    return record(window_attention.window_attention, *inputs, outputs[0])


def bind_rows(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    """Of the four ops that pick rows by number."""
    kernel = getattr(rows, node.op)
    return record(kernel, *inputs, outputs[0])


KERNELS = {
    **dict.fromkeys(("get_rows", "take_rows", "put_rows", "add_rows"), Kernel(bind_rows)),
    "rms_norm": Kernel(bind_rms_norm),
    "add_rms_norm": Kernel(bind_add_rms_norm),
    "layer_norm": Kernel(bind_layer_norm),
    "rope": Kernel(bind_rope),
    "norm_rope": Kernel(bind_norm_rope),
    "norm_rope_store": Kernel(bind_norm_rope_store),
    "kv_store": Kernel(bind_kv_store),
    "kv_attention": Kernel(bind_kv_attention, kv_attention_bytes),
    "norm_rope_attention": Kernel(bind_norm_rope_attention, kv_attention_bytes),
    "window_attention": Kernel(bind_window_attention),
}
