"""Uncompressed samples: the bytes of each type to float32 of full scale 1. Knows nothing of files.

The companding laws are ITU-T G.711's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class SampleType:
    """How one sample lies in memory. `kind`: "i" signed, "u" unsigned, "f" float, "A" A-law, "U" mu-law.

    n_bytes: of one sample. order: "<" or ">".
    """

    kind: str
    n_bytes: int
    order: str = "<"

    @property
    def known(self) -> bool:
        return self.n_bytes in _WIDTHS[self.kind]

    def decode(self, data: bytes) -> np.ndarray:
        """Whole samples to float32, [n]. Values that float32 cannot hold become infinite."""
        if self.kind in _LAWS:
            return _LAWS[self.kind]()[np.frombuffer(data, np.uint8)]
        if self.n_bytes == 3:
            return self._decode_24(data)
        samples = np.frombuffer(data, f"{self.order}{self.kind}{self.n_bytes}")
        if self.kind == "f":
            with np.errstate(over="ignore", invalid="ignore"):
                return samples.astype(np.float32)
        return scale_integers(samples)

    def _decode_24(self, data: bytes) -> np.ndarray:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        at = slice(1, 4) if self.order == "<" else slice(0, 3)
        wide[:, at] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return scale_integers(wide.view(f"{self.order}i4")[:, 0])


def scale_integers(samples: np.ndarray) -> np.ndarray:
    """Integers of 8, 16 or 32 bits to float32 by their full range; unsigned ones rest at half of it. Same shape."""
    full = np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    rest = full if samples.dtype.kind == "u" else np.float32(0)
    return (samples.astype(np.float32) - rest) / full


def _expand_mu_law() -> np.ndarray:
    code = ~np.arange(256) & 0xFF
    size = (((code & 0xF) << 3) + 0x84 << (code >> 4 & 7)) - 0x84
    return np.where(code & 0x80, -size, size)


def _expand_a_law() -> np.ndarray:
    code = np.arange(256) ^ 0x55
    segment, step = code >> 4 & 7, code & 0xF
    size = np.where(segment == 0, (step << 4) + 8, (step << 4) + 0x108 << np.maximum(segment, 1) - 1)
    return np.where(code & 0x80, size, -size)


@cache
def _mu_law() -> np.ndarray:
    return (_expand_mu_law() / 2.0**15).astype(np.float32)


@cache
def _a_law() -> np.ndarray:
    return (_expand_a_law() / 2.0**15).astype(np.float32)


_LAWS: dict[str, Callable[[], np.ndarray]] = {"U": _mu_law, "A": _a_law}
_WIDTHS = {"i": (1, 2, 3, 4), "u": (1,), "f": (4, 8), "A": (1,), "U": (1,)}
