"""`auricle warmup`: compiles the kernels for this machine now, so that no later start has to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .app import app, say
from .options import KVType


@app.command()
def warmup(
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="Only what this file needs.  [default: all types]", show_default=False),
    ] = None,
    kv_type: KVType = None,
) -> None:
    """Compile the kernels for this machine.

    They are compiled once, when they are first used, which takes up to half a minute; this does it ahead.
    """
    from ...engine.backends import BackendError, find_backend
    from ...engine.gguf import open_gguf
    from ...engine.kv_cache import find_kv_format
    from ...kernels.formats import FORMATS

    backend = find_backend("cpu")
    if not backend.rounds:
        raise BackendError("there is nothing to compile: numba is not installed; pip install numba")
    from ...engine.backends.cpu_warm import D_HEAD, warm
    from ...kernels.cpu.jit import cache_folder

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
