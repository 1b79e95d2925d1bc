"""How near two arrays are: numbers for the whole, for each row, and a summary by position.

Rows are what a stage has one of for each token (or mel frame, or image row). Everything is accumulated in float64
over blocks of rows, so that an array need never be whole. Knows no stage and no threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

N_BINS = 200  # of a summary by position
N_WORST = 5
TOP = 5


@dataclass
class Comparison:
    """Takes blocks of rows of both sides [n, d] and gives the metrics."""

    logits: bool = False
    _rows: list[np.ndarray] = field(default_factory=list)  # [n, 3] a block: products, own and reference squares
    _errors: list[np.ndarray] = field(default_factory=list)  # squared error of each row
    _columns: np.ndarray | None = None  # squared error of each column
    _choices: list[np.ndarray] = field(default_factory=list)  # [n, 5] a block: see `_compare_choices`
    _max_abs: float = 0.0
    _max_relative: float = 0.0
    bad: tuple[str, int] | None = None  # whose value is not finite, and in which row first

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        """Takes a block. Values that are not finite are noted and end the comparison."""
        assert got.shape == want.shape, f"{got.shape=} {want.shape=}"
        n_before = sum(map(len, self._errors))
        for side, values in (("the reference", want), ("this side", got)):
            finite = np.isfinite(values).all(axis=-1)
            if self.bad is None and not finite.all():
                self.bad = side, n_before + int(np.argmin(finite))
        if self.bad is not None:
            return
        a, b = got.astype(np.float64), want.astype(np.float64)
        error = np.square(a - b)
        squares = _products(a, b)
        self._rows.append(squares)
        self._errors.append(error.sum(-1))
        self._columns = error.sum(0) + (0.0 if self._columns is None else self._columns)
        largest = np.sqrt(error.max(-1, initial=0.0))
        typical = np.sqrt(squares[:, 2] / b.shape[-1])
        self._max_abs = max(self._max_abs, float(largest.max(initial=0.0)))
        self._max_relative = max(self._max_relative, float(divide(largest, typical).max(initial=0.0)))
        if self.logits:
            self._choices.append(_compare_choices(a, b))

    def metrics(self) -> dict[str, float]:
        """`cos_*` and `error_*` are of rows; `nmse` is squared error over squared reference; `max_relative` is an error
        over its row's root mean square; `column_ratio` the error of the worst column over that of all. Of logits
        besides: KL divergence in nats, agreement, and the probability given to the reference's choice."""
        if self.bad is not None or not self._errors:
            return {}
        rows, errors = np.concatenate(self._rows), np.concatenate(self._errors)
        cosines, relative = product_cosines(rows), np.sqrt(divide(errors, rows[:, 2]))
        column = np.sqrt(self._columns)
        total = float(rows[:, 2].sum())
        metrics = {
            "cos_min": float(cosines.min()),
            "cos_p1": float(np.percentile(cosines, 1)),
            "cos_mean": float(cosines.mean()),
            "nmse": float(divide(errors.sum(), total)),
            "error_max": float(relative.max()),
            "error_p99": _percentile(relative, 99),
            "max_abs": self._max_abs,
            "max_relative": self._max_relative,
            "norm_ratio": float(np.sqrt(divide(rows[:, 1].sum(), total))) if total else 1.0 + float(rows[:, 1].sum()),
            "column_ratio": float(divide(column.max(), np.sqrt(np.square(column).mean()))),
        }
        if self._choices:
            kl, top1, top5, own, other = np.concatenate(self._choices).T
            metrics |= {
                "kl_mean": float(kl.mean()),
                "kl_p99": float(np.percentile(kl, 99)),
                "kl_max": float(kl.max()),
                "top1": float(top1.mean()),
                "top5": float(top5.mean()),
                "p_choice": float(own.mean()),
                "p_choice_reference": float(other.mean()),
            }
        return metrics

    def positions(self) -> dict[str, Any]:
        """The smallest cosine and the largest relative error of rows in at most `N_BINS` spans, the worst rows, and the
        worst column."""
        if self.bad is not None or not self._errors:
            return {}
        rows, errors = np.concatenate(self._rows), np.concatenate(self._errors)
        cosines, relative = product_cosines(rows), np.sqrt(divide(errors, rows[:, 2]))
        n_bins = min(N_BINS, len(errors))
        starts = np.linspace(0, len(errors), n_bins, endpoint=False).astype(int)
        worst = np.argsort(-relative, kind="stable")[:N_WORST]
        summary = {
            "n_rows": len(errors),
            "starts": starts.tolist(),
            "cos_min": _rounded(np.minimum.reduceat(cosines, starts)),
            "error_max": _rounded(np.maximum.reduceat(relative, starts)),
            "worst_rows": [{"row": int(i), "cos": float(cosines[i]), "error": float(relative[i])} for i in worst],
            "worst_column": int(np.argmax(self._columns)),
        }
        if self._choices:
            kl = np.concatenate(self._choices)[:, 0]
            summary["kl_max"] = _rounded(np.maximum.reduceat(kl, starts))
        return summary

    def row_errors(self) -> np.ndarray:
        """Relative error of each row [n]."""
        rows, errors = np.concatenate(self._rows), np.concatenate(self._errors)
        return np.sqrt(divide(errors, rows[:, 2]))


