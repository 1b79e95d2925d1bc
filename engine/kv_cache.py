"""The decoder's memory of the past: keys and values by layer and position, in a type that may be small.

Knows how rows are kept. Does not know who attends to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.dequantize import dequantize
from ..kernels.formats import F16, F32, Q8_0, Format
from ..kernels.quantize import quantize
from .sampling import OptionError

if TYPE_CHECKING:
    import torch

KV_FORMATS: dict[str, Format] = {"f32": F32, "f16": F16, "q8_0": Q8_0}


def find_kv_format(kv_type: str, d_head: int) -> Format:
    """How rows of `d_head` are kept under that name; OptionError if they can't be."""
    if kv_type not in KV_FORMATS:
        raise OptionError(f"--kv-type is {kv_type!r}; it must be one of: {', '.join(KV_FORMATS)}")
    if d_head % KV_FORMATS[kv_type].length:
        raise OptionError(f"--kv-type {kv_type} needs heads of a multiple of 32; this model's are {d_head}; use f16")
    return KV_FORMATS[kv_type]


class CacheTensor:
    """Rows [n_kv_head, d_head] at positions 0 .. n_ctx - 1, one layer's keys or values.

    The memory is reserved at once and touched as it is used, so that its address never changes.
    """

    def __init__(self, shape: tuple[int, int, int], fmt: Format) -> None:
        import torch

        n_ctx, n_kv_head, d_head = shape
        self.shape, self.format = shape, fmt
        dtype, width = {F32: (torch.float32, d_head), F16: (torch.float16, d_head)}.get(
            fmt, (torch.uint8, fmt.row_bytes(d_head))
        )
        self.data = torch.empty(n_ctx, n_kv_head, width, dtype=dtype)

    def write(self, positions: torch.Tensor, rows: torch.Tensor) -> None:
        """rows float32 [n, n_kv_head, d_head] to `positions` int32 [n]."""
        import torch

        if self.format is Q8_0:
            blocks = quantize(rows.reshape(-1, rows.shape[-1]).contiguous().numpy(), Q8_0)
            rows = torch.from_numpy(blocks).reshape(*rows.shape[:2], self.data.shape[-1])
        self.data[positions.long()] = rows.to(self.data.dtype)

    def read_head(self, head: int, out: torch.Tensor) -> torch.Tensor:
        """The first rows of one head into out float32 [n, d_head]; gives out, or a view where no copy is needed."""
        import torch

        stored = self.data[: out.shape[0], head]
        if self.format is F32:
            return stored
        if self.format is Q8_0:
            stored = torch.from_numpy(dequantize(stored.contiguous().numpy(), Q8_0))
        return out.copy_(stored)

    def read(self, n: int) -> torch.Tensor:
        """The first n rows in float32 [n, n_kv_head, d_head]; a view when they are kept so."""
        import torch

        if self.format is Q8_0:
            return torch.from_numpy(dequantize(self.data[:n].numpy(), Q8_0))
        return self.data[:n].float()


def cache_bytes(n_layer: int, n_ctx: int, n_kv_head: int, d_head: int, fmt: Format) -> int:
    """Bytes of keys and values of all layers."""
    return 2 * n_layer * n_ctx * n_kv_head * fmt.row_bytes(d_head)
