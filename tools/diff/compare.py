"""Compares a model with a source of stages as they are produced; nothing is kept but numbers.

Knows stages, metrics and limits. Does not know where the other side's arrays come from, nor how results look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .metrics import Comparison
from .request import FORCED, GENERATED, IDS, MEL, Array, Blocks, DiffError, Enough, Part, blocks_of
from .thresholds import Limits, Override, apply_overrides, failures, limits_for, noise_of, token_limits
from .walk import STEM, Walk, flatten, op_names, weight_names


@dataclass
class StageResult:
    """One compared value. `given` are the stages it was computed from here, by `ops` with weights of `types`
    ({tensor: type here, or "here / there"}); `failures` is empty when all limits hold."""

    name: str
    kind: str  # "stage", "op" or "tokens"
    shape: tuple[int, ...]
    reference_shape: tuple[int, ...]
    rows: str = "all"
    given: list[str] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    positions: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    bad_rows: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass
class TokenResult:
    """Both sides' greedy answers, and this side's choices along the reference's answer. `margin`: by how much this
    side's logit of its own token exceeds that of the reference's where the answers first part; `margins`: the same
    at every token of the reference's answer. `p_reference`: this side's probability of each of them."""

    reference: list[int]
    own: list[int]
    forced: list[int]
    first_mismatch: int | None
    margin: float
    limits: Limits
    failures: list[str]
    p_reference: list[float]
    margins: list[float]

    @property
    def passed(self) -> bool:
        return not self.failures


class Comparer:
    """Takes the reference's stages one after another, computes its own side's, and collects results.

    `isolate`: each stage is computed from the reference's stages before it, not from its own. `formats`: the type of
    each tensor on the reference's side, {} when its weights are exact; `rounds`: types whose activations it rounds to
    int8. `last`: the stage after which to stop.
    """

    def __init__(
        self,
        walk: Walk,
        wanted: Sequence[str],
        *,
        isolate: bool = False,
        formats: Mapping[str, str] | None = None,
        rounds: frozenset[str] = frozenset(),
        overrides: Sequence[Override] = (),
        last: str | None = None,
        on_result: Callable[[StageResult], None] = lambda result: None,
    ) -> None:
        self.walk, self.wanted, self.isolate, self.last = walk, list(wanted), isolate, last
        self._formats, self._overrides, self._on_result = formats or {}, overrides, on_result
        self._rounds = walk.model.backend.rounds | rounds
        self._own_formats = {name: t.format.name for name, t in walk.model.file.tensors.items()}
        self._seen_types: dict[str, str] = {}
        self.results: list[StageResult] = []
        self.tokens: TokenResult | None = None
        self.reference_ids: np.ndarray | None = None

    def take(self, name: str, value: Array, part: Part = "all") -> None:
        """One value of the reference; raises Enough after the last one."""
        if name in (GENERATED, FORCED):
            self._take_tokens(name, value)
        elif name in self.wanted:
            result = self._compare(name, value, part)
            self.results.append(result)
            self._on_result(result)
            if name in self.walk.outline.stages:
                self.walk.release(self.wanted[self.wanted.index(name) + 1 :])
        if name == self.last:
            raise Enough

    def _compare(self, name: str, value: Array, part: Part) -> StageResult:
        result = self._describe(name, part)
        try:
            own = self.walk.compute(name)
        except DiffError as error:
            result.reference_shape, result.failures = tuple(value.shape), [str(error)]
            return result
        reference = value if isinstance(value, Blocks) else self._as_rows(name, value)
        result.reference_shape = tuple(reference.shape)
        result.shape = tuple(own.shape)
        fits = part == "all" and own.shape == reference.shape
        if not isinstance(own, Blocks):
            self.walk.known[name] = np.ascontiguousarray(reference) if self.isolate and fits else own
        self._measure(result, *self._align(name, own, reference, part))
        return result

    def _describe(self, name: str, part: Part) -> StageResult:
        """What will be done for a value, and the limits that follow."""
        outline, scope = self.walk.outline, "model"
        needs, nodes = outline.trace([name], self.walk.known) if name in outline.values else ([], [])
        types = {w: self._own_formats.get(w, "?") for w in weight_names(nodes)}
        self._seen_types |= types
        kind = "stage" if name in (MEL, IDS) or name in outline.stages else "op"
        if self.isolate:
            scope = "op" if kind == "op" else "stage"
        noise = self._noise(types if self.isolate else self._seen_types)
        n_rows = len(self.walk.prompt.ids)
        limits = apply_overrides(name, limits_for(name, op_names(nodes), noise, scope, n_rows), self._overrides)
        both = {w: t if self._formats.get(w, t) == t else f"{t} / {self._formats[w]}" for w, t in types.items()}
        return StageResult(name, kind, (), (), part, needs, op_names(nodes), both, limits=limits)

    def _noise(self, types: Mapping[str, str]) -> float:
        return noise_of(((t, self._formats.get(w)) for w, t in types.items()), self._rounds)

    def _as_rows(self, name: str, value: np.ndarray) -> np.ndarray:
        """The reference's array as `Walk` has it; windows without their padding."""
        if name in self.walk.outline.encoder.stages and value.ndim > 2 and not name.startswith(STEM):
            lengths = self.walk.lengths
            if len(value) == len(lengths) and value.shape[1] >= max(lengths):
                return flatten(name, value, lengths)
            return value
        if name in self.walk.outline.decoder.stages and value.ndim > 2:
            return value.reshape(len(value), -1)
        return value

    def _align(self, name: str, own: Array, reference: Array, part: Part) -> tuple[Array, Array]:
        """Both as rows; where the reference has but some, those of this side."""
        if name == MEL:
            return own.T, reference.T
        if part == "all":
            return own, reference
        if isinstance(own, Blocks):
            own = np.concatenate(list(own.blocks))
        rows = own[: self.walk.lengths[0]] if part == "first window" else own[-1:]
        return rows, np.atleast_2d(reference)

    def _measure(self, result: StageResult, own: Array, reference: Array) -> None:
        if tuple(own.shape) != tuple(reference.shape):
            result.failures = [f"shape {list(own.shape)} here, {list(reference.shape)} in the reference"]
            return
        if result.name == IDS:
            wrong = np.flatnonzero(own != reference)
            result.metrics = {"mismatches": float(len(wrong))}
            result.failures = failures(result.metrics, result.limits)
            result.bad_rows = (
                {"first": int(wrong[0]), "n": len(wrong), "rows": wrong[:8].tolist()} if len(wrong) else {}
            )
            return
        comparison = Comparison(logits=result.name in ("logits", FORCED))
        for a, b in zip(blocks_of(own), blocks_of(reference), strict=True):
            width = a.shape[-1]
            comparison.add(a.reshape(-1, width), b.reshape(-1, width))
        result.metrics, result.positions = comparison.metrics(), comparison.positions()
        if comparison.bad is not None:
            side, row = comparison.bad
            result.failures = [f"{side} has values that are not finite, first in row {row}"]
            return
        result.failures = failures(result.metrics, result.limits)
        if result.failures:
            result.bad_rows = _describe_rows(comparison.row_errors(), result.limits)

    # Tokens.

    def _take_tokens(self, name: str, value: np.ndarray) -> None:
        """Goes on along the reference's answer and freely, and compares both; its logits too, where it has them."""
        noise = self._noise(self._seen_types)
        if name == GENERATED:
            self.reference_ids = np.asarray(value, np.int32)[: self.walk.request.n_new]
            self.tokens, self._forced = compare_tokens(
                self.walk, self.reference_ids, apply_overrides(GENERATED, token_limits(noise), self._overrides)
            )
            return
        rows = self._forced if self.reference_ids is not None else self.walk.generate(None, len(value))[1]
        result = StageResult(name, "tokens", rows.shape, tuple(value.shape))
        result.limits = apply_overrides(name, limits_for(name, (), noise, "model", len(rows)), self._overrides)
        self._measure(result, rows, np.asarray(value)[: len(rows)])
        self.results.append(result)
        self._on_result(result)


