"""Batches made ahead in other processes, in order, so that a run does not depend on how many of them there are.

Knows no data: a source is asked for batch number n and must give the same one each time. No PyTorch.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from typing import Any

from ...kernels.errors import AuricleError
from .batches import Batch

Source = Callable[[int], Batch]

_AHEAD = 8  # batches that wait, a worker
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def given(source: Source) -> Source:
    """For `load`, a source that is open already and can be pickled."""
    return source


def load(open_source: Callable[[], Source], first: int, n_workers: int = 0) -> Iterator[Batch]:
    """Batches `first`, `first` + 1, … without end. `open_source` must be picklable when there are workers.

    Workers end with the iterator. Raises what a source raises, and RuntimeError when a worker dies.
    """
    if n_workers == 0:
        source = open_source()
        while True:
            yield source(first)
            first += 1
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(_AHEAD) for _ in range(n_workers)]
    workers = [
        context.Process(target=_work, args=(open_source, first + at, n_workers, waiting), daemon=True)
        for at, waiting in enumerate(queues)
    ]
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    for worker in workers:
        worker.start()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        while True:
            for worker, waiting in zip(workers, queues, strict=True):
                yield _take(waiting, worker)
    finally:
        for worker in workers:
            worker.terminate()


def _take(waiting: Any, worker: Any) -> Batch:
    while True:
        try:
            batch = waiting.get(timeout=5)
        except queue.Empty:
            if not worker.is_alive():
                raise RuntimeError(f"the process that makes batches ended with status {worker.exitcode}") from None
            continue
        if isinstance(batch, AuricleError):
            raise batch
        return batch


def _work(open_source: Callable[[], Source], first: int, stride: int, waiting: Any) -> None:
    """Puts batch after batch into the queue; what is wrong with one goes there in its place, and is the last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends its workers
    try:
        source = open_source()
        while _put(waiting, source(first)):
            first += stride
    except AuricleError as error:
        _put(waiting, error)


def _put(waiting: Any, item: Batch | AuricleError) -> bool:
    """Waits for room; False when the trainer is gone."""
    parent = os.getppid()
    while True:
        try:
            waiting.put(item, timeout=5)
            return True
        except queue.Full:
            if os.getppid() != parent:  # it was killed
                waiting.cancel_join_thread()
                return False
