"""`auricle convert`, `auricle inspect` and `auricle plan`: what is in files, and what will be in memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from .app import app
from .options import AsJSON, MaxNewTokens, OpenSettings, format_bytes, parse_duration, with_settings


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The GGUF file to write.", show_default=False)],
    type_name: Annotated[str, typer.Option("--type", help="Type of the weights: f32, f16, bf16 or q8_0.")] = "bf16",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
) -> None:
    """Make a GGUF file from a Hugging Face checkpoint.

    The file appears when it is complete, or not at all.
    """
    from ...convert.hf import convert as write_file
    from ...convert.plan import plan_conversion

    plan = plan_conversion(checkpoint, type_name)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    for note in plan.notes:
        notes.print(escape(note))
    if dry_run:
        _print_plan(plan)
        return
    with _progress(f"writing {out.name}") as advance:
        write_file(plan, out, advance)
    notes.print(f"{escape(str(out))}: {len(plan)} tensors, {plan.total_bytes:,} bytes")


def _print_plan(plan: Any) -> None:
    rows = [(r.target, _dims(r.shape), r.source_dtype, r.format.name, f"{r.nbytes:,}") for r in plan]
    _print_table(("tensor", "shape", "from", "type", "bytes"), rows, n_right=1)
    _print_sizes("part", plan.bytes_by_part())
    _print_sizes("type", plan.bytes_by_type())
    print(f"metadata and alignment: {plan.total_bytes - sum(r.nbytes for r in plan):,} bytes")
    print(f"file: {plan.total_bytes:,} bytes ({format_bytes(plan.total_bytes)})")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; gives a callback (done, total)."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)],
    as_json: AsJSON = False,
) -> None:
    """Show metadata, tensors, and sizes by part and type of a GGUF file."""
    from ...engine.gguf import open_gguf
    from ..describe import describe_file

    with open_gguf(model) as file:
        facts = describe_file(file)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    _print_table(("key", "value"), [(key, _brief(value)) for key, value in facts["metadata"].items()])
    rows = [(t["name"], _dims(t["shape"]), t["type"], f"{t['bytes']:,}") for t in facts["tensors"]]
    _print_table(("tensor", "shape", "type", "bytes"), rows, n_right=1)
    _print_sizes("part", facts["bytes_by_part"])
    _print_sizes("type", facts["bytes_by_type"])
    print(f"{len(rows)} tensors, {facts['n_weights']:,} weights, {facts['tensor_bytes']:,} bytes")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"[{value['length']:,}] {', '.join(map(repr, value['first']))}, …"
    return repr(value) if isinstance(value, str) else str(value)


@app.command()
@with_settings(OpenSettings)
def plan(
    audio: Annotated[
        list[str] | None,
        typer.Option("--audio", help="Length of a clip: 90s, 10m, 1:30; may be repeated.", show_default=False),
    ] = None,
    max_new_tokens: MaxNewTokens = 1024,
    *,
    settings: OpenSettings,
) -> None:
    """State what a request takes in memory, before anything runs."""
    from ...engine.memory import process_bytes

    with settings.open() as model:
        memory = model.plan([parse_duration(text) for text in audio or ()], max_new_tokens=max_new_tokens)
        base = process_bytes()
    rows = {f"weights: {part}": n for part, n in memory.weights.items() if n}
    rows |= {"KV cache": memory.kv_cache, "arena": memory.arena, "libraries' work space": memory.libraries}
    rows |= {"audio": memory.audio, "interpreter and libraries": base}
    total = memory.total + base
    if settings.as_json:
        print(json.dumps({**dataclasses.asdict(memory), "interpreter": base, "total": total}))
        return
    _print_table(("part", "bytes", ""), [(name, f"{n:,}", format_bytes(n)) for name, n in rows.items()], n_right=2)
    print(f"peak: {total:,} bytes ({format_bytes(total)})")


def _dims(shape: Any) -> str:
    return " x ".join(str(n) for n in shape) or "scalar"


def _print_sizes(what: str, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    rows = [(k, f"{n:,}", format_bytes(n), f"{100 * n / total:.1f} %") for k, n in sizes.items() if n]
    _print_table((what, "bytes", "", ""), rows, n_right=3)


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], n_right: int = 0) -> None:
    """A plain table on stdout; the last `n_right` columns are numbers. Never cut, however narrow the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i >= len(header) - n_right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)
    console.print()
