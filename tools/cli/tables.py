"""Tables and progress bars of the commands that work on files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ...kernels.display import CELL, show
from ..cells import cell
from .options import format_bytes


def format_shape(shape: Any) -> str:
    return " x ".join(str(n) for n in shape) or "scalar"


def print_sizes(what: str, sizes: dict[str, int]) -> None:
    """Bytes by part or type, and each one's share."""
    total = sum(sizes.values())
    rows = [(k, f"{n:,}", format_bytes(n), f"{100 * n / total:.1f} %") for k, n in sizes.items() if n]
    print_table((what, "bytes", "", ""), rows, n_right=3)


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], n_right: int = 0) -> None:
    """A plain table on stdout; the last `n_right` columns are numbers. Never cut but by a narrow terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i >= len(header) - n_right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(cell, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        endless = console.options.update(max_width=1 << 20)
        console = Console(highlight=False, width=Measurement.get(console, endless, table).maximum)
    console.print(table)
    console.print()


class _Rate(ProgressColumn):
    """Millions a second, of whatever the task's `unit` is."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / 1e6:.1f} M{task.fields['unit']}/s")


@contextmanager
def show_progress(units: dict[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; gives a callback (what, done, total).

    There is a bar for each thing that is done; `units` says what it is counted in ("B" where it does not).
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(show(what, CELL), total=total, unit=units.get(what, "B"))
            bar.update(tasks[what], completed=done, total=total)

        yield report
