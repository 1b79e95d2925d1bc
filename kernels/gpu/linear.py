"""Linear maps on the GPU: which kernel, how it is cut, and its launch. Knows no graph; `tune.py` knows the cuts.

Every function here starts kernels and returns at once. Buffers are the caller's: nothing is allocated, so that launches
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from ..formats import Format
from .few import (
    FLOAT,
    TOGETHER,
    Best,
    Norm,
    Picker,
    cut_few,
    cut_of,
    few_bytes,
    norm_operands,
    prepare_tokens,
    start_gated,
    start_matvec,
    start_three,
)
from .launch import launch
from .matmul import matmul, prepare
from .tiles import TILES
from .tune import FEW, Config, pick
from .weights import DeviceWeight

WARP = 32  # threads
HALF = 2  # bytes
ALIGN = 16  # bytes


def scratch_bytes(n_tokens: int, n_cols: int) -> int:
    """Scratch that `linear` and `gated_linear` need: the prepared tokens, whatever the types of the weights."""
    if n_tokens <= FEW:
        return few_bytes(n_tokens, n_cols)
    return _align(n_tokens * pitch_of(n_cols) * HALF) + _align(n_tokens * FLOAT)


def best_programs(weight: DeviceWeight, n_tokens: int, pick: Picker = pick) -> int:
    """Rows of `Best` that a product with `weight` writes."""
    return triton.cdiv(weight.n_rows, cut_few(pick, (weight,), n_tokens).rows)


def linear(
    x: torch.Tensor,
    weights: Sequence[DeviceWeight],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor | None],
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    epilogue: str = "none",
    scratch: torch.Tensor,
    best: Best | None = None,
    exact: bool = False,
    pick: Picker = pick,
) -> None:
    """outs[i] = x weights[i]^T + biases[i], after `norm` of x, then the epilogue ("none" or "gelu"), then + residual.

    x float32 [n_tokens, n_cols]; biases [n_rows]; outs and residual [n_tokens, n_rows], contiguous; `residual` may be
    the out itself. `scratch`: uint8, `scratch_bytes` of it. Residual, epilogue and `best` are for one weight; with
    `best`, which is for up to 16 tokens, an out may be None. `exact`: up to 16 tokens are multiplied in float32, where
    they are rounded to bytes else (quantised weights); more are rounded to f16 in any case.
    """
    assert epilogue in ("none", "gelu"), f"{epilogue=}"
    assert len(weights) == 1 or (residual is None and best is None and epilogue == "none"), f"{len(weights)} weights"
    n_tokens, _ = _check(x, weights)
    if n_tokens > FEW:
        assert best is None, f"the largest outputs are found for up to {FEW} tokens, not {n_tokens}"
        halves, factors = _prepare(x, norm, scratch)
        for weight, bias, out in zip(weights, biases, outs, strict=True):
            _matmul(halves, factors, n_tokens, weight, None, bias, residual, out, epilogue, pick)
        return
    tokens = prepare_tokens(x, norm, weights, scratch, exact)
    for first in range(0, len(weights), TOGETHER):
        part = slice(first, first + TOGETHER)
        if len(weights[part]) == 1:
            start_matvec(tokens, weights[first], biases[first], outs[first], residual, epilogue, best, pick)
        else:
            start_three(tokens, weights[part], biases[part], outs[part], pick)


def gated_linear(
    x: torch.Tensor,
    gate: DeviceWeight,
    up: DeviceWeight,
    out: torch.Tensor,
    *,
    norm: Norm | None = None,
    scratch: torch.Tensor,
    exact: bool = False,
    pick: Picker = pick,
) -> None:
    """out [n_tokens, n_rows] = silu(x gate^T) * (x up^T), after `norm` of x; see `linear`."""
    n_tokens, _ = _check(x, (gate, up))
    assert gate.n_rows == up.n_rows, f"{gate.n_rows=} {up.n_rows=}"
    if n_tokens > FEW:
        halves, factors = _prepare(x, norm, scratch)
        _matmul(halves, factors, n_tokens, gate, up, None, None, out, "none", pick)
        return
    tokens = prepare_tokens(x, norm, (gate, up), scratch, exact)
    start_gated(tokens, gate, up, out, pick)


def _prepare(x: torch.Tensor, norm: Norm | None, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens as f16 and their factors, in the scratch."""
    n_tokens, n_cols = x.shape
    pitch, needed = pitch_of(n_cols), scratch_bytes(n_tokens, n_cols)
    assert scratch.numel() >= needed, f"{scratch.numel()=} {needed=}"
    n_bytes = n_tokens * pitch * HALF
    halves = scratch[:n_bytes].view(torch.float16)
    factors = scratch[_align(n_bytes) :][: n_tokens * FLOAT].view(torch.float32)
    block = max(WARP, triton.next_power_of_2(n_cols))
    launch(
        prepare,
        (n_tokens,),
        x,
        *norm_operands(norm),
        halves,
        factors,
        N_COLS=n_cols,
        PITCH=pitch,
        NORM=norm.kind if norm else "none",
        BLOCK=block,
        num_warps=4,
    )
    return halves, factors


def _matmul(
    halves: torch.Tensor,
    factors: torch.Tensor,
    n_tokens: int,
    weight: DeviceWeight,
    up: DeviceWeight | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    epilogue: str,
    pick: Picker,
) -> None:
    cut = cut_of(pick, "matmul_gated" if up else "matmul", weight, n_tokens)
    launch(
        matmul,
        (triton.cdiv(weight.n_rows, cut.rows) * triton.cdiv(n_tokens, cut.tokens),),
        halves,
        factors,
        weight.words,
        up.words if up else None,
        bias,
        residual,
        out,
        weight.n_rows,
        n_tokens,
        DECODE=weight.tile.decode,
        DECODE_UP=up.tile.decode if up else None,
        SHAPE=weight.shape,
        SHAPE_UP=up.shape if up else None,
        N_COLS=weight.n_cols,
        PITCH=pitch_of(weight.n_cols),
        GELU=epilogue == "gelu",
        ROWS=cut.rows,
        PIECES=pieces_of(weight.format, cut),
        PIECES_UP=pieces_of(up.format, cut) if up else 0,
        TOKENS=cut.tokens,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


def pieces_of(fmt: Format, cut: Config) -> int:
    """Pieces of a row that a mat-mat takes at once; a power of two."""
    return max(1, cut.cols // TILES[fmt].shape.weights)


def _check(x: torch.Tensor, weights: Sequence[DeviceWeight]) -> tuple[int, int]:
    n_tokens, n_cols = x.shape
    assert x.is_contiguous(), f"{x.stride()=}"
    assert all(w.n_cols == n_cols for w in weights), f"{x.shape=} {[(w.n_rows, w.n_cols) for w in weights]}"
    return n_tokens, n_cols


def pitch_of(n_cols: int) -> int:
    """Columns from one prepared token to the next: multiples of 16 bytes."""
    return _align(n_cols * HALF) // HALF


def _align(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN) * ALIGN
