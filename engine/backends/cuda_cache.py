"""Keys and values on a card: rows by position, as numbers or as Q8_0 with codes and scales apart.

One allocation holds all layers. Knows how rows are kept, not who attends to them.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from ...kernels.formats import Q8_0, Format
from ...kernels.gpu.cache import GpuCache, cache_planes
from ..device import CacheShape

Tensor = torch.Tensor
ALIGNMENT = 256  # bytes
LARGEST_CODE = 127


class DeviceCache:
    """One layer's keys or values: `planes` are what kernels take."""

    def __init__(self, shape: CacheShape, fmt: Format, memory: Tensor) -> None:
        """`memory`: uint8, `tensor_bytes`."""
        self.shape, self.format = shape, fmt
        planes, start = [], 0
        for size, dtype in cache_planes(*shape, fmt):
            kind = getattr(torch, dtype)
            n_bytes = math.prod(size) * kind.itemsize
            planes.append(memory[start : start + n_bytes].view(kind).view(size))
            start += n_bytes
        self.planes = GpuCache(*planes)

    def write(self, positions: Tensor, rows: Tensor) -> None:
        """rows float32 [n, n_kv_head, d_head] to `positions` int32 [n]."""
        codes, stored = self.planes.codes, self.planes.scales
        positions, rows = (t.to(codes.device) for t in (positions, rows))
        if stored is not None:
            blocks = rows.unflatten(-1, (-1, Q8_0.length))
            scales = blocks.abs().amax(-1) / LARGEST_CODE
            inverse = torch.where(scales > 0, 1 / scales, 0)
            scaled = (blocks * inverse[..., None]).flatten(-2)
            rows = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves away from zero, as everywhere for this type
            stored.index_copy_(0, positions.long(), scales.half())
        codes.index_copy_(0, positions.long(), rows.to(codes.dtype))

    def read(self, n: int) -> Tensor:
        """The first n rows in float32 [n, n_kv_head, d_head]."""
        rows, scales = self.planes.codes[:n].float(), self.planes.scales
        if scales is None:
            return rows
        blocks = rows.unflatten(-1, (-1, Q8_0.length))
        return (blocks * scales[:n, ..., None].float()).flatten(-2)

    def copy_from(self, other: DeviceCache) -> None:
        """Takes over the rows of a shorter cache."""
        self.planes.codes[: other.shape[0]] = other.planes.codes
        if self.planes.scales is not None:
            self.planes.scales[: other.shape[0]] = other.planes.scales


def tensor_bytes(shape: CacheShape, fmt: Format) -> int:
    """Of one layer's keys or values."""
    n_ctx, n_kv_head, d_head = shape
    return -(-n_ctx * n_kv_head * fmt.row_bytes(d_head) // ALIGNMENT) * ALIGNMENT


def cut_caches(names: Collection[str], shape: CacheShape, fmt: Format, memory: Tensor) -> dict[str, DeviceCache]:
    """A cache for each name, one after another in `memory`."""
    step = tensor_bytes(shape, fmt)
    return {name: DeviceCache(shape, fmt, memory[i * step : (i + 1) * step]) for i, name in enumerate(names)}
