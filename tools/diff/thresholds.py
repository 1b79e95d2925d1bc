"""How much two sides may differ: by the types of the weights on the way and by what is done with them.

The unit is the relative error: root of squared error over squared reference. Its limit is a base for the arithmetic
(float32, sums in any order) plus the noise of the types times a factor. The factors are multiples of the largest error
over noise that was measured: every matrix in one of Q2_K Q3_K Q4_K Q5_K Q6_K Q8_0 Q4_0 (and the recipe Q4_K), on three
models of random weights, two of them with loud channels and heavy tails, and two recordings each. In units of noise
those were, for all rows together and for the worst row:

    an op 1.45 and 1.58; a stage from the reference's input 2.6 and 4.0; all up to a stage 6.4 and 12

and at the logits, a divergence of 13 noise^2 and a share of other likeliest tokens of 13 noise. An op and a stage may
have 1.5 times that; what goes through all layers, twice, since those models had ten. A divergence may have four times
that, for it grows with the scale of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from ...engine.sampling import OptionError

# Relative error of a weight after rounding to a type, root mean square over normally distributed weights.
NOISE: dict[str, float] = {
    "F32": 0.0,
    "BF16": 1.7e-3,
    "F16": 2.1e-4,
    "Q8_0": 5.5e-3,
    "Q6_K": 1.7e-2,
    "Q5_1": 3.2e-2,
    "Q5_0": 3.6e-2,
    "Q5_K": 3.2e-2,
    "Q4_1": 6.6e-2,
    "Q4_0": 8.6e-2,
    "Q4_K": 6.4e-2,
    "IQ4_NL": 7.3e-2,
    "IQ4_XS": 7.5e-2,
    "Q3_K": 1.4e-1,
    "Q2_K": 2.7e-1,
}
ROUNDING = 8e-3  # of activations to int8 with a scale for each 32: 0.5 % where they are normal, more with heavy tails
WORST = max(NOISE.values())  # of a type that is not in the table

# Relative error of float32 arithmetic: exact up to the last bits, sums of products, all layers up to a stage. The
# angle of a position has the error of a frequency times the position.
EXACT, SUMS, CHAIN, ANGLE = 1e-6, 3e-6, 3e-5, 2e-8
SUMMING = {"linear", "linears", "gated_linear", "conv2d", "window_attention", "kv_attention"}
FRONT_END = 1e-4  # of the log-mel


class Factors(NamedTuple):
    """Times the noise of the types: for one op, for one stage from the reference's input, and for all up to it."""

    op: float
    stage: float
    model: float


FACTORS = Factors(op=2.2, stage=4.0, model=12.0)
ROW_FACTORS = Factors(op=2.4, stage=6.0, model=22.0)  # for the worst row
ROWS = 2.5  # times the base: a single row may be this much worse than all together
KL_FACTOR, TOP1_FACTOR = 50.0, 20.0  # times noise^2, and noise, after the whole model
TOP1_BASE = 0.01

Limits = dict[str, float]


def noise_of(pairs: Iterable[tuple[str, str | None]], rounds: Collection[str] = ()) -> float:
    """The noise of tensors, each with its type here and there; None: the reference's are exact. One that has the same
    type on both sides adds none, and neither does BF16 widened to F32. `rounds`: types whose activations are rounded
    to int8 on one side."""
    worst = 0.0
    for own, other in pairs:
        noise = ROUNDING if own in rounds else 0.0
        if own != other and {own, other} != {"F32", "BF16"}:
            stored = max(NOISE.get(own, WORST), NOISE.get(other, WORST) if other not in (None, "BF16") else 0.0)
            noise = math.hypot(noise, stored)
        worst = max(worst, noise)
    return worst


def base_error(ops: Collection[str], scope: str, n_rows: int) -> float:
    """The relative error allowed to the arithmetic of `ops`; `scope` is a field of `Factors`."""
    base = SUMS if SUMMING & set(ops) else EXACT
    if scope == "model":
        base = CHAIN
    if "rope" in ops or scope == "model":
        base += ANGLE * n_rows
    return base


def limits_for(name: str, ops: Collection[str], noise: float, scope: str, n_rows: int = 0) -> Limits:
    """Limits by metric: the least for `cos_min` and `top*`, the most for the others. `n_rows`: tokens of the prompt, or
    of the answer."""
    if name == "input_ids":
        return {"mismatches": 0}
    base = FRONT_END if name == "mel" else base_error(ops, scope, n_rows)
    error = base + getattr(FACTORS, scope) * noise
    row_error = ROWS * base + getattr(ROW_FACTORS, scope) * noise
    limits = {"nmse": error**2, "cos_min": 1 / math.hypot(1, row_error)}
    if name in ("logits", "decode.logits"):
        share = getattr(FACTORS, scope) / FACTORS.model
        missed = TOP1_BASE + 5 * base + TOP1_FACTOR * share * noise
        missed += 2 * math.sqrt(missed / n_rows) if n_rows else 0.0  # two standard deviations of so small a sample
        kl = 0.5 * (4 * base) ** 2 + KL_FACTOR * (share * noise) ** 2
        limits |= {"kl_mean": kl + 1e-9, "top1": max(0.0, 1 - missed)}
    return limits


def token_limits(noise: float) -> Limits:
    """For greedy answers: where the first token differs, how much likelier (in logits) this side's choice may be."""
    return {"margin": 1e-3 + 100 * noise}


AT_LEAST = ("cos_min", "cos_p1", "cos_mean", "top1", "top5", "p_choice")


def failures(metrics: Mapping[str, float], limits: Limits) -> list[str]:
    """What is outside its limit, as sentences."""
    said = []
    for metric, limit in limits.items():
        value = metrics.get(metric)
        if value is None:
            continue
        wrong = not value >= limit if metric in AT_LEAST else not value <= limit
        if wrong:
            said.append(f"{metric} {value:.12g} {'<' if metric in AT_LEAST else '>'} {limit:.12g}")
    return said


class Override(NamedTuple):
    """A limit from the user, for stages whose name matches the pattern."""

    pattern: str
    metric: str
    value: float


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """`STAGE=VALUE` sets the least cosine, `STAGE:METRIC=VALUE` another limit; STAGE may hold `*`.

    Raises OptionError.
    """
    overrides = []
    for text in texts:
        left, _, right = text.rpartition("=")
        pattern, _, metric = left.partition(":")
        try:
            value = float(right)
        except ValueError:
            value = float("nan")
        if not pattern or value != value:
            raise OptionError(f"--threshold {text!r}: write STAGE=COSINE or STAGE:METRIC=VALUE, as in llm.blk.*=0.999")
        overrides.append(Override(pattern, metric or "cos_min", value))
    return overrides


def apply_overrides(name: str, limits: Limits, overrides: Sequence[Override]) -> Limits:
    """Limits with the user's: a least cosine given by the user is the only limit on errors of a stage."""
    for pattern, metric, value in overrides:
        if fnmatchcase(name, pattern):
            limits = {m: v for m, v in limits.items() if not (metric == "cos_min" and m == "nmse")} | {metric: value}
    return limits
