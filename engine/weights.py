"""Tensors of the model file as a backend wants them: the mapped bytes, decoded only when asked.

Knows formats and files. Does not know what a tensor is for.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.dequantize import dequantize
from ..kernels.formats import BF16, F16, F32, Format

if TYPE_CHECKING:
    import torch

    from .gguf import GGUFFile

SLAB_BYTES = 16 << 20  # of float32 decoded at a time, so that a decoder's temporaries stay small


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor where it lies: `data` uint8 [*shape[:-1], row_bytes], a view of the mapped file."""

    name: str
    format: Format
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows when all but the innermost dimension are counted as one."""
        return math.prod(self.shape[:-1])

    def rows(self) -> np.ndarray:
        """The bytes as [n_rows, row_bytes]."""
        return self.data.reshape(self.n_rows, -1)

    def decode(self) -> torch.Tensor:
        """The whole tensor in float32; of an F32 tensor no copy is made."""
        import torch

        if self.format is F32:
            return borrow(self.data.view("<f4")).reshape(self.shape)
        out = torch.empty(self.n_rows, self.shape[-1])
        step = max(1, SLAB_BYTES // (4 * self.shape[-1]))
        for start in range(0, self.n_rows, step):
            self.decode_rows(start, min(start + step, self.n_rows), out[start : start + step])
        return out.reshape(self.shape)

    def decode_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Rows start .. stop - 1 into out float32 [stop - start, n_cols]."""
        out.copy_(as_tensor(self.rows()[start:stop], self.format))

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` [n] in float32 [n, n_cols]; no other row is touched."""
        return as_tensor(self.rows()[ids.numpy()], self.format).float()


def as_tensor(data: np.ndarray, fmt: Format) -> torch.Tensor:
    """uint8 [..., row_bytes] -> [..., n_cols]: plain numbers as they are stored, blocks decoded to float32."""
    import torch

    if fmt in (F32, F16):
        return borrow(data.view(fmt.layout))
    if fmt is BF16:
        return borrow(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(dequantize(data, fmt))


def borrow(array: np.ndarray) -> torch.Tensor:
    """A tensor over numpy memory that may be read-only; nobody may write to it."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def load_weight(file: GGUFFile, name: str) -> Weight:
    info = file.tensors[name]
    return Weight(name, info.format, info.shape, file.data(name))
