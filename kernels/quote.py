"""A value that a file holds, in quotes for a message about it. Knows nothing else."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_QUOTED = 80  # characters
MAX_DIGITS = 40  # of a whole number


class _Brief(reprlib.Repr):
    """The beginning of a value, however large or deep it is."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**MAX_DIGITS else f"a number of {x.bit_length()} bits"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x if len(x) <= MAX_QUOTED else x[:MAX_QUOTED] + "…")


def quote(value: Any) -> str:
    """A value as Python writes it, on one line whatever it holds; what is long is cut."""
    brief = _Brief()
    brief.maxother = 2 * MAX_QUOTED
    if isinstance(value, str):
        return brief.repr(value)
    text = " ".join(brief.repr(value).split())
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"
