"""Processes that may crash, hang or be cut short, and whose results are kept all the same.

A worker runs a command that goes through steps (`card_steps.py`). Where a step ends the process or takes too long, that
is the step's result, and a new process goes on after it. Knows no step and nothing of a card.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from card_steps import last_lines

MOST_STARTS = 40  # of one worker: a step that fails costs one
POLL_S = 0.1
GRACE_S = 3.0  # between the signals TERM and KILL


@dataclass
class Worker:
    """One command in a process group of its own; `step_s`: seconds that one step may take."""

    name: str
    command: Sequence[object]
    folder: Path
    step_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    note: str = ""

    @property
    def results(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log_start, self._began = self._size(), time.monotonic()
        self._known = len(self.rows())
        command = [*map(str, self.command), "--results", str(self.results), "--started", repr(time.time())]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Whether there is still something to wait for; starts again what has ended too early."""
        if self.process is None:
            return False
        code = self.process.poll()
        if code is None:
            step, since = self._current()
            if since > self.step_s:
                self._end(f"took longer than {self.step_s:.0f} s" if step else "did not come to a first step")
                return self._again()
            return True
        step, _ = self._current()
        self.process = None
        if code == 0 and step is None:
            return False
        self._fail(step, f"the process ended with {name_code(code)}")
        return self._again()

    def stop(self, reason: str) -> None:
        """Ends it for good; a step at work is told as cut off."""
        if self.process is None:
            return
        if self.process.poll() == 0 and self._current()[0] is None:
            self.process = None
        else:
            self._end(reason)

    def rows(self) -> list[dict[str, Any]]:
        """All lines so far; one that is not whole is left out."""
        if not self.results.exists():
            return []
        found = []
        for line in self.results.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def finished(self) -> list[dict[str, Any]]:
        """The results."""
        return [row for row in self.rows() if "step" in row]

    def _current(self) -> tuple[str | None, float]:
        """The step at work and for how long; None and the time since the start where none is."""
        rows = self.rows()
        if len(rows) > self._known and "begin" in rows[-1]:
            return rows[-1]["begin"], time.time() - rows[-1]["at"]
        if len(rows) > self._known:
            return None, 0.0  # between two steps
        return None, time.monotonic() - self._began

    def _end(self, reason: str) -> None:
        assert self.process is not None
        kill_group(self.process)
        step, _ = self._current()
        self._fail(step, reason)
        self.process = None

    def _fail(self, step: str | None, reason: str) -> None:
        tail = last_lines(self._new_log())
        if step is None:
            self.note = f"{reason}\n{tail}"
            return
        line = {"step": step, "ok": False, "failure": f"{reason}\n{tail}"}
        with open(self.results, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _again(self) -> bool:
        """Starts a new process, unless there is nothing to gain: no step had begun, or too many have failed."""
        self.process = None
        if len(self.rows()) == self._known or self.starts >= MOST_STARTS:
            return False
        self.start()
        return True

    def _size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _new_log(self) -> str:
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")


def name_code(code: int) -> str:
    """An exit status in words."""
    return f"status {code}" if code >= 0 else signal.Signals(-code).name


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started; waits until it is gone."""
    for name, patience in (("SIGTERM", GRACE_S), ("SIGKILL", GRACE_S)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, getattr(signal, name))
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with suppress(ProcessLookupError):  # children that outlived their parent
        os.killpg(process.pid, signal.SIGKILL)


def run_workers(
    workers: Sequence[Worker], deadline: float, beside: Sequence[Worker] = (), at_once: bool = True
) -> bool:
    """Runs workers until all are done, or `deadline` (of `time.monotonic`); False when they were cut short. `beside`:
    others that are at work already and only looked after. `at_once`: all together, else one after another."""
    waiting = list(workers)
    running: list[Worker] = []
    while time.monotonic() < deadline:
        while waiting and (at_once or not running):
            running.append(waiting.pop(0))
            running[-1].start()
        running = [worker for worker in running if worker.poll()]
        for worker in beside:
            worker.poll()
        if not running and not waiting:
            return True
        time.sleep(POLL_S)
    stop_all(running, "cut off by the time limit of the stage")
    return False


def wait_for(workers: Sequence[Worker], deadline: float) -> bool:
    """Waits for workers that run already; those that are not done by then are ended."""
    while time.monotonic() < deadline:
        if not [worker for worker in workers if worker.poll()]:
            return True
        time.sleep(POLL_S)
    stop_all(workers, "cut off by the time limit of the stage")
    return False


def stop_all(workers: Sequence[Worker], reason: str) -> None:
    """Ends them for good, at the same time: many that do not listen take no longer than one."""
    alive = [w.process for w in workers if w.process is not None and w.process.poll() is None]
    for name in ("SIGTERM", "SIGKILL"):
        for process in alive:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, getattr(signal, name))
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and any(process.poll() is None for process in alive):
            time.sleep(POLL_S / 2)
    for worker in workers:
        worker.stop(reason)