def compare_tokens(walk: Walk, reference: np.ndarray, limits: Limits) -> tuple[TokenResult, np.ndarray]:
    """The two answers, and this side's logits along the reference's [n, n_vocab]."""
    n = len(reference)
    forced, logits = walk.generate(reference, n)
    own, _ = walk.generate(None, n)
    margins = logits.max(-1) - logits[np.arange(n), reference]
    parted = np.flatnonzero(own != reference)
    first, margin = None, 0.0
    if len(parted):
        first = int(parted[0])
        margin = float(margins[first])
    x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    p = np.exp(x[np.arange(n), reference]) / np.exp(x).sum(-1)
    wrong = failures({"margin": margin}, limits)
    if wrong:
        wrong = [f"token {first} is {own[first]}, {reference[first]} in the reference; {wrong[0]}"]
    if not np.isfinite(logits).all():
        wrong = ["logits along the reference's answer are not finite"]
    result = TokenResult(
        reference.tolist(), own.tolist(), forced.tolist(), first, margin, limits, wrong, p.tolist(), margins.tolist()
    )
    return result, logits


def _describe_rows(errors: np.ndarray, limits: Limits) -> dict[str, Any]:
    """Which rows are outside: those worse than the whole may be."""
    wrong = np.flatnonzero(errors > np.sqrt(limits["nmse"])) if "nmse" in limits else np.array([int(errors.argmax())])
    if not len(wrong):
        return {}
    return {
        "first": int(wrong[0]),
        "last": int(wrong[-1]),
        "n": len(wrong),
        "of": len(errors),
        "rows": wrong[:8].tolist(),
    }
