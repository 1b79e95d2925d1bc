"""Work shared out to threads, results in the order of the tasks. Knows nothing of what is done."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

# What is being done, how much of it, and how much there is.
Progress = Callable[[str, int, int], None]


def count_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def run_in_order(tasks: Iterable[Callable[[], Result]], jobs: int) -> Iterator[Result]:
    """The result of each task, in order. `jobs` run at a time, and as many more are waiting or wait to be fetched.

    The first failure, in the order of the tasks, is raised; tasks that have not begun by then never do.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(jobs)
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) >= 2 * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Meter:
    """Counts what is done and reports it; any thread may advance it."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self.what, self.done, self.total, self.progress = what, 0, total, progress
        self._lock = threading.Lock()

    def advance(self, amount: int) -> None:
        with self._lock:
            self.done += amount
            if self.progress:
                self.progress(self.what, self.done, self.total)
