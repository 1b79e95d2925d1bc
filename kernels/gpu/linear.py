"""Linear maps on the GPU: which kernel, how it is cut, and its launch. Knows no graph; `tune.py` knows the cuts.

Every function here starts kernels and returns at once. Buffers are the caller's: nothing is allocated, so that launches
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton

from ..formats import Format
from .launch import launch
from .matmul import matmul, prepare
from .matvec import matvec, matvec_gated, matvec_three
from .tiles import TILES, VECTOR
from .tune import Config, pick
from .weights import DeviceWeight

FEW = 8  # tokens that the mat-vec takes
TOGETHER = 3  # weights that it takes in one launch
WARP = 32  # threads
HALF, FLOAT = 2, 4  # bytes
ALIGN = 16  # bytes

Picker = Callable[[str, str, int, int, int], Config]


@dataclass(frozen=True)
class Norm:
    """What is done to each token before a product: "rms" (`weight`) or "layer" (`weight`, `bias`), float32 [n_cols]."""

    kind: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __post_init__(self) -> None:
        assert (self.kind, self.bias is None) in (("rms", True), ("layer", False)), f"{self.kind=} {self.bias=}"


@dataclass(frozen=True)
class Best:
    """Where the mat-vec leaves the largest output of each program, for a token: `values` float32 and `indices` int32,
    both [n_programs, n_tokens], of which the first `best_programs` rows are written. Of equal outputs the first counts,
    within a program as over programs, whose rows follow each other."""

    values: torch.Tensor
    indices: torch.Tensor


def scratch_bytes(n_tokens: int, n_cols: int) -> int:
    """Scratch that `linear` and `gated_linear` need: the prepared tokens of a mat-mat; none for a few tokens."""
    if n_tokens <= FEW:
        return 0
    return _align(n_tokens * pitch_of(n_cols) * HALF) + _align(n_tokens * FLOAT)


def best_programs(weight: DeviceWeight, n_tokens: int, pick: Picker = pick) -> int:
    """Rows of `Best` that a product with `weight` writes."""
    return triton.cdiv(weight.n_rows, _cut(pick, "matvec", weight, n_tokens).rows)


def linear(
    x: torch.Tensor,
    weights: Sequence[DeviceWeight],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor | None],
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    epilogue: str = "none",
    scratch: torch.Tensor | None = None,
    best: Best | None = None,
    pick: Picker = pick,
) -> None:
    """outs[i] = x weights[i]^T + biases[i], after `norm` of x, then the epilogue ("none" or "gelu"), then + residual.

    x float32 [n_tokens, n_cols]; biases [n_rows]; outs and residual [n_tokens, n_rows], contiguous; `residual` may be
    the out itself. `scratch`: uint8, `scratch_bytes` of it. Residual, epilogue and `best` are for one weight; with
    `best`, which is for up to 8 tokens, an out may be None.
    """
    assert epilogue in ("none", "gelu"), f"{epilogue=}"
    assert len(weights) == 1 or (residual is None and best is None and epilogue == "none"), f"{len(weights)} weights"
    n_tokens, _ = _check(x, weights)
    if n_tokens > FEW:
        assert best is None, f"the largest outputs are found for up to {FEW} tokens, not {n_tokens}"
        halves, factors = _prepare(x, norm, scratch)
        for weight, bias, out in zip(weights, biases, outs, strict=True):
            _matmul(halves, factors, n_tokens, weight, None, bias, residual, out, epilogue, pick)
    elif len(weights) == 1:
        _matvec(x, weights[0], biases[0], outs[0], norm, residual, epilogue, best, pick)
    else:
        for first in range(0, len(weights), TOGETHER):
            part = slice(first, first + TOGETHER)
            if len(weights[part]) == 1:
                _matvec(x, weights[first], biases[first], outs[first], norm, None, epilogue, None, pick)
            else:
                _matvec_three(x, weights[part], biases[part], outs[part], norm, pick)


def gated_linear(
    x: torch.Tensor,
    gate: DeviceWeight,
    up: DeviceWeight,
    out: torch.Tensor,
    *,
    norm: Norm | None = None,
    scratch: torch.Tensor | None = None,
    pick: Picker = pick,
) -> None:
    """out [n_tokens, n_rows] = silu(x gate^T) * (x up^T), after `norm` of x; see `linear`."""
    n_tokens, n_cols = _check(x, (gate, up))
    assert gate.n_rows == up.n_rows, f"{gate.n_rows=} {up.n_rows=}"
    if n_tokens > FEW:
        halves, factors = _prepare(x, norm, scratch)
        _matmul(halves, factors, n_tokens, gate, up, None, None, out, "none", pick)
        return
    cut = _cut(pick, "matvec", gate, n_tokens)
    launch(
        matvec_gated,
        (triton.cdiv(gate.n_rows, cut.rows),),
        x,
        *_norm(norm),
        gate.words,
        up.words,
        out,
        gate.n_rows,
        *(w.tile.decode for w in (gate, up)),
        *(w.shape for w in (gate, up)),
        N_COLS=n_cols,
        NORM=norm.kind if norm else "none",
        TOKENS=n_tokens,
        ROWS=cut.rows,
        PIECES0=few_pieces_of(gate.format, cut),
        PIECES1=few_pieces_of(up.format, cut),
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


def _matvec(
    x: torch.Tensor,
    weight: DeviceWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    norm: Norm | None,
    residual: torch.Tensor | None,
    epilogue: str,
    best: Best | None,
    pick: Picker,
) -> None:
    n_tokens = x.shape[0]
    cut = _cut(pick, "matvec", weight, n_tokens)
    launch(
        matvec,
        (triton.cdiv(weight.n_rows, cut.rows),),
        x,
        *_norm(norm),
        weight.words,
        bias,
        residual,
        out,
        best.values if best else None,
        best.indices if best else None,
        weight.n_rows,
        weight.tile.decode,
        weight.shape,
        N_COLS=weight.n_cols,
        NORM=norm.kind if norm else "none",
        GELU=epilogue == "gelu",
        TOKENS=n_tokens,
        ROWS=cut.rows,
        PIECES=few_pieces_of(weight.format, cut),
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


def _matvec_three(
    x: torch.Tensor,
    weights: Sequence[DeviceWeight],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor | None],
    norm: Norm | None,
    pick: Picker,
) -> None:
    n_tokens = x.shape[0]
    cut = _cut(pick, "matvec", weights[0], n_tokens)
    absent = [None] * (TOGETHER - len(weights))
    rows = [w.n_rows for w in weights]
    launch(
        matvec_three,
        (sum(triton.cdiv(n, cut.rows) for n in rows),),
        x,
        *_norm(norm),
        *(w.words for w in weights),
        *absent,
        *biases,
        *absent,
        *outs,
        *absent,
        *rows,
        *absent,
        *(w.tile.decode for w in weights),
        *absent,
        *(w.shape for w in weights),
        *absent,
        weights[0].n_cols,
        norm.kind if norm else "none",
        n_tokens,
        cut.rows,
        *(few_pieces_of(w.format, cut) for w in weights),
        *absent,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


def _prepare(x: torch.Tensor, norm: Norm | None, scratch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens as f16 and their factors, in the scratch."""
    n_tokens, n_cols = x.shape
    pitch, needed = pitch_of(n_cols), scratch_bytes(n_tokens, n_cols)
    assert scratch is not None, f"{needed} bytes of scratch are needed"
    assert scratch.numel() >= needed, f"{scratch.numel()=} {needed=}"
    n_bytes = n_tokens * pitch * HALF
    halves = scratch[:n_bytes].view(torch.float16)
    factors = scratch[_align(n_bytes) :][: n_tokens * FLOAT].view(torch.float32)
    block = max(WARP, triton.next_power_of_2(n_cols))
    launch(
        prepare,
        (n_tokens,),
        x,
        *_norm(norm),
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
    cut = _cut(pick, "matmul_gated" if up else "matmul", weight, n_tokens)
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


def _cut(pick: Picker, kernel: str, weight: DeviceWeight, n_tokens: int) -> Config:
    return pick(kernel, weight.format.name, n_tokens, weight.n_rows, weight.n_cols)


def pieces_of(fmt: Format, cut: Config) -> int:
    """Pieces of a row that a mat-mat takes at once; a power of two."""
    return max(1, cut.cols // TILES[fmt].shape.weights)


def few_pieces_of(fmt: Format, cut: Config) -> int:
    """As `pieces_of`, for the mat-vec: so few that there are twice as many threads as words of a row. Then Triton has
    every thread load the activations that it needs; else they would be handed around through shared memory."""
    return min(pieces_of(fmt, cut), cut.warps * WARP // (2 * VECTOR.value))


def _norm(norm: Norm | None) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    return (norm.weight, norm.bias, norm.eps) if norm else (None, None, 0.0)


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
