"""Losses and error rates over a run: a CSV that grows as it goes, and a picture of it where matplotlib is installed.

Knows names and numbers only.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...engine.outputs import disk_errors, replacing, write_text
from ...kernels.display import show

CURVE_FILES = ("curves.csv", "curves.png")
COLUMNS = (
    "step",
    "minutes",
    "learning_rate",
    "loss",
    "sounds",
    "places",
    "aims",
    "gradient",
    "validation_loss",
    "validation_wer",
    "synthetic_wer",
)


class Curves:
    """Rows of the CSV; losses are means since the row before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums: dict[str, list[float]] = defaultdict(list)

    def add(self, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self._sums[name].append(value)

    def write(self, step: int, minutes: float, rate: float) -> None:
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums.clear()
        self._append({"step": step, "minutes": minutes, "learning_rate": rate, **means})

    def write_validation(self, step: int, minutes: float, results: Mapping[str, float]) -> None:
        self._append({"step": step, "minutes": minutes, **results})

    def forget_after(self, step: int) -> None:
        """Drop rows of an interrupted run that will be trained again; all of them, and the file, for step 0."""
        rows = [row for row in read_curves(self.path) if step and float(row["step"]) <= step]
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        write_text(self.path, _to_csv(rows, headed=True))

    def _append(self, row: Mapping[str, float | str]) -> None:
        """Raises OutputError."""
        written = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_to_csv([written], headed=file.tell() == 0))
        print("  ".join(f"{name} {value}" for name, value in written.items()), file=sys.stderr, flush=True)


def _to_csv(rows: Iterable[Mapping[str, str]], headed: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    if headed:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_curves(path: Path) -> list[dict[str, str]]:
    """Rows of the CSV, none when there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def draw_curves(path: Path) -> Path | None:
    """A PNG beside the CSV `path`: losses above, error rates below. None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{show(path)}: no picture of it, since matplotlib is not installed", file=sys.stderr)
        return None
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True)
    rows = read_curves(path)
    drawn = {
        losses: ("loss", "sounds", "places", "aims", "validation_loss"),
        rates: ("validation_wer", "synthetic_wer"),
    }
    for axes, names in drawn.items():
        for name in names:
            points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
            if points and (axes is rates or any(value for _, value in points)):  # what is not learnt is 0 throughout
                axes.plot(
                    *zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 40 else ""
                )
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set_yscale("log")
    rates.set_yscale("symlog", linthresh=1)  # rates may be 0
    losses.set_ylabel("nats")
    rates.set_ylabel("errors, % of words")
    rates.set_xlabel("step")
    picture = path.with_suffix(".png")
    with replacing(picture) as part, disk_errors(picture):
        figure.savefig(part.path, dpi=120, format="png")
    return picture
