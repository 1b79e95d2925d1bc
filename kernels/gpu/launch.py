"""Starting Triton kernels: at once, or bound once and started as often as wanted.

At every launch Triton finds out which variant of a kernel its arguments ask for, which takes longer than many a kernel.
Memory never moves here once a program is bound, so one answer serves all launches: `record` keeps the compiled kernel
and its arguments, and goes straight to Triton's launcher afterwards. Knows no kernel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from triton import AsyncCompileMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

Grid = tuple[int, ...]
Start = Callable[[], None]
Progress = Callable[[int, int], None]

_here = threading.local()  # `.launches`: where those of this thread are recorded, if they are


class Launch:
    """A kernel with its grid and its arguments, which it keeps alive. Compiled when it is made, where Triton compiles;
    loaded, and Triton's hooks for profilers left out, when it is started. Goes to the stream that is then current."""

    def __init__(self, kernel: Any, grid: Grid, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """`options`: arguments by name, and `num_warps` and the like."""
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._compiled: Any = None
        self._start: Start | None = None
        if isinstance(kernel, JITFunction):
            self._compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
        else:  # interpreted
            self._start = partial(kernel[grid], *arguments, **options)

    def __call__(self) -> None:
        if self._start is None:
            self._start = self._load()
        self._start()

    def _load(self) -> Start:
        # With `triton.AsyncCompileMode` it is a promise.
        compiled = self._compiled.result() if hasattr(self._compiled, "result") else self._compiled
        named = dict(zip(self._kernel.arg_names, self._arguments, strict=False)) | self._options
        # Of a tensor that is given as such, the launcher would ask the driver at each launch whether it is on the card.
        values = [x.data_ptr() if hasattr(x, "data_ptr") else x for x in map(named.get, self._kernel.arg_names)]
        run, stream_of, device = compiled.run, driver.active.get_current_stream, driver.active.get_current_device()
        function, metadata = compiled.function, compiled.packed_metadata  # known once `run` has been asked for
        x, y, z = (*self._grid, 1, 1)[:3]
        return lambda: run(x, y, z, stream_of(device), function, metadata, None, None, None, *values)


def launch(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Starts a `triton.jit` function: `kernel[grid](*arguments, **options)`. Under `record` it is only bound."""
    launches = getattr(_here, "launches", None)
    if launches is None:
        kernel[grid](*arguments, **options)
    else:
        launches.append(Launch(kernel, grid, arguments, options))


def record(function: Callable[..., None], *arguments: Any, **options: Any) -> Start:
    """The kernels that `function(*arguments, **options)` launches, each bound once: what starts them in their order.

    `function` runs once, now, and starts nothing; it must do nothing but `launch`. Tensors must stay where they are.
    """
    assert getattr(_here, "launches", None) is None, "one recording at a time"
    _here.launches = launches = []
    try:
        function(*arguments, **options)
    finally:
        _here.launches = None
    return launches[0] if len(launches) == 1 else partial(start_all, launches)


@contextmanager
def together(progress: Progress, seconds: float = 0.5) -> Iterator[None]:
    """Compiles the kernels that are bound within on all cores at once; they are ready when it ends. Those kept on disk
    are only read. `progress(done, total)`: called every so many seconds then, and at the end, if there were any."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool) as mode:
        yield
        total = len(mode.raw_futures)
        left = set(mode.raw_futures)
        while left:
            _, left = wait(left, seconds)
            progress(total - len(left), total)


def start_all(launches: list[Launch]) -> None:
    for start in launches:
        start()
