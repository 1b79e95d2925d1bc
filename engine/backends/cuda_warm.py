"""Compiles the kernels of the CUDA backend for a model before they are needed.

Its programs are bound as for a request, on the card's own terms, but to memory that is not there (PyTorch's `meta`
device): so Triton keeps just what a request will ask for. Reads no weights, and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...kernels import layouts
from ...kernels.formats import Format
from ...kernels.gpu.launch import Progress, together
from ...kernels.gpu.weights import DeviceWeight
from ..executor import Draft, Program
from ..models.moss_audio import MossAudioConfig, token_count
from ..runtime import draft_program, row_stages, step_program
from ..sampling import Kind
from ..weights import Weight
from .backend import Backend
from .cuda_cache import cut_caches
from .cuda_memory import CardDevice, stored_format
from .cuda_sampling import Choice

if TYPE_CHECKING:
    from ..gguf import GGUFFile

N_SLOTS = 1024  # of the cache; kernels do not depend on it
KINDS = (Kind(False, False, False, False), Kind(True, True, True, True))  # all parts of the choice are in these two


class NoCard:
    """Memory of no card: it has addresses as one would have, and nothing can be read there."""

    target = torch.device("meta")

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.target)


class NoDevice(CardDevice):
    """What a card's device gives programs, without a card."""

    def __init__(self) -> None:
        super().__init__(NoCard())

    def constant(self, data: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(data).to("meta")

    def bring(self, weight: Weight, memory: torch.Tensor) -> Any:
        if len(weight.shape) != 2:
            return torch.empty(weight.shape, device="meta")
        fmt = stored_format(weight.format)
        return DeviceWeight(memory[: layouts.packed_bytes(fmt, *weight.shape)].view(torch.int32), fmt, *weight.shape)


def warm(file: GGUFFile, config: MossAudioConfig, backend: Backend, kv_format: Format, progress: Progress) -> None:
    """Compiles what requests to a model on `backend`, a card's, ask for, or finds it where compiled kernels are kept.
    `progress(done, total)`: see `launch.together`."""
    device = NoDevice()
    backend = replace(backend, device=device)
    empty = np.empty((0, 0), np.uint8)
    weights = {name: device.place(Weight(name, info.format, info.shape, empty)) for name, info in file.tensors.items()}
    d = config.decoder
    names, shape = (
        [f"kv.{n}.{part}" for n in range(d.num_layers) for part in "kv"],
        (N_SLOTS, d.num_kv_heads, d.head_dim),
    )
    caches = cut_caches(names, shape, kv_format, device.empty(device.cache_bytes(len(names), shape, kv_format)))
    with together(progress):
        for draft in list_drafts(config, backend):
            Program(draft, weights.__getitem__, caches)
        for kind in KINDS:
            key, results = step_program(kind)
            outputs = Program(
                draft_program(config, backend, N_SLOTS, key, results), weights.__getitem__, caches
            ).outputs
            choice = Choice(device, d.vocab_size, N_SLOTS)
            if kind.likeliest:
                choice.bind_counters(outputs["token"])
            else:
                choice.bind(outputs["logits"][0], kind)


def list_drafts(config: MossAudioConfig, backend: Backend) -> Iterator[Draft]:
    """The programs of a request: pieces of a prompt and batches of windows, of every size that leads to other kernels.

    How products are cut depends on the power of two above the tokens, and on whether there are enough tiles for all
    multiprocessors, which more tokens only make more: the powers of two have met every cut.
    """
    n = backend.prefill_step
    while n <= backend.prefill_chunk:
        yield draft_program(config, backend, N_SLOTS, ("decoder", n, "last", True), ["logits"])
        n *= 2
    # Of a piece that is not the last, the last layer only fills the cache.
    yield draft_program(config, backend, N_SLOTS, ("decoder", backend.prefill_chunk, "none", True), [])
    n_frames = config.encoder.window_frames
    batches = [(1, n_frames // 4), (1, n_frames // 2)]
    n_windows = 1
    while n_windows <= backend.window_batch:
        batches.append((n_windows, n_frames))
        n_windows *= 2
    for n_windows, n_frames in batches:
        n_rows = n_windows * token_count(n_frames)
        yield draft_program(config, backend, N_SLOTS, ("encoder", n_windows, n_frames, n_rows), row_stages(config))
