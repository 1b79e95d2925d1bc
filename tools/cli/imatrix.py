"""`auricle imatrix`: what the matrices of a model see on real recordings, for quantising them well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from ...engine.outputs import check_outputs
from ...engine.prompts import TASKS
from .app import app, print_json, say
from .options import OpenSettings, with_settings


@app.command()
@with_settings(OpenSettings)
def imatrix(
    files: Annotated[list[Path], typer.Argument(help="Audio files like those to come.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write, a GGUF.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask of each file.")] = TASKS["transcribe"],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.")] = 64,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="Add what this file holds; may be repeated.", show_default=False),
    ] = None,
    *,
    settings: OpenSettings,
) -> None:
    """Collect an importance matrix: the energy of each input column of each weight.

    Each file is a request of its own. The output appears when it is complete, or not at all.
    """
    from ...convert.importance import merge as merge_matrices
    from ...convert.importance import read_matrix, write_matrix
    from ..imatrix import check_columns, collect_importance

    # Not over what is merged: all that such a file holds is in the new one, and to add to it in place is usual.
    check_outputs([out], [settings.model, *files, *settings.lora_files()])
    matrices = {path: read_matrix(path) for path in merge or ()}
    with settings.open() as model:
        for path, matrix in matrices.items():
            check_columns(model, matrix, str(path))
        console = Console(stderr=True)
        columns = ("listening …", MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=len(files))
            clips = [str(file) for file in files]
            new = collect_importance(model, clips, prompt, max_new_tokens, lambda n, _: bar.update(task, completed=n))
    total = merge_matrices([*matrices.values(), new])
    n_bytes = write_matrix(out, total)
    if settings.as_json:
        rows = {name: sums.n_rows for name, sums in total.sums.items()}
        print_json({"file": str(out), "bytes": n_bytes, "datasets": total.datasets, "rows": rows})
        return
    say(f"{out}: {len(total.sums)} weights, {len(total.datasets)} recordings, {n_bytes:,} bytes")
