"""A matrix of weights in GPU memory, and what kernels ask about it. Knows no file; `layouts.py` has the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..formats import Format
from ..layouts import find_layout, pack
from .tiles import TILES, WORD, Shape, Tile
from .units import UNITS, UnitKind

MOST_WORDS = 1 << 31  # kernels count words with 32 bits


@dataclass(frozen=True)
class DeviceWeight:
    """`words`: int32 [n_rows * stride / 4], rows as `layouts.pack` makes them, on any device; 16-byte aligned."""

    words: torch.Tensor
    format: Format
    n_rows: int
    n_cols: int

    def __post_init__(self) -> None:
        assert self.format in TILES, f"no tile decoder for {self.format}"
        expected = self.n_rows * self.stride
        assert self.words.dtype == torch.int32, f"{self.words.dtype=}"
        assert self.words.numel() == expected < MOST_WORDS, f"{self.words.numel()=} {expected=}"

    @property
    def tile(self) -> Tile:
        return TILES[self.format]

    @property
    def kind(self) -> UnitKind:
        return UNITS[self.format]

    @property
    def stride(self) -> int:
        """Words from one row to the next."""
        return find_layout(self.format, self.n_cols).stride // WORD

    @property
    def shape(self) -> Shape:
        """What the mat-mat must know about the matrix when it is compiled, besides the decoder."""
        return self.tile.matrix(self.n_cols)


def device_weight(rows: np.ndarray, fmt: Format, device: str = "cpu") -> DeviceWeight:
    """A weight from rows of a file, uint8 [n_rows, row_bytes]; packed in one piece, so for small ones and tests."""
    n_cols = rows.shape[1] // fmt.block_bytes * fmt.length
    words = torch.from_numpy(pack(rows, fmt).view(np.int32).reshape(-1))
    return DeviceWeight(words.to(device), fmt, len(rows), n_cols)
