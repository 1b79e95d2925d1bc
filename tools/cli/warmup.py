"""`auricle warmup`: compiles the kernels for this machine now, so that no later start has to."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, say
from .options import BackendName, KVType

if TYPE_CHECKING:
    from ...engine.backends.backend import Backend

USUAL = (("moss-audio-4b", "q4_k"), ("moss-audio-4b", "q4_k_all"))  # shapes and recipes that a card gets kernels for


@app.command()
def warmup(
    model: Annotated[
        Path | None,
        typer.Option(
            "-m",
            "--model",
            help="Only what this file needs.  [default: all types; on a card the 4B shape in q4_k and q4_k_all]",
            show_default=False,
        ),
    ] = None,
    kv_type: KVType = None,
    backend: BackendName = "auto",
) -> None:
    """Compile the kernels for this machine.

    They are compiled once, when they are first used, which takes up to half a minute on the CPU and a minute or two for
    a card; this does it ahead. Where there is a card, it is done for both.
    """
    from ...engine.backends import BackendError, find_backend

    chosen = find_backend(backend)
    if chosen.device.separate:
        warm_card(chosen, model, kv_type)
    if chosen.device.separate and backend == "cuda":
        return
    processor = find_backend("cpu")
    if processor.rounds:
        warm_processor(processor, model, kv_type)
    elif not chosen.device.separate:
        raise BackendError("there is nothing to compile: numba is not installed; pip install numba")


def warm_processor(backend: Backend, model: Path | None, kv_type: str | None) -> None:
    from ...engine.backends.cpu_warm import D_HEAD, warm
    from ...engine.gguf import open_gguf
    from ...engine.kv_cache import find_kv_format
    from ...kernels.cpu.jit import cache_folder
    from ...kernels.formats import FORMATS

    cache = find_kv_format(kv_type or backend.kv_type, D_HEAD)
    formats = FORMATS
    if model is not None:
        with open_gguf(model) as file:
            formats = sorted({t.format for t in file.tensors.values() if len(t.shape) == 2}, key=lambda f: f.name)
    start = time.perf_counter()
    for what in warm(formats, cache):
        say(f"auricle: {what}")
    kept = f", in {folder}" if (folder := cache_folder()) else ""
    say(f"auricle: ready after {time.perf_counter() - start:.1f} s{kept}")


def warm_card(backend: Backend, model: Path | None, kv_type: str | None) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from ...engine.backends.cuda_warm import warm
    from ...engine.kv_cache import find_kv_format
    from ...engine.models.moss_audio import read_moss_audio

    name, start, totals = backend.device.card.name, time.perf_counter(), {}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        for what, open_file in models(model):
            task = bar.add_task(f"kernels of {what}", total=None)

            def report(done: int, total: int, what: str = what, task: Any = task) -> None:
                totals[what] = total
                bar.update(task, completed=done, total=total)

            with open_file as file:
                config = read_moss_audio(file)
                cache = find_kv_format(kv_type or backend.kv_type, config.decoder.head_dim)
                warm(file, config, backend, cache, report)
    took = time.perf_counter() - start
    say(f"auricle: {sum(totals.values())} kernels for {name} ready after {took:.1f} s")


def models(model: Path | None) -> Iterator[tuple[str, Any]]:
    """What a card is made ready for: a name, and a context that gives the file."""
    from ...engine.gguf import open_gguf
    from ..synth import PlannedFile

    if model is not None:
        yield model.name, open_gguf(model)
        return
    for shape, recipe in USUAL:
        yield f"{shape} {recipe}", nullcontext(PlannedFile(shape, recipe))
