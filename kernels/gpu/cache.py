"""The KV cache on a GPU: where its numbers lie, and how a kernel reads and writes rows of it.

A row is the key or the value of one head at one position. Rows of Q8_0 keep their codes and their scales apart, so
that sixteen codes are one load. `load_rows` and `store_rows` are parts of kernels, compiled once for each type of
pointer. Knows no attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..formats import F16, F32, Q8_0, Format
from .launch import launch
from .static import Case

if TYPE_CHECKING:
    import torch

RUN = tl.constexpr(Q8_0.length)  # numbers that share a scale
HALF_MAX = tl.constexpr(65504.0)
FLOAT_TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32
HEADS = 8  # of a token that a program writes


@dataclass(frozen=True)
class GpuCache:
    """Keys or values of one layer. `codes` [n_ctx, n_kv_head, d_head]: float32, float16, or the int8 codes of Q8_0;
    `scales` float16 [n_ctx, n_kv_head, d_head / 32] for Q8_0, else None."""

    codes: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def format(self) -> Format:
        return {4: F32, 2: F16, 1: Q8_0}[self.codes.element_size()]


def cache_planes(n_ctx: int, n_kv_head: int, d_head: int, fmt: Format) -> list[tuple[tuple[int, int, int], str]]:
    """Shape and name of the torch type of each plane of a cache. As many bytes as the file's own layout would take."""
    if fmt is Q8_0:
        assert d_head % Q8_0.length == 0, f"{d_head=}"
        return [((n_ctx, n_kv_head, d_head), "int8"), ((n_ctx, n_kv_head, d_head // Q8_0.length), "float16")]
    return [((n_ctx, n_kv_head, d_head), {F32: "float32", F16: "float16"}[fmt])]


# Parts of kernels.


@triton.jit
def load_rows(codes, scales, rows, wanted, D: tl.constexpr, D_PAD: tl.constexpr):
    """The rows `rows` [n] of a cache as a tile [n, D_PAD]: float32 from float32, float16 from the other types.

    Rows that are not wanted, and columns from D on, are zeros: nothing is read there, so that a NaN left in memory that
    was never written cannot get in.
    """
    columns = tl.arange(0, D_PAD)
    mask = wanted[:, None] & (columns < D)[None, :]
    tile = tl.load(codes + rows[:, None] * D + columns[None, :], mask=mask, other=0)
    if scales is not None:
        runs = tl.arange(0, D_PAD // RUN)
        mask = wanted[:, None] & (runs < D // RUN)[None, :]
        scale = tl.load(scales + rows[:, None] * (D // RUN) + runs[None, :], mask=mask, other=0.0)
        split = tl.reshape(tile.to(tl.float16), (rows.shape[0], D_PAD // RUN, RUN)) * scale[:, :, None]
        tile = tl.reshape(split, (rows.shape[0], D_PAD))
    return tile


@triton.jit
def store_rows(codes, scales, rows, wanted, tile, D: tl.constexpr, D_PAD: tl.constexpr):
    """Writes a tile float32 [n, D_PAD] to the rows `rows` [n] of a cache. Q8_0 as the file format has it: the largest
    of a run gets code 127, ties round away from zero."""
    columns = tl.arange(0, D_PAD)
    mask = wanted[:, None] & (columns < D)[None, :]
    at = codes + rows[:, None] * D + columns[None, :]
    if scales is None:
        tl.store(at, tile.to(codes.dtype.element_ty), mask=mask)
    else:
        split = tl.reshape(tile, (rows.shape[0], D_PAD // RUN, RUN))
        scale = tl.minimum(tl.div_rn(tl.max(tl.abs(split), 2), 127.0), HALF_MAX)
        inverse = tl.where(scale >= FLOAT_TINY, tl.div_rn(1.0, tl.maximum(scale, FLOAT_TINY)), 0.0)
        scaled = tl.minimum(tl.maximum(split * inverse[:, :, None], -127.0), 127.0)
        rounded = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int8)  # the conversion cuts towards zero
        tl.store(at, tl.reshape(rounded, (rows.shape[0], D_PAD)), mask=mask)
        runs = tl.arange(0, D_PAD // RUN)
        mask = wanted[:, None] & (runs < D // RUN)[None, :]
        tl.store(scales + rows[:, None] * (D // RUN) + runs[None, :], scale.to(tl.float16), mask=mask)


# The op by itself.


@triton.jit
def _kv_store(x, positions, codes, scales, n_kv_head, D: tl.constexpr, D_PAD: tl.constexpr, HEADS: tl.constexpr):
    """A program takes HEADS heads of one token."""
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    position = tl.load(positions + token)
    wanted = head < tl.where(position >= 0, n_kv_head, 0)
    tile = load_rows(x, None, token * n_kv_head + head, wanted, D, D_PAD)
    store_rows(codes, scales, position * n_kv_head + head, wanted, tile, D, D_PAD)


def kv_store(rows: torch.Tensor, positions: torch.Tensor, cache: GpuCache) -> None:
    """rows float32 [n_tokens, n_kv_head, d_head] into `cache` at positions int32 [n_tokens]; those at -1 nowhere."""
    n_tokens, n_kv_head, d = rows.shape
    heads = min(HEADS, triton.next_power_of_2(n_kv_head))
    grid = (n_tokens, triton.cdiv(n_kv_head, heads))
    width = triton.next_power_of_2(d)
    launch(_kv_store, grid, rows, positions, cache.codes, cache.scales, n_kv_head, d, width, heads, num_warps=4)


POINTERS = {F32: "*fp32", F16: "*fp16", Q8_0: "*i8"}  # of codes, as Triton names them


def cache_arguments(fmt: Format, *names: str) -> tuple[dict[str, str], dict[str, None]]:
    """For a static case: the types of the planes of the caches `names`, and those that are constantly None.

    The plane of scales is called `NAME_scales`; an empty name stands for `codes` and `scales`.
    """
    planes = {name or "codes": f"{name}_scales" if name else "scales" for name in names}
    signature = dict.fromkeys(planes, POINTERS[fmt])
    if fmt is Q8_0:
        return signature | dict.fromkeys(planes.values(), "*fp16"), {}
    return signature, dict.fromkeys(planes.values())


def static_cases() -> Iterator[Case]:
    for fmt in (F32, F16, Q8_0):
        planes, missing = cache_arguments(fmt, "")
        signature = {"x": "*fp32", "positions": "*i32", "n_kv_head": "i32"} | planes
        constants = {"D": 128, "D_PAD": 128, "HEADS": HEADS}
        yield Case("kv_store", fmt.name, {}, _kv_store, signature, constants | missing, 4, 1)
