"""Memory of a card: weights that are brought there once, caches, and small buffers between it and the processor.

Knows how things get to the card and what they take there. Does not know what they are for.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...kernels import layouts
from ...kernels.dequantize import dequantize
from ...kernels.formats import F16, Format
from ...kernels.gpu.launch import together
from ...kernels.gpu.tiles import TILES
from ...kernels.gpu.weights import DeviceWeight
from ..device import CacheShape, Device, Weights
from ..weights import Weight, load_weight
from .cuda_cache import DeviceCache, cut_caches, tensor_bytes
from .cuda_device import CONTEXT_BYTES, Card

if TYPE_CHECKING:
    from ..gguf import GGUFFile

log = logging.getLogger("auricle.backends")

Tensor = torch.Tensor

SLOT_BYTES, N_SLOTS = 4 << 20, 8  # of pinned memory: half of it is written while the card reads the other
N_THREADS = 4  # that write: one packs 1.5 to 2 GB/s
ALIGNMENT = 512  # bytes: what PyTorch's allocator gives out at least
SLOTS = 256  # a cache grows by so many positions


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def stored_format(fmt: Format) -> Format:
    """The type that a matrix of a file's type has on the card."""
    return fmt if fmt in TILES else F16


def placed_bytes(fmt: Format, shape: tuple[int, ...]) -> int:
    """What a tensor of a file takes on the card: a matrix as it is stored there, anything else in float32."""
    if len(shape) == 2:
        return aligned(layouts.packed_bytes(stored_format(fmt), *shape))
    return aligned(4 * math.prod(shape))


@cache
def tell_decoded(name: str) -> None:
    """Said once for each type."""
    log.info("matrices in %s are kept as F16 on the card: there is no kernel for that type", name)


def tell_compiling(done: int, total: int) -> None:
    if done < total:
        tell_compiling_once()


@cache
def tell_compiling_once() -> None:
    log.info("compiling kernels for this card, which takes a minute and is kept; `auricle warmup` does it ahead")


@dataclass(frozen=True)
class Piece:
    """Bytes on their way to the card: `write` fills a buffer of as many as `target`, uint8 [n], has; on any thread."""

    target: Tensor
    write: Callable[[np.ndarray], None]


class Staging:
    """Pinned buffers in turns: some are filled here, by several threads, while the card reads others. No tensor is
    copied whole."""

    def __init__(self, card: Card) -> None:
        self._slots = [(card.pinned(SLOT_BYTES), card.event()) for _ in range(N_SLOTS)]
        self._threads = ThreadPoolExecutor(min(N_THREADS, os.cpu_count() or 1), "auricle-upload")
        self._turn = 0
        self._lock = threading.Lock()  # models of several threads share a card

    def copy(self, target: Tensor, source: np.ndarray) -> None:
        """Queues a copy of the bytes `source` to `target`, both uint8 [n]; `source` may change afterwards."""
        assert target.shape == source.shape, f"{target.shape=} {source.shape=}"
        parts = (slice(start, start + SLOT_BYTES) for start in range(0, len(source), SLOT_BYTES))
        self.upload(Piece(target[part], partial(np.copyto, src=source[part])) for part in parts)

    def upload(self, pieces: Iterable[Piece]) -> None:
        """Queues copies in the order of the pieces, of at most SLOT_BYTES each; all have been written when it returns.

        What a piece raises is raised here, when the pieces before it are queued and none is being written any more.
        """
        with self._lock:
            writing: deque[tuple[Piece, int, Future[None]]] = deque()
            try:
                for piece in pieces:
                    if len(writing) == N_SLOTS:
                        self._queue(*writing.popleft())
                    writing.append((piece, self._turn, self._threads.submit(self._write, piece, self._turn)))
                    self._turn = (self._turn + 1) % N_SLOTS
                while writing:
                    self._queue(*writing.popleft())
            finally:
                wait([future for _, _, future in writing])

    def _write(self, piece: Piece, slot: int) -> None:
        buffer, event = self._slots[slot]
        event.synchronize()
        piece.write(buffer[: len(piece.target)].numpy())

    def _queue(self, piece: Piece, slot: int, written: Future[None]) -> None:
        written.result()
        buffer, event = self._slots[slot]
        piece.target.copy_(buffer[: len(piece.target)], non_blocking=True)
        event.record()


