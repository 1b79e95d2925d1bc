"""`auricle synth`: a model file of random weights, for benchmarks without the published ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...engine.outputs import check_outputs
from .app import app, say
from .tables import print_sizes, show_progress


@app.command()
def synth(
    out: Annotated[Path, typer.Option("-o", "--out", help="The GGUF file to write.", show_default=False)],
    shape: Annotated[str, typer.Option("--shape", help="moss-audio-4b, moss-audio-8b or tiny.")] = "moss-audio-4b",
    type_name: Annotated[str, typer.Option("--type", help="Recipe of the weights, as of convert.")] = "q4_k",
    seed: Annotated[int, typer.Option("--seed", help="Of the weights; the same gives the same file.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
) -> None:
    """Make a model file of a published shape with random weights.

    It runs as the published model does, and its answers mean nothing.
    """
    from ..synth import plan_synth, write_synth

    plan = plan_synth(shape, type_name, seed)
    size = plan.layout.total_bytes
    if dry_run:
        print_sizes("part", plan.bytes_by_part())
        print(f"file: {size:,} bytes")
        return
    check_outputs([out])
    with show_progress({}) as report:
        write_synth(plan, out, partial(report, f"writing {out.name}"))
    say(f"{out}: {len(plan.layout.tensors)} tensors, {size:,} bytes")
