"""RMSNorm and LayerNorm over rows. A program keeps whole rows in registers: each number is read once.

Formulas: `engine/backends/reference.py`. Sums are float32: a channel of 1e5 in the residual stream does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import launch
from .static import Case

if TYPE_CHECKING:
    import torch

NUMBERS = 2048  # that a program holds, at least: several rows when they are short


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm(x, other, weight, total, out, n_rows, eps, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """A program takes ROWS rows. With `other`, x + other is normalised and also written to `total`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D_PAD)
    mask = (row < n_rows)[:, None] & (column < D)[None, :]
    at = row[:, None].to(tl.int64) * D + column[None, :]
    tile = tl.load(x + at, mask=mask, other=0.0)
    if other is not None:
        tile += tl.load(other + at, mask=mask, other=0.0)
        tl.store(total + at, tile, mask=mask)
    factor = tl.rsqrt(tl.sum(tile * tile, 1) / D + eps)
    scale = tl.load(weight + column, mask=column < D, other=0.0)
    tl.store(out + at, tile * factor[:, None] * scale[None, :], mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm(x, weight, bias, out, n_rows, eps, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """A program takes ROWS rows. The variance is that of the differences from the mean: x^2 - mean^2 would cancel."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D_PAD)
    mask = (row < n_rows)[:, None] & (column < D)[None, :]
    at = row[:, None].to(tl.int64) * D + column[None, :]
    tile = tl.load(x + at, mask=mask, other=0.0)
    centred = tl.where(mask, tile - (tl.sum(tile, 1) / D)[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    scale = tl.load(weight + column, mask=column < D, other=0.0)
    shift = tl.load(bias + column, mask=column < D, other=0.0)
    tl.store(out + at, centred * factor[:, None] * scale[None, :] + shift[None, :], mask=mask)


def row_tile(d: int) -> tuple[int, int, int]:
    """For rows of d numbers: d as a power of two, rows of a program, its warps."""
    width = triton.next_power_of_2(d)
    return width, max(1, NUMBERS // width), 8 if width > NUMBERS else 4


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; x, out float32 [..., d], weight float32 [d]."""
    _launch_rms_norm(x, None, weight, eps, None, out)


def add_rms_norm(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, eps: float, total: torch.Tensor, out: torch.Tensor
) -> None:
    """total = a + b, and out its norm; all float32 [..., d], weight [d]. `total` may be a or b."""
    _launch_rms_norm(a, b, weight, eps, total, out)


def _launch_rms_norm(
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    d = x.shape[-1]
    n_rows = x.numel() // d
    width, rows, warps = row_tile(d)
    grid = (triton.cdiv(n_rows, rows),)
    launch(_rms_norm, grid, x, other, weight, total, out, n_rows, eps, d, width, rows, num_warps=warps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias; x, out float32 [..., d], weight, bias float32 [d]."""
    d = x.shape[-1]
    n_rows = x.numel() // d
    width, rows, warps = row_tile(d)
    grid = (triton.cdiv(n_rows, rows),)
    launch(_layer_norm, grid, x, weight, bias, out, n_rows, eps, d, width, rows, num_warps=warps)


def static_cases() -> Iterator[Case]:
    scalars = {"n_rows": "i32", "eps": "fp32"}
    for d in (128, 2560, 4096):
        width, rows, warps = row_tile(d)
        constants = {"D": d, "D_PAD": width, "ROWS": rows}
        plain = dict.fromkeys(("x", "weight", "out"), "*fp32") | scalars
        missing = {"other": None, "total": None}
        yield Case("rms_norm", "F32", {"D": d}, _rms_norm, plain, constants | missing, warps, 1)
        sums = plain | {"other": "*fp32", "total": "*fp32"}
        yield Case("add_rms_norm", "F32", {"D": d}, _rms_norm, sums, constants, warps, 1)
    width, rows, warps = row_tile(1280)
    signature = dict.fromkeys(("x", "weight", "bias", "out"), "*fp32") | scalars
    constants = {"D": 1280, "D_PAD": width, "ROWS": rows}
    yield Case("layer_norm", "F32", {"D": 1280}, _layer_norm, signature, constants, warps, 1)
