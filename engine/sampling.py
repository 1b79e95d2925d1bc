"""From a row of logits to the next token id.

Order: repetition penalty, temperature, top-k, top-p, min-p, one draw. Knows no text and no stop rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..kernels.errors import AuricleError


class OptionError(AuricleError):
    """An option has a value outside its range."""


class NonFiniteError(AuricleError):
    """A logit that decides is NaN or infinite."""


class Kind(NamedTuple):
    """Which parts of the choice are taken: a draw, or else the likeliest; the penalty; top-k and top-p of a draw."""

    drawn: bool
    penalised: bool
    top_k: bool
    top_p: bool

    @property
    def likeliest(self) -> bool:
        """Whether it is the likeliest token as the logits are."""
        return not self.drawn and not self.penalised


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose a token. Raises OptionError when a value is outside its range."""

    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        finite = _is_finite
        _require(finite(self.temperature) and self.temperature >= 0, "--temperature", self.temperature, "0 or more")
        _require(_is_whole(self.top_k) and self.top_k >= 0, "--top-k", self.top_k, "a whole number, 0 (off) or more")
        _require(finite(self.top_p) and 0 < self.top_p <= 1, "--top-p", self.top_p, "above 0 and at most 1")
        _require(finite(self.min_p) and 0 <= self.min_p <= 1, "--min-p", self.min_p, "from 0 to 1")
        penalty = self.repetition_penalty
        _require(finite(penalty) and penalty > 0, "--repetition-penalty", penalty, "above 0 (1 is off)")
        seed_ok = self.seed is None or (_is_whole(self.seed) and self.seed >= 0)
        _require(seed_ok, "--seed", self.seed, "a whole number, 0 or more")

    @property
    def kind(self) -> Kind:
        drawn, penalised = self.temperature > 0, self.repetition_penalty != 1
        return Kind(drawn, penalised, drawn and self.top_k > 0, drawn and self.top_p < 1)


class Sampler:
    """Draws token ids; the same options with a seed and the same logits give the same ids."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = np.random.default_rng(options.seed)

    def sample(self, logits: np.ndarray, history: Sequence[int]) -> int:
        """The next id. `logits`: float32 [n_vocab]; `history`: the ids that the repetition penalty looks at. Raises
        NonFiniteError where the highest logit is no number."""
        if self.options.temperature == 0:
            return _likeliest(penalise(logits, history, self.options.repetition_penalty))
        ids, probabilities = self.distribution(logits, history)
        cumulative = np.cumsum(probabilities)
        at = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(at, len(ids) - 1)])

    def draws(self, n: int) -> np.ndarray:
        """The random numbers that the next `n` samples would use: float64 [n] from 0 to 1; they count as used."""
        return self._random.random(n)

    def distribution(self, logits: np.ndarray, history: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The ids that survive the filters, ascending, and their probabilities (float64, sum 1)."""
        options = self.options
        assert options.temperature > 0, f"{options.temperature=}"
        scores = penalise(logits, history, options.repetition_penalty)
        best = scores[_likeliest(scores)]
        ids = _top_k(scores, options.top_k)
        with np.errstate(over="ignore"):  # a tiny temperature: everything but the likeliest becomes exp(-inf)
            weights = np.exp((scores[ids].astype(np.float64) - best) / options.temperature)
        probabilities = weights / weights.sum()
        if options.top_p < 1:
            keep = _nucleus(probabilities, options.top_p)
            ids, probabilities = ids[keep], probabilities[keep]
        if options.min_p > 0:
            keep = probabilities >= options.min_p * probabilities.max()
            ids, probabilities = ids[keep], probabilities[keep]
        return ids, probabilities / probabilities.sum()


def penalise(logits: np.ndarray, history: Sequence[int], penalty: float) -> np.ndarray:
    """Make each id of `history` less likely, once: a logit above 0 is divided by `penalty`, another multiplied.

    From CTRL (arXiv 1909.05858, section 4.1), with the sign rule that Hugging Face's generation uses.
    """
    assert logits.ndim == 1, f"{logits.shape=}"
    if penalty == 1 or len(history) == 0:
        return logits
    scores = logits.astype(np.float32)
    seen = np.unique(np.asarray(history, dtype=np.int64))
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def _likeliest(scores: np.ndarray) -> int:
    best = int(np.argmax(scores))  # the lowest id of equals, and a NaN wherever there is one
    if not np.isfinite(scores[best]):
        raise NonFiniteError(f"logit {best} is {scores[best]}")
    return best


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k highest scores, ascending; equals of the k-th stay too."""
    if k == 0 or k >= len(scores):
        return np.arange(len(scores))
    return np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Positions, ascending, of the fewest likeliest tokens whose mass reaches `top_p`; of equals the first ones."""
    descending = np.sort(probabilities)[::-1]
    mass = np.cumsum(descending)
    n_kept = min(np.searchsorted(mass, top_p) + 1, len(mass))
    least = descending[n_kept - 1]
    above = np.flatnonzero(probabilities > least)
    equal = np.flatnonzero(probabilities == least)[: n_kept - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _require(holds: bool, flag: str, value: object, expected: str) -> None:
    if not holds:
        raise OptionError(f"{flag} is {value}; it must be {expected}")
