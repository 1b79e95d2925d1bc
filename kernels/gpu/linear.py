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
from .activations import COLS, padded_cols, prepare_few, record_words
from .launch import launch
from .matmul import matmul, prepare
from .matvec import matvec, matvec_gated, matvec_three
from .tiles import TILES
from .tune import FEW, PASS, Config, ahead_of, lanes_of, pick
from .units import Unit
from .weights import DeviceWeight

TOGETHER = 3  # weights that the mat-vec takes in one launch
WARP = 32  # threads
CHUNK = 16  # records that a program prepares where there is no norm
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
    """Scratch that `linear` and `gated_linear` need: the prepared tokens, whatever the types of the weights."""
    if n_tokens <= FEW:
        return _tokens_of(n_tokens) * (record_words(n_cols) + padded_cols(n_cols)) * FLOAT
    return _align(n_tokens * pitch_of(n_cols) * HALF) + _align(n_tokens * FLOAT)


def best_programs(weight: DeviceWeight, n_tokens: int, pick: Picker = pick) -> int:
    """Rows of `Best` that a product with `weight` writes."""
    return triton.cdiv(weight.n_rows, _cut_few(pick, (weight,), n_tokens).rows)


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
    tokens = _prepare_few(x, norm, weights, scratch, exact)
    for first in range(0, len(weights), TOGETHER):
        part = slice(first, first + TOGETHER)
        if len(weights[part]) == 1:
            _matvec(tokens, weights[first], biases[first], outs[first], residual, epilogue, best, pick)
        else:
            _matvec_three(tokens, weights[part], biases[part], outs[part], pick)


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
    n_tokens, n_cols = _check(x, (gate, up))
    assert gate.n_rows == up.n_rows, f"{gate.n_rows=} {up.n_rows=}"
    if n_tokens > FEW:
        halves, factors = _prepare(x, norm, scratch)
        _matmul(halves, factors, n_tokens, gate, up, None, None, out, "none", pick)
        return
    tokens = _prepare_few(x, norm, (gate, up), scratch, exact)
    cut = _cut_few(pick, (gate, up), n_tokens)
    operands = [tokens.operand(w, cut) for w in (gate, up)]
    launch(
        matvec_gated,
        (tokens.passes * triton.cdiv(gate.n_rows, cut.rows),),
        *(o.x for o in operands),
        gate.words,
        up.words,
        out,
        gate.n_rows,
        n_tokens,
        *(f for w in (gate, up) for f in (w.kind.load, w.kind.decode)),
        *(o.unit for o in operands),
        n_cols,
        *(o.pitch for o in operands),
        tokens.passes,
        tokens.at_once,
        cut.rows,
        *(o.lanes for o in operands),
        *(o.ahead for o in operands),
        num_warps=cut.warps,
        num_stages=1,
    )


@dataclass(frozen=True)
class Operand:
    """Prepared tokens as one weight meets them: `pitch` words from one to the next; and how its rows are shared out."""

    x: torch.Tensor
    unit: Unit
    pitch: int
    lanes: int
    ahead: int


@dataclass(frozen=True)
class Tokens:
    """Up to 16 tokens prepared for the mat-vec, `at_once` in a pass: `records` int32 and `floats` float32, of which
    only what the weights need is filled. `n` tokens are real, the rest repeat the last."""

    n: int
    n_cols: int
    records: torch.Tensor
    floats: torch.Tensor
    exact: bool

    @property
    def at_once(self) -> int:
        return min(PASS, _tokens_of(self.n))

    @property
    def passes(self) -> int:
        return triton.cdiv(self.n, PASS)

    def operand(self, weight: DeviceWeight, cut: Config) -> Operand:
        unit = weight.kind.matrix(weight.n_cols, self.exact)
        x, pitch = (
            (self.records, record_words(self.n_cols)) if unit.rounded else (self.floats, padded_cols(self.n_cols))
        )
        lanes = lanes_of(cut, unit.weights)
        return Operand(x, unit, pitch, lanes, ahead_of(cut, unit.weights, self.n_cols))


def _tokens_of(n_tokens: int) -> int:
    """Tokens that are prepared: a power of two, so that a kernel is compiled for few numbers of them."""
    return triton.next_power_of_2(n_tokens)


