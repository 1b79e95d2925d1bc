"""Up to 16 tokens for the mat-vec: prepared in the caller's scratch, and the launches of their products.

`linear.py` says which of them a product takes. Knows no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton

from .activations import COLS, padded_cols, prepare_few, record_words
from .launch import launch
from .matvec import matvec, matvec_gated, matvec_three
from .tune import PASS, Config, ahead_of, lanes_of
from .units import Unit
from .weights import DeviceWeight

TOGETHER = 3  # weights that the mat-vec takes in one launch
CHUNK = 16  # records that a program prepares where there is no norm
FLOAT = 4  # bytes

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


def few_bytes(n_tokens: int, n_cols: int) -> int:
    """Scratch for prepared tokens, whatever the types of the weights."""
    return _tokens_of(n_tokens) * (record_words(n_cols) + padded_cols(n_cols)) * FLOAT


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


def prepare_tokens(
    x: torch.Tensor, norm: Norm | None, weights: Sequence[DeviceWeight], scratch: torch.Tensor, exact: bool
) -> Tokens:
    """The tokens in the forms that the weights need, in the scratch."""
    n_tokens, n_cols = x.shape
    needed, n_records, padded = few_bytes(n_tokens, n_cols), record_words(n_cols), padded_cols(n_cols)
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
        *norm_operands(norm),
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


def start_matvec(
    tokens: Tokens,
    weight: DeviceWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    residual: torch.Tensor | None,
    epilogue: str,
    best: Best | None,
    pick: Picker,
) -> None:
    cut = cut_few(pick, (weight,), tokens.n)
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


def start_three(
    tokens: Tokens,
    weights: Sequence[DeviceWeight],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor | None],
    pick: Picker,
) -> None:
    """Two or three weights."""
    cut = cut_few(pick, weights, tokens.n)
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


def start_gated(tokens: Tokens, gate: DeviceWeight, up: DeviceWeight, out: torch.Tensor, pick: Picker) -> None:
    cut = cut_few(pick, (gate, up), tokens.n)
    operands = [tokens.operand(w, cut) for w in (gate, up)]
    launch(
        matvec_gated,
        (tokens.passes * triton.cdiv(gate.n_rows, cut.rows),),
        *(o.x for o in operands),
        gate.words,
        up.words,
        out,
        gate.n_rows,
        tokens.n,
        *(f for w in (gate, up) for f in (w.kind.load, w.kind.decode)),
        *(o.unit for o in operands),
        tokens.n_cols,
        *(o.pitch for o in operands),
        tokens.passes,
        tokens.at_once,
        cut.rows,
        *(o.lanes for o in operands),
        *(o.ahead for o in operands),
        num_warps=cut.warps,
        num_stages=1,
    )


def cut_of(pick: Picker, kernel: str, weight: DeviceWeight, n_tokens: int) -> Config:
    return pick(kernel, weight.format.name, n_tokens, weight.n_rows, weight.n_cols)


def cut_few(pick: Picker, weights: Sequence[DeviceWeight], n_tokens: int) -> Config:
    """The cut of the weight with the fewest lanes, whose rows are enough for the threads of the others too."""
    return cut_of(pick, "matvec", max(weights, key=lambda w: w.kind.unit.weights), n_tokens)


def norm_operands(norm: Norm | None) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    return (norm.weight, norm.bias, norm.eps) if norm else (None, None, 0.0)
