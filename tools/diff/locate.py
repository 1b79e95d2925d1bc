"""Where the first error is made: the stage, and inside it the op or the tensor.

Every value is computed from the reference's values before it, so that an error shows at the op that makes it and
nowhere else. A reference that has only stages is told apart by stages; then the ops between two are named together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ...engine import Model
from .audit import ReadRows, TensorResult, audit
from .compare import Comparer, StageResult, TokenResult
from .request import FORCED, GENERATED, Enough, Request
from .sources import Source
from .thresholds import Override
from .walk import Walk

Notify = Callable[[StageResult], None]


@dataclass
class Verdict:
    """`stage` is the first that is wrong, `op` the first wrong value inside it, `ops` what is done there with `given`,
    `tensor` a weight that is not what it was made from. `evidence`: sentences, the most telling first."""

    passed: bool
    stage: str | None = None
    op: str | None = None
    tensor: str | None = None
    ops: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        if self.passed:
            return "agrees: all limits hold"
        place = self.op or self.stage or self.tensor
        within = f" in {self.stage}" if self.stage and self.op not in (None, self.stage) else ""
        return f"differs first at {place}{within}: {self.evidence[0]}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"summary": self.summary}


@dataclass
class Outcome:
    """All results of one diff. `mode` is "chain", "isolate" or "bisect"."""

    mode: str
    stages: list[StageResult]
    tokens: TokenResult | None
    ops: list[StageResult]
    tensors: list[TensorResult]
    missing: list[str]
    verdict: Verdict


def run_diff(
    model: Model,
    request: Request,
    source: Source,
    *,
    mode: str = "chain",
    overrides: Sequence[Override] = (),
    read: ReadRows | None = None,
    on_result: Notify = lambda result: None,
) -> Outcome:
    """Compares `model` with `source`; `read` gives the other side's weights, where it has any.

    `chain`: every stage from this side's own stages before it. `isolate`: from the reference's. `bisect`: as isolate,
    then value by value up to the first wrong stage (all, if none is wrong), then tensor by tensor.
    """
    walk = Walk(model, request)
    wanted = [*walk.outline.names(False), *([GENERATED, FORCED] if request.n_new else [])]
    comparer = Comparer(
        walk,
        wanted,
        isolate=mode != "chain",
        formats=source.formats,
        rounds=source.rounds,
        overrides=overrides,
        on_result=on_result,
    )
    source.trace(request, wanted, comparer.take)
    stages, tokens = comparer.results, comparer.tokens
    done = {result.name for result in stages}
    missing = [name for name in wanted if name not in done and name not in (GENERATED, FORCED)]
    ops, tensors = [], []
    if mode == "bisect":
        bad = next((r.name for r in stages if not r.passed and r.kind == "stage"), None)
        if source.has_ops and bad not in ("mel", "input_ids"):
            ops = compare_ops(model, request, source, bad, overrides, on_result)
        if read is not None:
            tensors = list(audit(model.file, dict(source.formats), read))
    return Outcome(mode, stages, tokens, ops, tensors, missing, judge(stages, tokens, ops, tensors, walk))


def compare_ops(
    model: Model,
    request: Request,
    source: Source,
    last: str | None,
    overrides: Sequence[Override],
    on_result: Notify = lambda result: None,
) -> list[StageResult]:
    """Every value up to stage `last` (None: to the end) from the reference's values before it."""
    walk = Walk(model, request)
    comparer = Comparer(
        walk,
        walk.outline.names(True),
        isolate=True,
        formats=source.formats,
        rounds=source.rounds,
        overrides=overrides,
        last=last,
        on_result=on_result,
    )
    with suppress(Enough):
        source.trace(request, comparer.wanted, comparer.take)
    return comparer.results


def added_errors(results: Sequence[StageResult]) -> dict[str, float]:
    """{tensor: squared error over squared reference that it alone adds}, of isolated values made with one matrix.

    Run this side on the `reference` backend: others may compute two tensors' values as one.
    """
    added = {}
    for result in results:
        matrices = [name for name in result.types if name.endswith(".weight") and not name.endswith("norm.weight")]
        if len(matrices) == 1 and "nmse" in result.metrics:
            added[matrices[0]] = result.metrics["nmse"]
    return added


