"""The CPU backend: torch float32 arithmetic straight on the mapped weights, in bounded memory.

A matrix that is not float32 in the file is decoded a panel of rows at a time into scratch that stays in
the cache, so no weight is ever kept twice. Plain ops without a kernel here run as the reference defines them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.formats import F32
from ..graph import Node, Value
from ..rewrite import fuse_gates
from ..weights import Weight
from . import reference
from .backend import Backend, Bound, Kernel

Tensor = torch.Tensor

PANEL_BYTES = 4 << 20  # of decoded float32 rows: a few MiB stay in the last-level cache
SCORE_BYTES = 32 << 20  # of attention scores at a time


def panel_rows(n_in: int, n_out: int) -> int:
    return min(n_out, max(1, PANEL_BYTES // (4 * n_in)))


def panel_scratch(node: Node) -> int:
    """One panel of decoded rows, its product, and the second product of a gated pair."""
    x, weight = node.inputs[0], node.inputs[1]
    n_out, n_in = weight.shape
    n_panels = 1 if node.op == "linear" else 2
    return 4 * panel_rows(n_in, n_out) * (n_in + n_panels * (x.size // n_in))


class Panels:
    """Multiplies x [n_tokens, n_in] with a panel of weight rows at a time."""

    def __init__(self, x: Tensor, weight: Weight, scratch: Tensor) -> None:
        n_out, n_in = weight.shape
        self.x, self.weight, self.step = x, weight, panel_rows(n_in, n_out)
        self.rows = weight.decode() if weight.format is F32 else None
        self.panel = scratch[: self.step * n_in].view(self.step, n_in)

    def starts(self) -> range:
        return range(0, self.weight.shape[0], self.step)

    def multiply(self, start: int, product: Tensor) -> Tensor:
        """x times rows start … transposed, into the leading part of `product` [n_tokens * step]."""
        stop = min(start + self.step, self.weight.shape[0])
        if self.rows is None:
            panel = self.panel[: stop - start]
            self.weight.decode_rows(start, stop, panel)
        else:
            panel = self.rows[start:stop]
        out = product[: self.x.shape[0] * (stop - start)].view(self.x.shape[0], stop - start)
        return torch.mm(self.x, panel.T, out=out)


def bind_linear(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Callable[[], None]:
    x, weight, bias = (*inputs, None)[:3]
    x, out = x.view(-1, x.shape[-1]), outputs[0].view(-1, weight.shape[0])
    bias = None if bias is None else bias.decode()
    if weight.format is F32:
        matrix = weight.decode().T
        if bias is None:
            return lambda: torch.mm(x, matrix, out=out)
        return lambda: torch.addmm(bias, x, matrix, out=out)
    floats = scratch.view(torch.float32)
    panels = Panels(x, weight, floats)
    product = floats[panels.panel.numel() :]

    def call() -> None:
        for start in panels.starts():
            part = panels.multiply(start, product)
            stop = start + part.shape[1]
            out[:, start:stop] = part if bias is None else part.add_(bias[start:stop])

    return call


def bind_gated_linear(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Callable[[], None]:
    x, gate, up = inputs
    x, out = x.view(-1, x.shape[-1]), outputs[0].view(-1, gate.shape[0])
    floats = scratch.view(torch.float32)
    gates, ups = Panels(x, gate, floats), Panels(x, up, floats)
    products = floats[gates.panel.numel() :].view(2, -1)

    def call() -> None:
        for start in gates.starts():
            a = F.silu(gates.multiply(start, products[0]), inplace=True)
            b = ups.multiply(start, products[1])
            torch.mul(a, b, out=out[:, start : start + a.shape[1]])

    return call


def bind_add(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Callable[[], None]:
    a, b = inputs
    return lambda: torch.add(a, b, out=outputs[0])


def bind_gelu(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Callable[[], None]:
    return lambda: torch.ops.aten.gelu.out(inputs[0], approximate="none", out=outputs[0])


def bind_permute(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Callable[[], None]:
    return lambda: outputs[0].copy_(inputs[0].permute(node.attrs["dims"]))


def bind_kv_attention(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Callable[[], None]:
    """A head of the cache at a time, and a block of the query tokens that see it: little work space at any depth."""
    q, k_cache, v_cache, positions = inputs
    (out,) = outputs
    n_tokens, n_head, d_head = q.shape
    n_ctx, n_kv_head, _ = k_cache.shape
    group = n_head // n_kv_head
    keys, values, scores = scratch.view(torch.float32).split([n_ctx * d_head, n_ctx * d_head, n_scores(node)])

    def call() -> None:
        n_slots = int(positions[-1]) + 1
        step = query_block(group, n_slots)
        slots = torch.arange(n_slots)
        for head in range(n_kv_head):
            k, v = (
                cache.read_head(head, memory[: n_slots * d_head].view(n_slots, d_head))
                for cache, memory in ((k_cache, keys), (v_cache, values))
            )
            heads = slice(head * group, (head + 1) * group)
            for start in range(0, n_tokens, step):
                block = q[start : start + step, heads]  # [n, group, d_head]
                n = block.shape[0]
                weights = scores[: n * group * n_slots].view(n * group, n_slots)
                torch.mm(block.reshape(n * group, d_head), k.T, out=weights).mul_(1 / math.sqrt(d_head))
                later = slots > positions[start : start + n, None]
                weights.view(n, group, n_slots).masked_fill_(later[:, None], -math.inf)
                torch.softmax(weights, -1, out=weights)
                out[start : start + n, heads] = torch.mm(weights, v).view(n, group, d_head)

    return call


def query_block(group: int, n_slots: int) -> int:
    """Query tokens whose scores, `group` rows each, fill SCORE_BYTES."""
    return max(1, SCORE_BYTES // (4 * group * n_slots))


def n_scores(node: Node) -> int:
    """The most scores that are there at a time."""
    q, k = node.inputs[:2]
    row = q.shape[1] // k.shape[1] * k.shape[0]
    return min(q.shape[0] * row, max(row, SCORE_BYTES // 4))


def kv_attention_scratch(node: Node) -> int:
    """One head of keys and of values in float32, and the scores of a block."""
    n_ctx, _, d_head = node.inputs[1].shape
    return 4 * (2 * n_ctx * d_head + n_scores(node))


def kv_attention_bytes(node: Node) -> int:
    """The mask of a block, and what a matrix library packs of one head's keys and values."""
    n_ctx, _, d_head = node.inputs[1].shape
    return n_ctx * (min(node.inputs[0].shape[0], query_block(1, n_ctx)) + 8 * d_head)


def own_bytes(values: tuple[Value, ...]) -> int:
    return sum(v.nbytes for v in values)


def conv_bytes(node: Node) -> int:
    """The library's result and its reordered copies of the input and the weight."""
    return own_bytes(node.outputs) + sum(v.nbytes for v in node.operands)


KERNELS = reference.KERNELS | {
    "linear": Kernel(bind_linear, scratch=panel_scratch),
    "gated_linear": Kernel(bind_gated_linear, scratch=panel_scratch),
    "add": Kernel(bind_add),
    "gelu": Kernel(bind_gelu),
    "permute": Kernel(bind_permute),
    "conv2d": Kernel(reference.bind_definition, transient=conv_bytes),
    "kv_attention": Kernel(bind_kv_attention, kv_attention_scratch, kv_attention_bytes),
}

BACKEND = Backend("cpu", KERNELS, rules=(fuse_gates,), kv_type="f16", window_batch=4, prefill_chunk=256)
