"""Work shared out to threads: results in order, few at a time, the first failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from auricle.convert.threads import run_in_order


def sleepy(i: int) -> Callable[[], int]:
    def task() -> int:
        time.sleep(0.002 * (7 - i % 8))
        return i

    return task


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_order(jobs: int) -> None:
    assert list(run_in_order(map(sleepy, range(20)), jobs)) == list(range(20))
    assert list(run_in_order([], jobs)) == []


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_few_tasks_are_under_way(jobs: int) -> None:
    made = fetched = running = most_made = most_running = 0
    lock = threading.Lock()

    def task() -> None:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    def tasks() -> Iterator[Callable[[], None]]:
        nonlocal made, most_made
        for _ in range(40):
            made += 1
            most_made = max(most_made, made - fetched)
            yield task

    for _ in run_in_order(tasks(), jobs):
        fetched += 1
    assert fetched == 40
    assert most_running <= jobs
    assert most_made <= 2 * jobs + 1


def test_the_first_failure_in_order_is_raised_and_ends_the_work() -> None:
    begun = []

    def task(i: int) -> int:
        begun.append(i)
        if i in (3, 5):
            time.sleep(0.01 if i == 3 else 0)
            raise ValueError(i)
        return i

    results = run_in_order((lambda i=i: task(i) for i in range(100)), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert max(begun) < 10
