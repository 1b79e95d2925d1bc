"""Rows that are picked by number, and arithmetic element by element.

`get_rows` reads a table of any stored type through the tile decoder of that type; the other kernels take float32. Knows
no matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .launch import launch
from .static import Case
from .tiles import TILES, VECTOR

if TYPE_CHECKING:
    import torch

    from .weights import DeviceWeight

PIECES = 64  # of a row of a table that a program decodes
BLOCK = 1024  # numbers of a program of the other kernels
WARPS = 4
DECODE_WARPS = 2  # so that a thread has a vector of four words


# Rows.


@triton.jit
def _get_rows(words, ids, out, n_rows, n_cols, DECODE: tl.constexpr, SHAPE: tl.constexpr, PIECES: tl.constexpr):
    """Grid: (ids, groups of PIECES pieces of a row). See `tiles.py` for what a piece is and how its codes are held."""
    RUNS: tl.constexpr = SHAPE.runs
    PER_WORD: tl.constexpr = SHAPE.per_word
    NEXT_RUN: tl.constexpr = SHAPE.next_run
    NEXT_PIECE: tl.constexpr = SHAPE.next_piece
    WEIGHTS: tl.constexpr = SHAPE.weights
    PLANES: tl.constexpr = SHAPE.planes
    STRIDE: tl.constexpr = SHAPE.stride
    CODE_SHIFT: tl.constexpr = SHAPE.code_shift
    RUN_SHIFT: tl.constexpr = SHAPE.run_shift
    token = tl.program_id(0).to(tl.int64)
    wanted = tl.load(ids + token)
    exists = (wanted >= 0) & (wanted < n_rows)
    row = tl.where(exists, wanted, 0).to(tl.int64)
    piece = (tl.program_id(1) * PIECES + tl.arange(0, PIECES))[None, :, None]
    last = tl.cdiv(n_cols, WEIGHTS) - 1  # beyond it nothing may be read
    start = words + row * STRIDE + tl.zeros((1, 1, 1), tl.int32)
    codes, scales, minima = DECODE(start, tl.minimum(piece, last), PLANES)
    first = piece // 2 * (2 * WEIGHTS) + piece % 2 * NEXT_PIECE + tl.arange(0, VECTOR)[None, None, :] * PER_WORD
    for run in tl.static_range(RUNS):
        for e in tl.static_range(PER_WORD):
            value = codes[run * PER_WORD + e] * 2.0 ** (0 - CODE_SHIFT * e - RUN_SHIFT * run)
            if len(scales) > 0:
                value = value * scales[run]
            if len(minima) > 0:
                value = value - minima[run]
            column = first + run * NEXT_RUN + e
            mask = (column < n_cols) & (piece <= last)
            tl.store(out + token * n_cols + column, tl.where(exists, value, 0.0), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _pick_rows(x, rows, index, out, n_rows, D: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows of the result, blocks of columns). Where there is no x, an index that is no row gives zeros."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    picked = tl.load(index + row).to(tl.int64)
    found = column < tl.where((picked >= 0) & (picked < n_rows), D, 0)
    value = tl.load(rows + picked * D + column, mask=found, other=0.0)
    if x is not None:
        old = tl.load(x + row * D + column, mask=inside, other=0.0)
        value = tl.where(found, old + value if ADD else value, old)
    tl.store(out + row * D + column, value, mask=inside)


def get_rows(table: DeviceWeight, ids: torch.Tensor, out: torch.Tensor) -> None:
    """out float32 [n_tokens, n_cols] = table[ids], ids int32 [n_tokens]. An id outside the table gives zeros."""
    shape = table.shape
    grid = (ids.numel(), triton.cdiv(table.n_cols, shape.weights * PIECES))
    sizes = (table.n_rows, table.n_cols, table.tile.decode, shape, PIECES)
    launch(_get_rows, grid, table.words, ids, out, *sizes, num_warps=DECODE_WARPS)


def take_rows(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """out [m, d] = x[index]; float32, index int32 [m]."""
    _launch_pick(None, x, index, out, False)


def put_rows(x: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """out [n, d] = x with row i replaced by rows[index[i]] wherever index[i] >= 0; out may be x."""
    _launch_pick(x, rows, index, out, False)


def add_rows(x: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """out [n, d] = x with rows[index[i]] added to row i wherever index[i] >= 0; out may be x."""
    _launch_pick(x, rows, index, out, True)


def _launch_pick(x: torch.Tensor | None, rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    n_rows, d = rows.shape
    grid = (index.numel(), triton.cdiv(d, BLOCK))
    launch(_pick_rows, grid, x, rows, index, out, n_rows, d, add, BLOCK, num_warps=WARPS)


# Element by element. What is done to a number is an argument.


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _silu(x, unused):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(x, unused):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gate(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["n", "n_b"])
def _map(a, b, out, n, n_b, FUNCTION: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr):
    """out = FUNCTION(a, b); with REPEAT, b has n_b numbers and starts again and again."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(a + i, mask=i < n)
    second = first
    if b is not None:
        second = tl.load(b + (i % n_b if REPEAT else i), mask=i < n)
    tl.store(out + i, FUNCTION(first, second), mask=i < n)


def add(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a + b; b has a's shape or its trailing dimensions. In this and in the next, out may be an operand."""
    _launch_map(_sum, a, b, out)


def mul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a * b of one shape."""
    _launch_map(_product, a, b, out)


def silu(x: torch.Tensor, out: torch.Tensor) -> None:
    """out = x * sigmoid(x)."""
    _launch_map(_silu, x, None, out)


def gelu(x: torch.Tensor, out: torch.Tensor) -> None:
    """out = x * Phi(x), with the exact error function."""
    _launch_map(_gelu, x, None, out)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up of one shape."""
    _launch_map(_gate, gate, up, out)


def _launch_map(function: Any, a: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor) -> None:
    n = a.numel()
    n_b = n if b is None else b.numel()
    launch(_map, (triton.cdiv(n, BLOCK),), a, b, out, n, n_b, function, n_b != n, BLOCK, num_warps=WARPS)


def static_cases() -> Iterator[Case]:
    n_cols = 2560
    sizes = {"n_rows": "i32", "n_cols": "i32:16"}
    for fmt, tile in TILES.items():
        constants = {"DECODE": tile.decode, "SHAPE": tile.matrix(n_cols), "PIECES": PIECES}
        signature = {"words": "*i32", "ids": "*i32", "out": "*fp32"} | sizes
        yield Case("get_rows", fmt.name, {}, _get_rows, signature, constants, DECODE_WARPS, 1, ("words",))
    signature = {"x": "*fp32", "rows": "*fp32", "index": "*i32", "out": "*fp32", "n_rows": "i32"}
    constants = {"D": n_cols, "ADD": True, "BLOCK": BLOCK}
    yield Case("add_rows", "F32", {}, _pick_rows, signature, constants, WARPS, 1)
    signature = dict.fromkeys(("a", "b", "out"), "*fp32") | {"n": "i32:16", "n_b": "i32:16"}
    for name, function in (("add", _sum), ("silu_mul", _gate)):
        constants = {"FUNCTION": function, "REPEAT": False, "BLOCK": BLOCK}
        yield Case(name, "F32", {}, _map, signature, constants, WARPS, 1)
    signature = {name: kind for name, kind in signature.items() if name != "b"}
    constants = {"FUNCTION": _gelu, "REPEAT": False, "BLOCK": BLOCK, "b": None}
    yield Case("gelu", "F32", {}, _map, signature, constants, WARPS, 1)
