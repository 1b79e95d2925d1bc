"""How much two sides may differ: by the types of the weights on the way and by what is done with them.

The unit is the relative error: root of squared error over squared reference. Its limit is a base for the arithmetic
(float32, sums in any order) plus the noise of the types times a factor. The factors were set on the recordings with
known results and hold about three times what was measured there.
"""

from __future__ import annotations

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
WORST = max(NOISE.values())  # of a type that is not in the table

# Relative error of float32 arithmetic: exact up to the last bits, sums of products, all layers up to a stage. The
# angle of a position has the error of a frequency times the position.
EXACT, SUMS, CHAIN, ANGLE = 1e-6, 3e-6, 3e-5, 2e-8
SUMMING = {"linear", "linears", "gated_linear", "conv2d", "window_attention", "kv_attention"}
FRONT_END = 1e-4  # of the log-mel


class Factors(NamedTuple):
    """Times the noise of the types: for one op, for one stage from the reference's input, and for all up to it."""

    op: float = 2.5
    stage: float = 4.0
    model: float = 12.0


FACTORS = Factors()
ROWS = 2.5  # a single row may be this many times worse than all together

Limits = dict[str, float]


def noise_of(pairs: Iterable[tuple[str, str | None]]) -> float:
    """The noise of tensors, each with its type here and there; None: the reference's are exact. One that has the same
    type on both sides adds none, and neither does BF16 widened to F32."""
    worst = 0.0
    for own, other in pairs:
        if own != other and {own, other} != {"F32", "BF16"}:
            worst = max(worst, NOISE.get(own, WORST), NOISE.get(other, WORST) if other not in (None, "BF16") else 0.0)
    return worst


def limit_error(ops: Collection[str], noise: float, scope: str, n_rows: int) -> float:
    """The relative error allowed after `ops` with weights of that noise; `scope` is a field of `Factors`."""
    base = SUMS if SUMMING & set(ops) else EXACT
    if scope == "model":
        base = CHAIN
    if "rope" in ops or scope == "model":
        base += ANGLE * n_rows
    return base + getattr(FACTORS, scope) * noise


def limits_for(name: str, ops: Collection[str], noise: float, scope: str, n_rows: int = 0) -> Limits:
    """Limits by metric: the least for `cos_min` and `top*`, the most for the others. `n_rows`: tokens of the prompt."""
    if name == "input_ids":
        return {"mismatches": 0}
    error = FRONT_END if name == "mel" else limit_error(ops, noise, scope, n_rows)
    limits = {"nmse": error**2, "cos_min": 1 - (ROWS * error) ** 2 / 2}
    if name in ("logits", "decode.logits"):
        limits |= {"kl_mean": 0.5 * (4 * error) ** 2 + 1e-9, "top1": max(0.0, 1 - 5 * error - 0.02)}
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
