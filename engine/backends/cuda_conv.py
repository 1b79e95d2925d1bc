"""Convolutions of the CUDA backend: operands bound to Triton kernels, which take no work space but the arena's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...kernels.gpu import conv
from ...kernels.gpu.launch import record
from ..graph import Node
from .backend import Bound, Kernel

Tensor = torch.Tensor
Call = Callable[[], None]


def bind_conv2d(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Call:
    """Only where somebody looks between the convolutions of a stack."""
    return record(conv.conv2d, *inputs, outputs[0], **node.attrs)


def bind_conv_stack(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor | None) -> Call:
    x, weights, biases = inputs
    dims, moves = node.attrs["dims"], {name: node.attrs[name] for name in ("stride", "padding")}
    image = outputs[0].permute([dims.index(axis) for axis in range(len(dims))])  # [n, c_out, h, w], as it is stored
    return record(conv.conv_stack, x, weights, biases, image, scratch, **moves)


def conv_stack_bytes(node: Node) -> int:
    x, weights = node.inputs[:2]
    n, _, *sizes = x.shape
    shapes = [weight.shape for weight in weights]
    return conv.stack_scratch_bytes(n, sizes, shapes, node.attrs["stride"], node.attrs["padding"])


KERNELS = {"conv2d": Kernel(bind_conv2d), "conv_stack": Kernel(bind_conv_stack, conv_stack_bytes)}