class CardWeights(Weights):
    """Tensors of a file on the card: a group is one allocation, and each tensor is brought when it is asked for."""

    def __init__(self, device: CardDevice, file: GGUFFile, group_of: Callable[[str], str]) -> None:
        super().__init__(file)
        self._device, self._group_of = device, group_of
        self._offsets: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        for name, info in file.tensors.items():
            group = group_of(name)
            self._offsets[name] = self._sizes.get(group, 0)
            self._sizes[group] = self._offsets[name] + placed_bytes(info.format, info.shape)
        self._memory: dict[str, Tensor] = {}
        self._placed: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self._placed:
            group = self._group_of(name)
            if group not in self._memory:
                self._memory[group] = self._device.empty(self._sizes[group])
            weight, start = load_weight(self._file, name), self._offsets[name]
            memory = self._memory[group][start : start + placed_bytes(weight.format, weight.shape)]
            self._placed[name] = self._device.bring(weight, memory)
            self._file.forget(name)
        return self._placed[name]

    def drop(self, group: str) -> None:
        self._placed = {name: w for name, w in self._placed.items() if self._group_of(name) != group}
        self._memory.pop(group, None)


class CardDevice(Device):
    """A card's memory, every piece of it had through `empty`."""

    separate = True
    beside = CONTEXT_BYTES

    def __init__(self, card: Card) -> None:
        self.card = card
        self._staging: Staging | None = None

    @property
    def staging(self) -> Staging:
        if self._staging is None:
            self._staging = Staging(self.card)
        return self._staging

    def empty(self, nbytes: int) -> Tensor:
        return self.card.empty(aligned(nbytes))[:nbytes]

    def constant(self, data: np.ndarray) -> Tensor:
        memory = self.empty(data.nbytes)
        self.staging.copy(memory, np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        return memory.view(torch.from_numpy(data[:0]).dtype).view(data.shape)

    def fill(self, target: Tensor, source: np.ndarray | Tensor) -> None:
        """Does not wait, and `source` may change afterwards."""
        if isinstance(source, Tensor) and source.device == target.device:
            target[: len(source)].copy_(source)
            return
        array = torch.as_tensor(source).to(target.dtype).contiguous().numpy()
        self.staging.copy(target[: len(array)].view(-1).view(torch.uint8), array.reshape(-1).view(np.uint8))

    def fetch(self, value: Tensor) -> np.ndarray:
        """Waits for it."""
        return value.cpu().numpy()

    def binding(self) -> AbstractContextManager[None]:
        return together(tell_compiling)

    def place(self, weight: Weight) -> Any:
        return self.bring(weight, self.empty(placed_bytes(weight.format, weight.shape)))

    def bring(self, weight: Weight, memory: Tensor) -> Any:
        """A tensor of a file into `memory` uint8 [`placed_bytes`]: a DeviceWeight, or numbers in float32."""
        if len(weight.shape) != 2:
            values = weight.decode().numpy()
            memory = memory[: values.nbytes]
            self.staging.copy(memory, values.reshape(-1).view(np.uint8))
            return memory.view(torch.float32).view(weight.shape)
        fmt, (n_rows, n_cols) = stored_format(weight.format), weight.shape
        if fmt is not weight.format:
            tell_decoded(weight.format.name)
        stride = layouts.find_layout(fmt, n_cols).stride
        data = memory[: n_rows * stride]
        step = max(1, SLOT_BYTES // (stride if fmt is weight.format else 4 * n_cols))  # decoded, it takes float32
        assert stride <= SLOT_BYTES, f"{weight.name}: a row of {stride} bytes"
        rows = [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
        pieces = (Piece(data[i * stride : j * stride], partial(write_rows, weight, i, j, fmt)) for i, j in rows)
        self.staging.upload(pieces)
        return DeviceWeight(data.view(torch.int32), fmt, n_rows, n_cols)

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """`call` has run before, and allocates nothing."""
        return self.card.capture(call, warm_ups=0)

    def weights(self, file: GGUFFile, group_of: Callable[[str], str]) -> Weights:
        return CardWeights(self, file, group_of)

    def weight_bytes(self, fmt: Format, shape: tuple[int, ...]) -> int:
        return placed_bytes(fmt, shape)

    def n_slots(self, n_tokens: int, n_ctx: int) -> int:
        return min(n_ctx, -(-n_tokens // SLOTS) * SLOTS)

    def caches(self, names: Collection[str], shape: CacheShape, fmt: Format) -> dict[str, DeviceCache]:
        return cut_caches(names, shape, fmt, self.empty(self.cache_bytes(len(names), shape, fmt)))

    def cache_bytes(self, n_caches: int, shape: CacheShape, fmt: Format) -> int:
        return n_caches * tensor_bytes(shape, fmt)

    def copy_caches(self, old: Iterable[DeviceCache], new: Iterable[DeviceCache]) -> None:
        for shorter, longer in zip(old, new, strict=True):
            longer.copy_from(shorter)

    def release(self) -> None:
        self.card.release()


def write_rows(weight: Weight, start: int, stop: int, fmt: Format, out: np.ndarray) -> None:
    """Rows of a matrix in the type `fmt`, its own or F16, as they lie on the card: into uint8 [n]."""
    rows = weight.rows()[start:stop]
    if fmt is not weight.format:
        rows = dequantize(rows, weight.format).astype(np.float16).view(np.uint8)
    layouts.pack_into(out.reshape(stop - start, -1), rows, fmt)
