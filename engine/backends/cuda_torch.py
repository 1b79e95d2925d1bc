"""Ops of the CUDA backend that PyTorch does well enough: few of them, or only while audio is heard.

Nothing here waits for the card, so that every op can be recorded. Formulas: `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph import Node
from .backend import Bound, Kernel
from .cuda_device import memory_told
from .reference import argmax

Tensor = torch.Tensor
Call = Callable[[], None]


def bind_add(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    a, b = inputs
    return lambda: torch.add(a, b, out=outputs[0])


def bind_mul(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    a, b = inputs
    return lambda: torch.mul(a, b, out=outputs[0])


def bind_gelu(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    return lambda: torch.ops.aten.gelu.out(inputs[0], approximate="none", out=outputs[0])


def bind_silu(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    return lambda: torch.ops.aten.silu.out(inputs[0], out=outputs[0])


def bind_permute(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    return lambda: outputs[0].copy_(inputs[0].permute(node.attrs["dims"]))


def bind_argmax(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    return lambda: outputs[0].copy_(argmax(inputs[0]))


def bind_sum_squares(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    """The sums are kept by whoever observes, in the processor's memory: this one waits."""
    sums, x, *rest = inputs
    lengths = rest[0] if rest else None

    def call() -> None:
        rows = x if lengths is None else x[torch.arange(x.shape[1], device=x.device) < lengths[:, None]]
        rows = rows.reshape(-1, x.shape[-1]).double()
        sums[:-1] += rows.square_().sum(0).to(sums.device)
        sums[-1] += rows.shape[0]

    return call


def argmax_bytes(node: Node) -> int:
    return 3 * node.inputs[0].nbytes  # what is compared, and places of 8 bytes


def squares_bytes(node: Node) -> int:
    return 3 * node.inputs[1].nbytes


def spelled_out(bind: Callable[[Node, Bound, Bound, Any], Call]) -> Callable[[Node, Bound, Bound, Any], Call]:
    """Of an op for which PyTorch takes memory while it runs: the end of it is told as such."""

    def bound(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
        call = bind(node, inputs, outputs, scratch)

        def run() -> None:
            with memory_told(f"the work space of {node.op}"):
                call()

        return run

    return bound


KERNELS = {
    "add": Kernel(bind_add),
    "mul": Kernel(bind_mul),
    "gelu": Kernel(bind_gelu),
    "silu": Kernel(bind_silu),
    "permute": Kernel(bind_permute),
    "argmax": Kernel(spelled_out(bind_argmax), transient=argmax_bytes),
    "sum_squares": Kernel(spelled_out(bind_sum_squares), transient=squares_bytes),
}