def _prepare_few(
    x: torch.Tensor, norm: Norm | None, weights: Sequence[DeviceWeight], scratch: torch.Tensor, exact: bool
) -> Tokens:
    """The tokens in the forms that the weights need, in the scratch."""
    n_tokens, n_cols = x.shape
    needed, n_records, padded = scratch_bytes(n_tokens, n_cols), record_words(n_cols), padded_cols(n_cols)
    assert scratch.numel() >= needed, f"{scratch.numel()=} {needed=}"
    n_prepared = _tokens_of(n_tokens)
    records = scratch[: n_prepared * n_records * FLOAT].view(torch.int32)
    floats = scratch[n_prepared * n_records * FLOAT : needed].view(torch.float32)
    rounded = {w.kind.unit.coded and not exact for w in weights}
    chunk = triton.next_power_of_2(padded // COLS.value) if norm else CHUNK
    launch(
        prepare_few,
        (n_prepared, triton.cdiv(padded // COLS.value, chunk)),
        x,
        *_norm(norm),
        records if True in rounded else None,
        floats if False in rounded else None,
        n_tokens,
        N_COLS=n_cols,
        PADDED=padded,
        NORM=norm.kind if norm else "none",
        CHUNK=chunk,
        num_warps=8 if norm else 4,
    )
    return Tokens(n_tokens, n_cols, records, floats, exact)


def _matvec(
    tokens: Tokens,
    weight: DeviceWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    residual: torch.Tensor | None,
    epilogue: str,
    best: Best | None,
    pick: Picker,
) -> None:
    cut = _cut_few(pick, (weight,), tokens.n)
    o = tokens.operand(weight, cut)
    launch(
        matvec,
        (tokens.passes * triton.cdiv(weight.n_rows, cut.rows),),
        o.x,
        weight.words,
        bias,
        residual,
        out,
        best.values if best else None,
        best.indices if best else None,
        weight.n_rows,
        tokens.n,
        weight.kind.load,
        weight.kind.decode,
        o.unit,
        N_COLS=weight.n_cols,
        PITCH=o.pitch,
        GELU=epilogue == "gelu",
        PASSES=tokens.passes,
        TOKENS=tokens.at_once,
        ROWS=cut.rows,
        LANES=o.lanes,
        AHEAD=o.ahead,
        num_warps=cut.warps,
        num_stages=1,
    )


def _matvec_three(
    tokens: Tokens,
    weights: Sequence[DeviceWeight],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor | None],
    pick: Picker,
) -> None:
    """Two or three weights."""
    cut = _cut_few(pick, weights, tokens.n)
    absent = [None] * (TOGETHER - len(weights))
    rows = [w.n_rows for w in weights]
    operands = [tokens.operand(w, cut) for w in weights]
    launch(
        matvec_three,
        (tokens.passes * sum(triton.cdiv(n, cut.rows) for n in rows),),
        *(o.x for o in operands),
        *absent,
        *(w.words for w in weights),
        *absent,
        *biases,
        *absent,
        *outs,
        *absent,
        *rows,
        *absent,
        tokens.n,
        *(f for w in weights for f in (w.kind.load, w.kind.decode)),
        *absent,
        *absent,
        *(o.unit for o in operands),
        *absent,
        tokens.n_cols,
        *(o.pitch for o in operands),
        *absent,
        tokens.passes,
        tokens.at_once,
        cut.rows,
        *(o.lanes for o in operands),
        *absent,
        *(o.ahead for o in operands),
        *absent,
        num_warps=cut.warps,
        num_stages=1,
    )


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


def _cut_few(pick: Picker, weights: Sequence[DeviceWeight], n_tokens: int) -> Config:
    """The cut of the weight with the fewest lanes, whose rows are enough for the threads of the others too."""
    return _cut(pick, "matvec", max(weights, key=lambda w: w.kind.unit.weights), n_tokens)


def pieces_of(fmt: Format, cut: Config) -> int:
    """Pieces of a row that a mat-mat takes at once; a power of two."""
    return max(1, cut.cols // TILES[fmt].shape.weights)


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
