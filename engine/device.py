"""Where the numbers of a run are kept: the processor's memory here, an accelerator's in a backend that brings one.

Knows how memory is had, filled and read back. Knows no op, no model and no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..kernels.formats import Format
from .kv_cache import CacheTensor
from .weights import Weight, load_weight

if TYPE_CHECKING:
    from .gguf import GGUFFile

Tensor = torch.Tensor
CacheShape = tuple[int, int, int]  # n_ctx, n_kv_head, d_head


class Weights:
    """The tensors of a file, by name, as kernels take them."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def __call__(self, name: str) -> Weight:
        return load_weight(self._file, name)

    def drop(self, group: str) -> None:
        """Gives back what the tensors of a group take, until they are asked for again."""


class Device:
    """The processor: weights stay where the file is mapped, and memory is taken when it is first touched."""

    beside: int | None = None  # bytes that this memory holds besides what is planned; None: what the process has
    # Gives what starts the work of a call again, all at once, without doing any of it; None: this device cannot.
    record: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    separate = False  # whether memory is another than the processor's, and had at once

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], filled with anything. Raises RuntimeError when there is not as much."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def constant(self, data: np.ndarray) -> Tensor:
        return torch.from_numpy(data)

    def fill(self, target: Tensor, source: np.ndarray | Tensor) -> None:
        """Copies; of a source with fewer rows than the target, to its front."""
        target[: len(source)].copy_(torch.as_tensor(source))

    def fetch(self, value: Tensor) -> np.ndarray:
        """The numbers, perhaps as a view that the next run overwrites."""
        return value.numpy()

    def binding(self) -> AbstractContextManager[None]:
        """Within it programs are bound; where that compiles kernels, it is done when this ends."""
        return nullcontext()

    def place(self, weight: Weight) -> Any:
        """One tensor of a file as kernels take it."""
        return weight

    def weights(self, file: GGUFFile, group_of: Callable[[str], str]) -> Weights:
        """All tensors of a file. `group_of` says which of them come and go together."""
        return Weights(file)

    def n_slots(self, n_tokens: int, n_ctx: int) -> int:
        """How many positions a cache gets that must hold `n_tokens` of at most `n_ctx`."""
        return n_ctx

    def weight_bytes(self, fmt: Format, shape: tuple[int, ...]) -> int:
        """What a tensor of a file takes once it is in use."""
        return fmt.tensor_bytes(shape)

    def cache_bytes(self, n_caches: int, shape: CacheShape, fmt: Format) -> int:
        n_ctx, n_kv_head, d_head = shape
        return n_caches * n_ctx * n_kv_head * fmt.row_bytes(d_head)

    def caches(self, names: Collection[str], shape: CacheShape, fmt: Format) -> dict[str, Any]:
        return {name: CacheTensor(shape, fmt) for name in names}

    def release(self) -> None:
        """Hands memory that is free, and kept for later, back to the system."""

    def copy_caches(self, old: Iterable[Any], new: Iterable[Any]) -> None:
        raise AssertionError("a cache of the processor never grows")
