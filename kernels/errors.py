"""The one base class of every error a user can cause, and how such an error shows what a file holds. Knows nothing
else."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_SHOWN = 80  # characters of a value in a message
MAX_DIGITS = 40  # of a whole number


class AuricleError(Exception):
    """A mistake of the user or of their files, told in one line: the value and the remedy."""


class _Brief(reprlib.Repr):
    """The beginning of a value, however large or deep it is."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**MAX_DIGITS else f"a number of {x.bit_length()} bits"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x if len(x) <= MAX_SHOWN else x[:MAX_SHOWN] + "…")


def show(value: Any) -> str:
    """A value from a file, fit for one line of text whatever it holds: characters that a terminal would act upon are
    escaped, and the rest of what is long is left out."""
    brief = _Brief()
    brief.maxother = 2 * MAX_SHOWN
    if isinstance(value, str):
        return brief.repr(value)
    text = " ".join(brief.repr(value).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def show_name(name: object, limit: int = MAX_SHOWN) -> str:
    """A path, a key or a tensor's name in a message: as it is where it is short and harmless."""
    text = str(name)
    if text and text.isprintable() and len(text) <= limit:
        return text
    return repr(text if len(text) <= limit else text[:limit] + "…")


def show_path(path: object) -> str:
    """The path of a file in a message."""
    return show_name(path, 4096)