def divide(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """a / b, with 0 / 0 = 0 and infinity where only b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    safe = np.where(b == 0, 1.0, b)
    return np.where(b == 0, np.where(a == 0, 0.0, np.inf), a / safe)


def row_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows: [n, d], [n, d] -> float64 [n]; for zero rows as `product_cosines`."""
    return product_cosines(_products(a.astype(np.float64), b.astype(np.float64)))


def mean_divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of softmax(logits) from softmax(reference), in nats: [n, n_vocab] each."""
    return float(_divergences(log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64))).mean())


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each pair of rows the product and both squares: [n, d], [n, d] -> [n, 3]."""
    return np.stack([(a * b).sum(-1), np.square(a).sum(-1), np.square(b).sum(-1)], axis=1)


def product_cosines(rows: np.ndarray) -> np.ndarray:
    """From products and squares [n, 3] to cosines [n]; 1 where both rows are zero, 0 where one is."""
    product, own, other = rows.T
    both_zero = (own == 0) & (other == 0)
    return np.where(both_zero, 1.0, np.clip(divide(product, np.sqrt(own) * np.sqrt(other)), -1.0, 1.0))


def _percentile(values: np.ndarray, q: float) -> float:
    """Of the values at hand the nearest above: between infinite ones nothing can be interpolated."""
    return float(np.percentile(values, q, method="higher"))


def _rounded(values: np.ndarray) -> list[float]:
    """Six significant digits of distance from 1 or 0 are kept: enough to draw, and small in a file."""
    return [float(f"{v:.9g}") for v in values]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Of each row of log-probabilities q from p, in nats; rounding makes none negative."""
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def _compare_choices(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Logits [n, n_vocab], float64 -> [n, 5]: divergence of softmax(a) from softmax(b), whether the likeliest token is
    the same, the share of the five likeliest that is, and both sides' probability of the reference's likeliest."""
    p, q = log_softmax(b), log_softmax(a)
    rows = np.arange(len(a))
    choice = b.argmax(-1)
    n = min(TOP, a.shape[-1])
    own, other = (np.argpartition(-x, n - 1, axis=-1)[:, :n] for x in (a, b))
    shared = (own[:, :, None] == other[:, None, :]).any(-1).mean(-1)
    columns = (_divergences(p, q), a.argmax(-1) == choice, shared, np.exp(q[rows, choice]), np.exp(p[rows, choice]))
    return np.stack(columns, axis=1).astype(np.float64)
