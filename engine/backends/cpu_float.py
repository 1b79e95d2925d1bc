"""Linear maps of the CPU backend in PyTorch arithmetic, straight on the mapped weights, in bounded memory.

A matrix that is not float32 in the file is decoded a panel of rows at a time into scratch that stays in the cache, so
no weight is ever kept twice. Panels are float32, or bfloat16 where that is asked for. Needs nothing but PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...kernels.formats import F32
from ..graph import Node
from ..weights import Weight
from .backend import Bound

Tensor = torch.Tensor
Call = Callable[[], None]

PANEL_BYTES = 4 << 20  # of decoded float32 rows: a few MiB stay in the last-level cache


def panel_rows(n_in: int, n_out: int) -> int:
    return min(n_out, max(1, PANEL_BYTES // (4 * n_in)))


def panel_bytes(n_tokens: int, n_in: int, n_out: int, n_products: int = 1) -> int:
    """Scratch: one panel of decoded rows, and its products with all tokens."""
    return 4 * panel_rows(n_in, n_out) * (n_in + n_products * n_tokens)


class Panels:
    """Multiplies x [n_tokens, n_in] with a panel of weight rows at a time."""

    def __init__(self, x: Tensor, weight: Weight, scratch: Tensor, dtype: torch.dtype) -> None:
        """`scratch`: float32, `panel_bytes`. What is left of it is `rest`."""
        n_out, n_in = weight.shape
        self.x, self.weight, self.dtype, self.step = x, weight, dtype, panel_rows(n_in, n_out)
        exact = dtype is torch.float32
        self.rows = weight.decode() if weight.format is F32 and exact else None
        self.panel = scratch[: self.step * n_in].view(dtype)[: self.step * n_in].view(self.step, n_in)
        self.rest = scratch[self.step * n_in :]

    def starts(self) -> range:
        return range(0, self.weight.shape[0], self.step)

    def multiply(self, start: int, product: Tensor) -> Tensor:
        """x times rows start … transposed, into the leading part of `product` float32 [n_tokens * step]."""
        stop = min(start + self.step, self.weight.shape[0])
        if self.rows is None:
            panel = self.panel[: stop - start]
            self.weight.decode_rows(start, stop, panel)
        else:
            panel = self.rows[start:stop]
        out = product[: self.x.shape[0] * (stop - start)].view(self.x.shape[0], stop - start)
        if self.dtype is torch.float32:
            return torch.mm(self.x, panel.T, out=out)
        return out.copy_(torch.mm(self.x.to(self.dtype), panel.T))


def bind_product(
    x: Tensor, weight: Weight, bias: Weight | None, out: Tensor, scratch: Tensor, dtype: torch.dtype
) -> Call:
    """out [n_tokens, n_out] = x [n_tokens, n_in] times weight transposed, plus bias."""
    offset = None if bias is None else bias.decode()
    if weight.format is F32 and dtype is torch.float32:
        matrix = weight.decode().T
        if offset is None:
            return lambda: torch.mm(x, matrix, out=out)
        return lambda: torch.addmm(offset, x, matrix, out=out)
    panels = Panels(x, weight, scratch, dtype)

    def call() -> None:
        for start in panels.starts():
            part = panels.multiply(start, panels.rest)
            stop = start + part.shape[1]
            out[:, start:stop] = part if offset is None else part.add_(offset[start:stop])

    return call


def bind_gated_product(x: Tensor, gate: Weight, up: Weight, out: Tensor, scratch: Tensor, dtype: torch.dtype) -> Call:
    """out = silu(x gate^T) * (x up^T)."""
    gates, ups = Panels(x, gate, scratch, dtype), Panels(x, up, scratch, dtype)
    first, second = gates.rest.view(2, -1)

    def call() -> None:
        for start in gates.starts():
            a = F.silu(gates.multiply(start, first), inplace=True)
            b = ups.multiply(start, second)
            torch.mul(a, b, out=out[:, start : start + a.shape[1]])

    return call


def rows_of(x: Tensor) -> Tensor:
    """[..., n] as [n_rows, n]."""
    return x.view(-1, x.shape[-1])


def scratch_bytes(node: Node) -> int:
    """For `linear` and `gated_linear`."""
    x, weight = node.inputs[0], node.inputs[1]
    n_out, n_in = weight.shape
    return panel_bytes(x.size // n_in, n_in, n_out, 1 if node.op == "linear" else 2)


def bind_linear(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor, dtype: torch.dtype) -> Call:
    x, weight, bias = (*inputs, None)[:3]
    return bind_product(rows_of(x), weight, bias, rows_of(outputs[0]), scratch.view(torch.float32), dtype)


def bind_gated_linear(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor, dtype: torch.dtype) -> Call:
    x, gate, up = inputs
    return bind_gated_product(rows_of(x), gate, up, rows_of(outputs[0]), scratch.view(torch.float32), dtype)


def transient_bytes(node: Node, dtype: torch.dtype) -> int:
    """What PyTorch allocates for bfloat16: the activations and a product."""
    if dtype is torch.float32:
        return 0
    x, weight = node.inputs[0], node.inputs[1]
    n_out, n_in = weight.shape
    return 2 * (x.size // n_in) * (n_in + panel_rows(n_in, n_out))