def judge(
    stages: Sequence[StageResult],
    tokens: TokenResult | None,
    ops: Sequence[StageResult],
    tensors: Sequence[TensorResult],
    walk: Walk,
) -> Verdict:
    """The verdict on all results; of the checks that fail, the one nearest to the cause is named."""
    bad = next((r for r in stages if not r.passed), None)
    culprit = next((r for r in ops if not r.passed), None)
    damaged = next((t for t in tensors if t.failures), None)
    if bad is None and culprit is None and damaged is None and (tokens is None or tokens.passed):
        return Verdict(passed=True)
    verdict = Verdict(passed=False, tensor=damaged.name if damaged else None)
    if damaged:
        verdict.evidence.append(
            f"tensor {damaged.name} ({damaged.type}) is not what the reference has ({damaged.reference_type}): "
            f"{', '.join(damaged.failures)}; worst block at row {damaged.worst_at[0]}, column {damaged.worst_at[1]}"
        )
    if culprit:
        verdict.op, verdict.stage = culprit.name, walk.outline.stage_of(culprit.name)
        verdict.ops, verdict.given = culprit.ops, culprit.given
        verdict.evidence.append(_tell(culprit, walk))
        others = [r.name for r in ops if not r.passed and r is not culprit]
        if others:
            more = ", …" if len(others) > 8 else ""
            verdict.evidence.append(f"wrong from right values, too: {', '.join(others[:8])}{more}")
    if bad and not culprit:
        verdict.stage, verdict.ops, verdict.given = bad.name, bad.ops, bad.given
        verdict.evidence.append(_tell(bad, walk))
        if ops:
            verdict.evidence.append("each op alone agrees with the reference; the error is in how they are fused")
    if damaged and not culprit:
        verdict.op = damaged.name.removesuffix(".weight")
        verdict.stage = verdict.stage or _stage_of_tensor(damaged.name, walk)
    if tokens and not tokens.passed:
        verdict.evidence += tokens.failures
        verdict.stage = verdict.stage or GENERATED
    return verdict


def _tell(result: StageResult, walk: Walk) -> str:
    """A failed value in a sentence: how far off, from what it was made, and in which rows."""
    made = f" (made here by {', '.join(result.ops)} from {', '.join(result.given)})" if result.ops else ""
    return f"{'; '.join(result.failures)}{made}{_tell_rows(result, walk)}"


def _tell_rows(result: StageResult, walk: Walk) -> str:
    rows = result.bad_rows
    if not rows:
        return ""
    if result.name == "input_ids":
        return f"; {rows['n']} ids differ, first at position {rows['first']}"
    if "last" not in rows or rows["n"] == rows["of"]:
        return ""
    where = f"; rows {rows['first']} to {rows['last']}, {rows['n']} of {rows['of']}"
    ids = walk.known.get("input_ids", walk.prompt.ids)
    slots = ids == walk.model.special.audio
    if result.name in walk.outline.decoder.stages and len(slots) == rows["of"] and slots[rows["first"]]:
        where += ", the first at an audio token"
    lengths = walk.lengths
    in_encoder = result.name in walk.outline.encoder.stages and rows["of"] == sum(lengths)
    if in_encoder and len(lengths) > 1 and rows["first"] >= sum(lengths[:-1]):
        where += ", all in the last window"
    return where


def _stage_of_tensor(name: str, walk: Walk) -> str | None:
    """The stage whose ops read the tensor."""
    for graph in (walk.outline.encoder, walk.outline.decoder):
        for node in graph.nodes:
            if any(v.kind == "weight" and v.name == name for v in node.operands):
                label = next((n for n, v in graph.stages.items() if v in node.outputs), None)
                return walk.outline.stage_of(label) if label else None
    return None
