"""The plots of `end_to_end.py`, with matplotlib (the extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # to files; there may be no screen
import matplotlib.pyplot as plt

from auricle.engine.outputs import replacing

Configurations = list[dict[str, Any]]


def plot_clips(configurations: Configurations, path: Path) -> None:
    """Time to the first token and of the encoder against the length of the clip, both on logarithmic axes."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for c in configurations:
        name = f"{c['shape']} {c['recipe']}"
        clips, encoder = c["clips"], c["encoder"]
        (line,) = axes.plot(
            [r["clip_s"] for r in clips], [r["first_token_s"] for r in clips], "o-", label=f"{name}: first token"
        )
        axes.plot(
            [r["clip_s"] for r in encoder],
            [r["encoder_s"] for r in encoder],
            "x--",
            color=line.get_color(),
            label=f"{name}: encoder",
        )
    lengths = sorted({r["clip_s"] for c in configurations for r in (*c["clips"], *c["encoder"])})
    axes.plot(lengths, lengths, ":", color="grey", label="real time")
    axes.set(xscale="log", yscale="log", xlabel="length of the clip, s", ylabel="s")
    _finish(figure, axes, path)


def plot_contexts(configurations: Configurations, path: Path) -> None:
    """Time of a decoding step against the tokens in the cache."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for c in configurations:
        rows = c["contexts"]
        contexts, steps = [r["context"] for r in rows], [1e3 * r["step_s"] for r in rows]
        axes.plot(contexts, steps, "o-", label=f"{c['shape']} {c['recipe']}")
    axes.set(xlabel="tokens in the cache", ylabel="ms a token", xlim=(0, None), ylim=(0, None))
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part.path, dpi=110, format=path.suffix[1:], metadata={"Software": None})
    plt.close(figure)
