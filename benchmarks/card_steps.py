"""A process goes through named steps and writes down what came of each: the side of `card_worker.py` that computes.

Several processes may share one list: whoever claims a step first does it. A step that ends the process is told by the
one who watches, and the process that is started in its place goes on with what nobody has claimed. Needs the standard
library only.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Step = Callable[[], Mapping[str, Any] | None]
TAIL = 12  # lines of a traceback


class Journal:
    """Lines of JSON in a file: `begin` and then `end` of each step. Claims are files in a folder."""

    def __init__(self, results: Path, claims: Path) -> None:
        self._results, self._claims = results, claims
        self._start = 0.0
        claims.mkdir(parents=True, exist_ok=True)

    def claim(self, name: str) -> bool:
        """Whether the step is this process's to do; it begins now."""
        mark = self._claims / f"{zlib.crc32(name.encode()):08x}"
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        self._start = time.perf_counter()
        self._write({"begin": name, "at": time.time()})
        return True

    def end(self, name: str, ok: bool, result: Mapping[str, Any]) -> None:
        seconds = round(time.perf_counter() - self._start, 3)
        self._write({"step": name, "ok": ok, "seconds": seconds, **result})

    def _write(self, line: Mapping[str, Any]) -> None:
        with open(self._results, "a") as file:
            file.write(json.dumps(line, default=plain) + "\n")


def plain(value: Any) -> Any:
    """Numbers of other libraries for JSON."""
    return value.item() if hasattr(value, "item") else str(value)


def run_steps(steps: Mapping[str, Step], journal: Journal) -> None:
    """Does what is left. A failed assertion is a result; anything else that is raised ends the process, since after an
    error on a card nothing that it says can be trusted."""
    for name, step in steps.items():
        if not journal.claim(name):
            continue
        try:
            result = dict(step() or {})
            journal.end(name, result.pop("ok", True), result)
        except AssertionError:
            journal.end(name, False, {"failure": last_lines(traceback.format_exc())})


def last_lines(text: str, n: int = TAIL) -> str:
    return "\n".join(text.strip().splitlines()[-n:])
