"""The definition of each plain op, in PyTorch float32: what every other backend is compared with.

Each definition is a function of tensors that returns a new tensor. Weights arrive decoded to float32, one at
a time and freed after the call, except where a definition says that it takes the stored thing itself.
Knows no fused op: those run as their expansions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.formats import F32
from ..graph import Node, Value
from ..kv_cache import CacheTensor
from ..ops import OPS
from ..weights import Weight
from .backend import Backend, Bound, Kernel

Tensor = torch.Tensor

DEFINITIONS: dict[str, Callable[..., Any]] = {}


def _define(function: Callable[..., Any]) -> Callable[..., Any]:
    DEFINITIONS[function.__name__] = function
    return function


@_define
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@_define
def get_rows(table: Weight, ids: Tensor) -> Tensor:
    """Takes the stored table: only the rows asked for are decoded."""
    return table.gather(ids)


@_define
def conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


@_define
def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@_define
def mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


@_define
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@_define
def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


@_define
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@_define
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@_define
def permute(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    return x.permute(dims)


@_define
def take_rows(x: Tensor, index: Tensor) -> Tensor:
    return x[index.long()]


@_define
def put_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return torch.where((index >= 0)[:, None], rows[index.clamp(min=0).long()], x)


@_define
def add_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return torch.where((index >= 0)[:, None], x + rows[index.clamp(min=0).long()], x)


@_define
def rope(x: Tensor, positions: Tensor, *, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = positions.float()[:, None] * frequencies  # [n_tokens, d_head / 2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@_define
def window_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [n_windows, n_head, n_tokens, d_head]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.arange(k.shape[2]) >= lengths[:, None]
    scores.masked_fill_(hidden[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def count_tokens(positions: Tensor) -> int:
    """Those before the padding."""
    return int((positions >= 0).sum())


@_define
def kv_store(cache: CacheTensor, rows: Tensor, positions: Tensor) -> None:
    """Takes the stored cache and changes it."""
    n = count_tokens(positions)
    cache.write(positions[:n], rows[:n])


@_define
def kv_attention(q: Tensor, k_cache: CacheTensor, v_cache: CacheTensor, positions: Tensor) -> Tensor:
    """Takes the stored caches; only the slots in use are read."""
    out, n = torch.zeros_like(q), count_tokens(positions)
    q, positions = q[:n], positions[:n]
    n_slots = int(positions[-1]) + 1 if n else 0
    group = q.shape[1] // k_cache.shape[1]
    k, v = (c.read(n_slots).repeat_interleave(group, dim=1).transpose(0, 1) for c in (k_cache, v_cache))
    scores = q.transpose(0, 1) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [n_head, n_tokens, n_slots]
    later = torch.arange(n_slots) > positions[:, None]
    scores.masked_fill_(later, -math.inf)
    out[:n] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@_define
def argmax(x: Tensor) -> Tensor:
    most = x.amax(-1, keepdim=True)
    first = torch.where(x == most, torch.arange(x.shape[-1], device=x.device), x.shape[-1]).amin(-1)
    return torch.where(most[..., 0].isfinite(), first, -1)


@_define
def sum_squares(sums: Tensor, x: Tensor, lengths: Tensor | None = None) -> None:
    """Takes the stored sums and changes them."""
    if lengths is not None:
        x = x[torch.arange(x.shape[1]) < lengths[:, None]]
    rows = x.reshape(-1, x.shape[-1]).double()
    sums[:-1] += rows.square_().sum(0)
    sums[-1] += rows.shape[0]


TAKES_STORED = {"get_rows"}


def _operand(x: Any, stored: bool) -> Callable[[], Any]:
    """How the call gets at an operand: vectors are decoded once, matrices at each call."""
    if not isinstance(x, Weight) or stored:
        return lambda: x
    if len(x.shape) == 1 or x.format is F32:
        decoded = x.decode()
        return lambda: decoded
    return x.decode


def bind_definition(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Callable[[], None]:
    """Runs the definition and copies its result to where the plan wants it."""
    define, attrs = DEFINITIONS[node.op], dict(node.attrs)
    operands = [_operand(x, node.op in TAKES_STORED) for x in inputs]
    if OPS[node.op].writes:
        return lambda: define(*(x() for x in operands))
    (out,) = outputs

    def call() -> None:
        out.copy_(define(*(x() for x in operands), **attrs))

    return call


def matrix_bytes(values: list[Value]) -> int:
    """Float32 bytes of the largest weight matrix among `values`, as it is decoded."""
    return max((v.nbytes for v in values if v.kind == "weight" and len(v.shape) > 1), default=0)


def attention_bytes(node: Node) -> int:
    """Scores before and after the softmax, and keys and values repeated for each query head, of a full cache."""
    q, k = node.inputs[0], node.inputs[1]
    if node.op == "window_attention":
        return 2 * q.nbytes // q.shape[-1] * q.shape[1]
    return 8 * q.shape[1] * k.shape[0] * (q.shape[0] + q.shape[2])


def transient_bytes(node: Node) -> int:
    """A definition's result and about as much on the way to it, and its weight in float32."""
    own = 2 * sum(v.nbytes for v in node.outputs if v.kind == "computed")
    if OPS[node.op].writes:
        return node.inputs[1].nbytes * (3 if node.op == "sum_squares" else 1)  # the rows that count, and in float64
    if node.op == "get_rows":
        return own
    attention = attention_bytes(node) if node.op.endswith("attention") else 0
    return own + matrix_bytes(list(node.operands)) + attention


KERNELS = {op: Kernel(bind_definition, transient=transient_bytes) for op in DEFINITIONS}

BACKEND = Backend("reference", KERNELS, rules=(), kv_type="f32", window_batch=4, prefill_chunk=512)
