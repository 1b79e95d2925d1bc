"""What a request takes in memory, by part, before anything runs.

The parts are those of the plan: weights touched, the KV cache filled, the arena of the largest program, what
libraries allocate besides, and the audio itself. Knows sizes only.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..kernels.formats import Format
from .kv_cache import cache_bytes
from .models.moss_audio import PART_NAMES, MossAudioConfig, clip_tokens, clip_windows, part_of, token_count
from .runtime import draft_program, row_stages

if TYPE_CHECKING:
    from .backends.backend import Backend
    from .executor import Draft
    from .gguf import GGUFFile

FAULT_BYTES = 64 << 10  # what the kernel maps around a row that is read by number


@dataclass(frozen=True)
class Request:
    """`clip_frames`: mel frames of each clip. `n_prompt`: prompt tokens, `n_distinct` of them different.
    `n_new`: tokens generated at most."""

    clip_frames: tuple[int, ...]
    n_prompt: int
    n_distinct: int
    n_new: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part. `weights` holds what is read of each part of the file."""

    weights: dict[str, int]
    kv_cache: int
    arena: int
    libraries: int
    audio: int

    @property
    def total(self) -> int:
        """All of it, the interpreter and the code of its libraries excepted."""
        return sum(self.weights.values()) + self.kv_cache + self.arena + self.libraries + self.audio


def plan_request(
    file: GGUFFile, config: MossAudioConfig, backend: Backend, kv_format: Format, request: Request
) -> MemoryPlan:
    """The memory of one request, from sizes alone."""
    d = config.decoder
    n_ctx = min(request.n_prompt + request.n_new, d.max_position_embeddings)
    drafts = request_drafts(config, backend, n_ctx, request)
    # What libraries free after encoding, the C allocator may keep while the decoder's libraries ask for more.
    libraries = [max(d.plan.transient_bytes for d in group) for group in drafts.values()]
    return MemoryPlan(
        weights=read_weights(file, config, request.n_distinct + request.n_new, with_audio=bool(request.clip_frames)),
        kv_cache=cache_bytes(d.num_layers, n_ctx, d.num_kv_heads, d.head_dim, kv_format),
        arena=max(d.plan.arena_bytes for group in drafts.values() for d in group),
        libraries=sum(libraries),
        audio=audio_bytes(config, request),
    )


def request_drafts(config: MossAudioConfig, backend: Backend, n_ctx: int, request: Request) -> dict[str, list[Draft]]:
    """The largest programs of a request, by phase: a batch of windows; a chunk of the prompt, and one token."""
    chunk = min(backend.prefill_chunk, request.n_prompt)
    with_audio = bool(request.clip_frames)
    keys = [("decoder", chunk, "last", with_audio), ("decoder", 1, "all", False)]
    drafts = {"decoder": [draft_program(config, backend, n_ctx, key, ["logits"]) for key in keys]}
    windows = [n for frames in request.clip_frames for n in clip_windows(config.encoder, frames)]
    if windows:
        n_windows, n_frames = min(backend.window_batch, len(windows)), max(windows)
        key = ("encoder", n_windows, n_frames, n_windows * token_count(n_frames))
        drafts["encoder"] = [draft_program(config, backend, n_ctx, key, row_stages(config))]
    return drafts


def read_weights(file: GGUFFile, config: MossAudioConfig, n_rows: int, *, with_audio: bool) -> dict[str, int]:
    """Bytes of the file that a request reads, by part. Of the embedding it is `n_rows` rows, unless it is the head."""
    totals = dict.fromkeys(PART_NAMES, 0)
    for name, info in file.tensors.items():
        totals[part_of(name)] += info.nbytes
    if not with_audio:
        totals |= dict.fromkeys(("encoder", "adapter", "deepstack"), 0)
    if not config.tied:
        totals["embedding"] = min(totals["embedding"], n_rows * FAULT_BYTES)
    return totals


def audio_bytes(config: MossAudioConfig, request: Request) -> int:
    """The spectrogram and the rows the decoder takes. The samples are gone before any weight is read."""
    n_audio = sum(clip_tokens(config.encoder, frames) for frames in request.clip_frames)
    spectrogram = 4 * config.encoder.num_mel_bins * sum(request.clip_frames)
    return spectrogram + 4 * config.n_rows * n_audio * config.decoder.hidden_size


def process_bytes(file: GGUFFile, backend: Backend, kv_format: Format) -> int:
    """The most memory this process has had so far, after the arithmetic libraries have loaded what they load late, and
    the compiled kernels that the file needs. Kernels that were never compiled are compiled now: that takes memory, too,
    as it would in the first request."""
    import torch
    import torch.nn.functional as F

    x = torch.ones(1, 16, 64, 64)
    torch.softmax(F.conv2d(x, torch.ones(16, 16, 3, 3), stride=2, padding=1), -1)
    torch.mm(torch.ones(256, 512), torch.ones(512, 512))
    if backend.rounds:
        from .backends.cpu_warm import warm

        formats = sorted({t.format for t in file.tensors.values() if len(t.shape) == 2}, key=lambda f: f.name)
        for _ in warm(formats, kv_format):
            pass
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory this process has had resident so far.

    Linux tells it by process; elsewhere `getrusage` does, whose number a child process takes over from its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
