"""`auricle inspect` and `auricle plan`: what is in a file, and what will be in memory."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ...kernels.display import show
from .app import app, print_json
from .options import AsJSON, MaxNewTokens, ModelFile, OpenSettings, format_bytes, parse_duration, with_settings
from .tables import format_shape, print_sizes, print_table

VALUE = 120  # characters of a value in the table; --json has all of them


@app.command()
def inspect(
    model: ModelFile,
    as_json: AsJSON = False,
) -> None:
    """Show metadata, tensors, and sizes by part and type of a GGUF file."""
    from ...engine.gguf import open_gguf
    from ..describe import describe_file

    with open_gguf(model) as file:
        facts = describe_file(file)
    if as_json:
        print_json(facts)
        return
    said = [(key, _brief(value)) for key, value in facts["metadata"].items()]
    assumed = [(key, f"{_brief(value)} (assumed; the file does not say)") for key, value in facts["assumed"].items()]
    print_table(("key", "value"), said + assumed)
    rows = [(t["name"], format_shape(t["shape"]), t["type"], f"{t['bytes']:,}") for t in facts["tensors"]]
    print_table(("tensor", "shape", "type", "bytes"), rows, n_right=1)
    print_sizes("part", facts["bytes_by_part"])
    print_sizes("type", facts["bytes_by_type"])
    print(f"{len(rows)} tensors, {facts['n_weights']:,} weights, {facts['tensor_bytes']:,} bytes")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"[{value['length']:,}] {', '.join(map(repr, value['first']))}, …"
    return show(repr(value) if isinstance(value, str) else value, VALUE)


@app.command()
@with_settings(OpenSettings)
def plan(
    audio: Annotated[
        list[str] | None,
        typer.Option("--audio", help="Length of a clip: 90s, 10m, 1:30; may be repeated.", show_default=False),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    *,
    settings: OpenSettings,
) -> None:
    """State what a request takes in memory, before anything runs."""
    from ...engine.memory import process_bytes

    with settings.open() as model:
        memory = model.plan([parse_duration(text) for text in audio or ()], max_new_tokens=max_new_tokens)
        device = model.backend.device
        own = not device.separate
        base = process_bytes(model.file, model.backend, model.kv_format) if own else device.beside
        assumed = model.assumed
    rows = {f"weights: {part}": n for part, n in memory.weights.items() if n}
    rows |= {"KV cache": memory.kv_cache, "arena": memory.arena, "libraries' work space": memory.libraries}
    rows |= {"audio": memory.audio}
    rows |= {"sampling": memory.counters} if memory.counters else {}
    rows |= {"never there together": -memory.apart} if memory.apart else {}
    rows |= {"interpreter and libraries" if own else "CUDA itself, about": base}
    total = memory.total + base
    if settings.as_json:
        print_json({**dataclasses.asdict(memory), "interpreter": base, "total": total, "assumed": assumed})
        return
    print_table(("part", "bytes", ""), [(name, f"{n:,}", format_bytes(n)) for name, n in rows.items()], n_right=2)
    print(f"peak: {total:,} bytes ({format_bytes(total)})")
    for key, value in assumed.items():
        print(f"assumed: {key} = {value}, which the file does not say")
