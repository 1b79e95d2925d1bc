"""A plain CPU in the place of a GPU: what the CUDA backend asks of a card, without streams, pinned memory or recording.

It counts what is allocated. Triton must run its interpreter: TRITON_INTERPRET=1 before anything is imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


class NoEvent:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class StandIn:
    """A card's interface (see `engine/backends/cuda_device.py`). `allocated` and `peak` are bytes."""

    name, capability = "stand-in", (8, 9)

    def __init__(self) -> None:
        self.target = torch.device("cpu")
        self.allocated = self.peak = 0

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(memory.untyped_storage(), self._free, nbytes)
        return memory

    def _free(self, nbytes: int) -> None:
        self.allocated -= nbytes

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def event(self) -> NoEvent:
        return NoEvent()

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        return call

    def release(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40

    def peak_bytes(self) -> int:
        return self.peak
