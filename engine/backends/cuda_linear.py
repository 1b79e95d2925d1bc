"""Linear maps of the CUDA backend: operands bound to the kernels on packed weights, with what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...kernels.gpu.launch import record
from ...kernels.gpu.linear import Best, Norm, Picker, best_programs, gated_linear, linear, scratch_bytes
from ...kernels.gpu.sampling import argmax_pairs
from ...kernels.gpu.weights import DeviceWeight
from ..graph import Node
from .backend import Bound, Kernel

Tensor = torch.Tensor
Call = Callable[[], None]


def rows_of(x: Tensor) -> Tensor:
    """[..., n] as [n_rows, n]."""
    return x.view(-1, x.shape[-1])


def bind_wide_linear(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor, exact: bool, pick: Picker) -> Call:
    x, weights, biases = rows_of(inputs[0]), inputs[2], inputs[3]
    outs = [rows_of(out) for out in outputs if len(out.shape) > 1]
    shared = {"norm": norm_of(inputs[1], node.attrs["eps"]), "scratch": scratch, "exact": exact, "pick": pick}
    if node.attrs["close"] == "gate":
        return record(gated_linear, x, *weights, outs[0], **shared)
    if node.attrs["close"] == "argmax":
        return bind_argmax(x, weights, biases, outputs[0], shared)
    shared |= {"residual": None if inputs[4] is None else rows_of(inputs[4]), "epilogue": node.attrs["close"]}
    return record(linear, x, weights, biases, outs, **shared)


def bind_argmax(
    x: Tensor, weights: Sequence[DeviceWeight], biases: Sequence[Tensor | None], token: Tensor, shared: dict[str, Any]
) -> Call:
    """The product's outputs are not kept: each program leaves the largest of its own at the end of the scratch."""
    n = best_programs(weights[0], 1, shared["pick"])
    pairs = shared["scratch"][scratch_bytes(*x.shape) :].view(2, -1)
    best = Best(pairs[0].view(torch.float32)[:n, None], pairs[1].view(torch.int32)[:n, None])

    def choose() -> None:
        linear(x, weights, biases, [None], best=best, **shared)
        argmax_pairs(best.values, best.indices, token)

    return record(choose)


def norm_of(operands: tuple[Tensor, ...] | None, eps: float) -> Norm | None:
    if operands is None:
        return None
    weight, bias = (*operands, None)[:2]
    return Norm("rms" if bias is None else "layer", weight, bias, eps)


def wide_linear_bytes(node: Node) -> int:
    x = node.inputs[0]
    n_cols = x.shape[-1]
    pairs = 0
    if node.attrs["close"] == "argmax":
        pairs = 8 * node.inputs[2][0].shape[0]  # one for each row: more than there are programs
    return scratch_bytes(x.size // n_cols, n_cols) + pairs


def linear_kernels(exact: bool, pick: Picker) -> dict[str, Kernel]:
    """`exact`: a few tokens are not rounded to bytes; `pick`: how products are cut on a card."""
    return {"wide_linear": Kernel(partial(bind_wide_linear, exact=exact, pick=pick), wide_linear_bytes)}
