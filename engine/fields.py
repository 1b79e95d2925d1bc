"""What a file says under its keys, asked for with the kind that each must have.

The one way from a value that nobody has looked at to one that can be relied on, for the metadata of GGUF files and for
JSON alike: a wrong kind, a number out of range and a missing key each become the error of the reader that asked, in a
line with the file, the key, the value and the remedy. Knows no file format and no key.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..kernels.errors import AuricleError
from ..kernels.quote import quote

T = TypeVar("T")

WORDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object", list: "a list",
    list[int]: "a list of whole numbers", list[float]: "a list of numbers", list[str]: "a list of texts",
    list[dict]: "a list of objects", list[list[str]]: "a list of lists of texts",
    np.ndarray: "a list of numbers",
}  # fmt: skip
"""The kinds that can be asked for, in words. `int` is no bool; `float` is finite, and a whole number serves; an array
of numbers serves as a list, and the reverse, where `np.ndarray` [n] is asked for."""


class Fields:
    """Values by key. `where` begins each message; `remedy` ends it."""

    def __init__(self, values: Mapping[str, Any], where: object, error: type[AuricleError], remedy: str) -> None:
        self.values = values
        self.where = str(where)
        self.error = error
        self.remedy = remedy

    def look_up(self, key: str) -> Any:
        """The value as it is, None where there is none. Nobody has looked at it."""
        return self.values.get(key)

    def get(self, key: str, kind: type[T], default: Any = None, *, within: tuple[float, float] | None = None) -> T:
        """The value of `key`, `default` where there is none. Raises the error of the file for another kind, or a number
        that is not within the two (inclusive)."""
        value = self.look_up(key)
        if value is None:
            return default
        found = as_kind(value, kind)
        if found is None:
            raise self.complaint(key, f"it must be {WORDS[kind]}")
        if within is not None and not within[0] <= found <= within[1]:
            low, high = within
            raise self.complaint(
                key, f"it must be {low} or more" if high == math.inf else f"it must be {low} to {high}"
            )
        return found

    def require(self, key: str, kind: type[T], *, within: tuple[float, float] | None = None) -> T:
        """As `get`, and the file must have the key."""
        value = self.get(key, kind, within=within)
        if value is None:
            raise self.error(f"{self.where} lacks {key}; {self.remedy}")
        return value

    def complaint(self, key: str, problem: str) -> AuricleError:
        """An error about the value of `key`, to be raised."""
        return self.error(f"{self.where} says {key} = {quote(self.look_up(key))}: {problem}; {self.remedy}")


def as_kind(value: Any, kind: type[T]) -> T | None:
    """`value` where it is of a kind of `WORDS`, else None."""
    if kind is np.ndarray:
        return _as_array(value)
    if kind is float:
        return _as_float(value)
    item = typing.get_args(kind)
    if not item:
        return value if type(value) is kind else None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        return None
    found = value if item[0] is str else [as_kind(x, item[0]) for x in value]
    good = all(type(x) is str for x in found) if item[0] is str else all(x is not None for x in found)
    return found if good else None


def _as_float(value: Any) -> float | None:
    if type(value) is int and abs(value) > 10**308:
        return None
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _as_array(value: Any) -> np.ndarray | None:
    """Numbers [n]; bools are none."""
    if isinstance(value, Sequence) and not isinstance(value, str) and all(type(x) in (int, float) for x in value):
        try:
            value = np.array(value) if value else np.zeros(0)
        except OverflowError:
            return None
    good = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf"
    return value if good else None
