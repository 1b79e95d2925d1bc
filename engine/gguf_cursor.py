"""The types of values in a GGUF file, and a cursor that reads them from a memory map without trusting any of them.

Every count and length is checked against the bytes that are left before anything is looped over or allocated.
Does not know the order of things in a file (`gguf.py`).
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..kernels.errors import AuricleError

# Limits far above any real file. A Python object takes more than its bytes in a file (51 for a string of two
# letters), so a hostile file made of nothing but small ones must end somewhere.
MAX_HEADER = 1 << 27  # bytes before the first tensor; a vocabulary of 256k tokens with its merges takes 20 MB
MAX_COST = 1 << 22  # a string of an array costs 1; a key, a tensor, an array inside an array costs ENTRY
ENTRY = 32

_BATCH = 1 << 18  # bytes looked at together in `Cursor.strings`; they stay in the second-level cache


class GGUFError(AuricleError):
    """A GGUF file that cannot be read or written, or lacks what was asked of it."""


class ValueType(IntEnum):
    """The type of a metadata value, by its number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


NUMBERS: dict[ValueType, np.dtype] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


class Cursor:
    """Reads forward through the header; nothing is read, looped over or allocated beyond what the file holds."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.map = data
        self.size = len(data)
        self.end = min(self.size, MAX_HEADER)
        self.pos = 0
        self.cost_left = MAX_COST

    def fail(self, problem: str) -> NoReturn:
        path = str(self.path)
        raise GGUFError(f"{path if path.isprintable() else repr(path)}: {problem}")

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes <= self.end - self.pos:
            return
        if n_bytes <= self.size - self.pos:
            self.fail(f"{what} lies beyond byte {MAX_HEADER:,}, where a header must have ended; the file is damaged")
        self.fail(
            f"{what} takes {n_bytes:,} bytes at byte {self.pos:,}, but the file ends at {self.size:,}; "
            "it is damaged or incomplete, fetch it again"
        )

    def check_count(self, count: int, min_bytes: int, what: str, cost: int = 0) -> None:
        """`count` things of at least `min_bytes` each must fit in what is left, and their `cost` in the allowance."""
        if count > (self.end - self.pos) // min_bytes:
            self.fail(f"{what} is {count:,}, too many for the {self.end - self.pos:,} bytes left; the file is damaged")
        self.cost_left -= count * cost
        if self.cost_left < 0:
            self.fail(
                f"{what} is {count:,}, too many: a file may have {MAX_COST:,} strings in arrays, or "
                f"{MAX_COST // ENTRY:,} keys, tensors and nested arrays"
            )

    def take(self, n_bytes: int, what: str) -> bytes:
        self.need(n_bytes, what)
        start, self.pos = self.pos, self.pos + n_bytes
        return self.map[start : self.pos]

    def integer(self, n_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(n_bytes, what), "little")

    def string(self, what: str) -> str:
        raw = self.take(self.integer(8, f"the length of {what}"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8 (byte {error.start} of it); convert the file again")

    def numbers(self, kind: ValueType, count: int, what: str) -> np.ndarray:
        """`count` numbers as a read-only copy: aligned, and alive after the file is closed."""
        raw = self.take(count * NUMBERS[kind].itemsize, what)
        if kind is ValueType.BOOL and (wrong := raw.translate(None, b"\0\1")):
            self.fail(f"{what} is a bool stored as {wrong[0]}, expected 0 or 1; the file is damaged")
        return np.frombuffer(raw, NUMBERS[kind])

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, in batches while they are regular; the first irregular one sends the rest to `string`."""
        self.check_count(count, 8, f"the length of {what}", cost=1)
        found: list[str] = []
        while len(found) < count and (batch := self._string_batch(count - len(found))):
            found += batch
        for i in range(len(found), count):
            found.append(self.string(f"element {i} of {what}"))
        return found

    def _string_batch(self, most: int) -> list[str]:
        """Up to `most` whole strings of the next `_BATCH` bytes, or none where a guess does not hold.

        The guess: six zero bytes occur only as the upper part of a length, so all lengths are found at once.
        It is then checked, each string must end where the next begins, and so the result is always exact.
        """
        block = np.frombuffer(self.map, np.uint8, min(_BATCH, self.end - self.pos), self.pos)
        if block.size < 8:
            return []
        zero = block == 0
        length_at = zero[2:-5] & zero[3:-4] & zero[4:-3] & zero[5:-2] & zero[6:-1] & zero[7:]
        length_at[:-1] &= ~length_at[1:]  # a length under 256 has seven zeros: the later start is the right one
        starts = np.flatnonzero(length_at)[:most]
        ends = starts + 8 + block[starts] + (block[starts + 1].astype(np.int64) << 8)
        n_whole = int(np.argmin(np.append(ends <= block.size, False)))  # up to the first that is cut off
        starts, ends = starts[:n_whole], ends[:n_whole]
        if not n_whole or starts[0] != 0 or not np.array_equal(starts[1:], ends[:-1]):
            return []
        text = np.ones(ends[-1], bool)
        for i in range(7):
            text[starts + i] = False
        text[7] = False  # of every other length, one zero byte stays: the separator
        try:
            batch = str(block[: ends[-1]][text], "utf-8").split("\0")
        except UnicodeDecodeError:
            return []
        if len(batch) != n_whole:  # a string holds a zero character
            return []
        self.pos += int(ends[-1])
        return batch
