"""Workers that take turns: each in a process of its own, computing only while it is asked something.

A request and its answer are a line of JSON each. On Linux it is watched how much of the processors others took
meanwhile: what was measured beside other work means little, least of all for threads that wait for each other. Needs
the standard library only, since a worker may run in another Python than the one that asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SHORT_S = 0.5  # what takes less is not watched: processor times are counted in hundredths
SETTLE_S = 0.3  # threads of a library keep spinning for a moment after their work


def serve(tasks: Mapping[str, Callable[..., Any]]) -> None:
    """Answers requests from stdin until it ends. What tasks print goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = tasks[request.pop("task")](**request)
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()


def busy_seconds() -> float:
    """Seconds that all processors together have worked so far, for anybody."""
    user, nice, system, _idle, _wait, *rest = _read_numbers("/proc/stat", "cpu ")
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(share: float, limit_s: float) -> bool:
    """Waits until all processors together are busy for less than `share` of a second; False when `limit_s` is over."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < share * (os.cpu_count() or 1):
            return True
    return False


def process_seconds(pid: int) -> float:
    """Seconds that processors have worked for a process."""
    numbers = _read_numbers(f"/proc/{pid}/stat", ") ", skip=1)  # after the name and the state
    return (numbers[10] + numbers[11]) / os.sysconf("SC_CLK_TCK")


def _read_numbers(path: str, mark: str, skip: int = 0) -> list[int]:
    """The numbers after the last `mark` in the line that has it, without the first `skip` words."""
    file = Path(path)
    if not file.exists():
        return [0] * 40
    line = next(line for line in file.read_text().splitlines() if mark in line)
    return [int(word) for word in line.rpartition(mark)[2].split()[skip:]]


class Worker:
    """A worker's process, started at the first question. `close` ends it; the next question starts another one.

    `disturbance`: the share of the processors that others took during the last question.
    """

    def __init__(self, name: str, command: list[object], log: Path) -> None:
        self.name, self._command, self._log = name, [str(word) for word in command], log
        self._process: subprocess.Popen[str] | None = None
        self.disturbance = 0.0

    def ask(self, task: str, **arguments: Any) -> Any:
        """The answer to a request, when it is there. Ends the program when the worker fails."""
        if self._process is None:
            with open(self._log, "w") as log:
                pipe = subprocess.PIPE
                self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        time.sleep(SETTLE_S)
        pid, start = self._process.pid, time.perf_counter()
        others = busy_seconds() - process_seconds(pid)
        answer = self._exchange({"task": task, **arguments})
        others = busy_seconds() - process_seconds(pid) - others
        seconds = time.perf_counter() - start
        self.disturbance = others / seconds / (os.cpu_count() or 1) if seconds > SHORT_S else 0.0
        return answer

    def _exchange(self, request: dict[str, Any]) -> Any:
        assert self._process is not None
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        questions.write(json.dumps(request) + "\n")
        questions.flush()
        line = answers.readline()
        if not line:
            sys.exit(f"{self.name} failed at {request['task']}; see {self._log}")
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None
