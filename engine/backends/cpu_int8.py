"""Linear maps of the CPU backend with compiled kernels: products of bytes for quantised weights.

Up to eight tokens are multiplied straight on the mapped bytes, each read once; more go over weights that are unpacked
a panel at a time. Activations are rounded to int8, with a scale for each 16 or 32, once for all weights that meet them;
each weight keeps its own type. F16 and BF16 are multiplied in float32. What has no kernel goes the way of
`cpu_float.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch

from ...kernels.cpu import activations, matmul, matvec, norms, plain
from ...kernels.cpu.tiles import GROUP, TILE, TILES
from ...kernels.formats import F32
from ..graph import Node
from ..weights import Weight
from . import cpu_float
from .backend import Bound
from .cpu_float import Call, rows_of

log = logging.getLogger("auricle.backends")

Tensor = torch.Tensor
Part = tuple[tuple[int, ...], type]  # of a piece of scratch: its shape and type

FEW = matvec.MAX_TOKENS
UP_ROWS = 1024  # of the second matrix of a gated pair, at a time
MANY_NUMBERS = 1 << 15  # from here on rows are shared among threads


def use_threads() -> int:
    """Compiled kernels use as many threads as PyTorch; gives that number."""
    n = thread_count()
    numba.set_num_threads(n)  # starts the threads at its first call, and PyTorch then counts those
    torch.set_num_threads(n)
    return n


def thread_count() -> int:
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


# Scratch.


def part_bytes(part: Part) -> int:
    shape, kind = part
    return -(-math.prod(shape) * np.dtype(kind).itemsize // 64) * 64


def carve(scratch: Tensor, parts: Sequence[Part]) -> list[np.ndarray]:
    """Arrays that lie in `scratch` (uint8) one after another."""
    arrays, start, memory = [], 0, scratch.numpy()
    for part in parts:
        shape, kind = part
        n = math.prod(shape) * np.dtype(kind).itemsize
        arrays.append(memory[start : start + n].view(kind).reshape(shape))
        start += part_bytes(part)
    return arrays


def activation_parts(n: int, k: int) -> list[Part]:
    if n <= FEW:
        return [((n, k), np.uint8), ((n, k // 16), np.float32), ((n, k // 16), np.float32)]
    m, groups = matmul.padded(n), k // GROUP
    whole, halves, sums = ((groups, m), np.float32), ((2 * groups, m), np.float32), ((2 * groups, m), np.int32)
    work = ((thread_count(), matmul.work_bytes(n)), np.uint8)
    return [((groups, m, GROUP), np.uint8), whole, whole, halves, sums, work]


def scratch_bytes(node: Node) -> int:
    """For `linear`, `linears` and `gated_linear`; types are not known yet, so this is enough for any."""
    x = node.inputs[0]
    weights = [v for v in node.operands if v.kind == "weight" and len(v.shape) == 2]
    k, widest = weights[0].shape[1], max(w.shape[0] for w in weights)
    n, gated = x.size // k, node.op == "gated_linear"
    general = cpu_float.panel_bytes(n, k, widest, 2 if gated else 1)
    second = gated_bytes(n, widest if n <= FEW else UP_ROWS) if gated else 0
    rounded = 0 if k % TILE else sum(map(part_bytes, activation_parts(n, k)))
    return max(general, rounded) + second


# Products.


class Activations:
    """The tokens x [n, k] of a linear map, rounded to int8 in scratch, for weights of some types."""

    def __init__(self, x: Tensor, scratch: Tensor, weights: Sequence[Weight]) -> None:
        self.n, self.k = x.shape
        self._fine = all(TILES[w.format].group < GROUP for w in weights)
        parts = activation_parts(self.n, self.k)
        self._x, self._arrays = x.numpy(), carve(scratch, parts)
        self.rest = scratch[sum(map(part_bytes, parts)) :]
        self._n_threads = thread_count()

    def encode(self) -> None:
        """Goes before the products, and sets the number of threads for them: numba keeps one for each thread that
        calls, each of those threads has its work space here, and another model may have set it since."""
        numba.set_num_threads(self._n_threads)
        if self.n <= FEW:
            activations.encode_rows(self._x, *self._arrays)
        else:
            activations.encode_groups(self._x, self._fine, *self._arrays[:5])

    def bind_product(self, weight: Weight, out: np.ndarray, stride: int, rows: slice = slice(None)) -> Call:
        """Some rows of a matrix times the tokens, to flat `out`, whose rows are `stride` long (n_out for a few)."""
        data, fmt = file_bytes(weight)[rows], weight.format
        flat = [a.reshape(-1) for a in self._arrays[:5]]
        if self.n == 1:
            kernel = matvec.ONE[fmt]
            return lambda: kernel(data, *flat, out)
        if self.n <= FEW:
            kernel, n = matvec.FEW[fmt], self.n
            return lambda: kernel(data, n, *flat, out)
        kernel, n, m, work = matmul.KERNELS[fmt], self.n, matmul.padded(self.n), self._arrays[5]
        codes, *whole_and_halves = flat
        scales, sums = whole_and_halves[:2] if TILES[fmt].group == GROUP else whole_and_halves[2:]
        return lambda: kernel(data, n, m, codes, scales, sums, work, out, stride)


def file_bytes(weight: Weight) -> np.ndarray:
    """[n_rows, row_bytes], never writable: kernels are compiled for one kind of array."""
    data = weight.rows().view()
    data.flags.writeable = False
    return data


def is_tiled(weight: Weight) -> bool:
    """Whether the int8 kernels take it."""
    return weight.format in TILES and weight.shape[1] % TILE == 0


def bind_plain(x: Tensor, weight: Weight, bias: Weight | None, out: Tensor, scratch: Tensor) -> Call:
    """A weight without int8 kernel: F16 and BF16 straight on their bytes for a few tokens, else as `cpu_float` does."""
    n, k = x.shape
    if n > FEW or not plain_alone(weight):
        if weight.format is not F32 and weight.format not in plain.KERNELS:
            tell_slow(weight.format.name, k)
        return cpu_float.bind_product(x, weight, bias, out, scratch.view(torch.float32), torch.float32)
    kernel, data = plain.KERNELS[weight.format], file_bytes(weight)
    flat_x, flat_out = x.numpy().reshape(-1), out.numpy().reshape(-1)
    return with_bias(lambda: kernel(data, flat_x, n, flat_out), out, bias)


@cache
def tell_slow(name: str, k: int) -> None:
    """Said once for each type and width."""
    log.info("%s rows of %d have no int8 kernel; they are decoded to float32 at each use, which is slower", name, k)


def with_bias(call: Call, out: Tensor, bias: Weight | None) -> Call:
    if bias is None:
        return call
    offset = bias.decode()

    def both() -> None:
        call()
        out.add_(offset)

    return both


# Kernels of ops.


def bind_linear(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Call:
    x, weight, bias = (*inputs, None)[:3]
    return bind_products(rows_of(x), (weight,), (bias,), outputs, scratch)


def bind_linears(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Call:
    x, weights, biases = inputs
    return bind_products(rows_of(x), weights, biases, outputs, scratch)


def bind_products(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Weight | None], outputs: Sequence[Tensor], scratch: Tensor
) -> Call:
    """Several linear maps of x: rounded once, then each weight in its own type."""
    use_threads()
    first: list[Call] = []
    then: list[Call] = []
    tiled = [w for w in weights if is_tiled(w)]
    rounded = Activations(x, scratch, tiled) if tiled else None
    for weight, bias, output in zip(weights, biases, outputs, strict=True):
        out = rows_of(output)
        if rounded is not None and is_tiled(weight):
            call = rounded.bind_product(weight, out.numpy().reshape(-1), weight.shape[0])
            then.append(with_bias(call, out, bias))
        else:  # before the others: it may use the same scratch
            first.append(bind_plain(x, weight, bias, out, scratch))
    return in_order([*first, *([rounded.encode] if rounded else []), *then])


def in_order(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]

    def call() -> None:
        for one in calls:
            one()

    return call


def bind_gated_linear(node: Node, inputs: Bound, outputs: Bound, scratch: Tensor) -> Call:
    """Gates go to where the result will be, second products to scratch; of many tokens a panel of rows at a time."""
    x, gate, up = inputs
    x, out = rows_of(x), rows_of(outputs[0])
    n, d_ff = out.shape
    tiled = is_tiled(gate) and is_tiled(up)
    if n <= FEW and (tiled or plain_alone(gate) or plain_alone(up)):
        return bind_gated_few(x, gate, up, out, scratch)
    if not tiled:
        return cpu_float.bind_gated_product(x, gate, up, out, scratch.view(torch.float32), torch.float32)
    use_threads()
    rounded = Activations(x, scratch, (gate, up))
    most = min(UP_ROWS, d_ff)
    flat = out.numpy().reshape(-1)
    ups = rounded.rest.numpy()[: 4 * n * most].view(np.float32)
    close = norms.GATE[n * most >= MANY_NUMBERS]
    calls = [rounded.encode, rounded.bind_product(gate, flat, d_ff)]
    for start in range(0, d_ff, most):
        width = min(most, d_ff - start)
        calls.append(rounded.bind_product(up, ups, width, slice(start, start + width)))
        calls.append(bind_close(close, flat, start, d_ff, ups, n, width))
    return in_order(calls)


def plain_alone(weight: Weight) -> bool:
    """Whether a few tokens are multiplied straight on its F16 or BF16."""
    return weight.format in plain.KERNELS and weight.shape[1] % plain.MULTIPLE == 0


def bind_gated_few(x: Tensor, gate: Weight, up: Weight, out: Tensor, scratch: Tensor) -> Call:
    """A few tokens: both matrices whole, each in its own type."""
    use_threads()
    n, d_ff = out.shape
    second, rest = scratch[: 4 * n * d_ff].view(torch.float32).view(n, d_ff), scratch[gated_bytes(n, d_ff) :]
    flat, ups = out.numpy().reshape(-1), second.numpy().reshape(-1)
    products = bind_products(x, (gate, up), (None, None), (out, second), rest)
    return in_order([products, bind_close(norms.GATE[n * d_ff >= MANY_NUMBERS], flat, 0, d_ff, ups, n, d_ff)])


def gated_bytes(n: int, d_ff: int) -> int:
    """The second products of a few tokens."""
    return part_bytes(((n * d_ff,), np.float32))


def bind_close(
    close: Callable[..., None], out: np.ndarray, start: int, d_ff: int, ups: np.ndarray, n: int, width: int
) -> Call:
    return lambda: close(out, start, d_ff, ups, n, width)


def kernel_arrays(*values: Any) -> list[Any]:
    """Tensors and weights of one dimension or more as flat float32 arrays."""
    tensors = (v.decode() if isinstance(v, Weight) else v for v in values)
    return [t.numpy().reshape(-1) for t in tensors]
