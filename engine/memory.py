"""What a request takes in memory, by part, before anything runs.

The parts are those of the plan: weights touched, the KV cache filled, the arena of the largest program, what
libraries allocate besides, and the audio itself. On an accelerator it is what is allocated there. Knows sizes only.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ..kernels.formats import Format
from .models.moss_audio import PART_NAMES, MossAudioConfig, clip_tokens, clip_windows, part_of, token_count
from .runtime import EncoderPlace, draft_program, phase_of, phase_of_part, row_stages

if TYPE_CHECKING:
    from .backends.backend import Backend
    from .executor import Draft
    from .gguf import GGUFFile

FAULT_BYTES = 64 << 10  # what the kernel maps around a row that is read by number
KEPT_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: larger blocks go back to the system when they are freed


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
    """Bytes by part. `weights` holds what is read of each part of the file; `counters` what is kept from step to step;
    `apart` is what all parts together exceed the peak by, since some make room for others."""

    weights: dict[str, int]
    kv_cache: int
    arena: int
    libraries: int
    audio: int
    counters: int = 0
    apart: int = 0

    @property
    def total(self) -> int:
        """All of it, the interpreter and the code of its libraries excepted."""
        parts = (self.kv_cache, self.arena, self.libraries, self.audio, self.counters)
        return sum(self.weights.values()) + sum(parts) - self.apart


Drafts = dict[str, list[Draft]] if TYPE_CHECKING else dict


def plan_request(
    file: GGUFFile,
    config: MossAudioConfig,
    backend: Backend,
    kv_format: Format,
    request: Request,
    encoder: EncoderPlace = "kept",
    drafts: Drafts | None = None,
) -> MemoryPlan:
    """The memory of one request, from sizes alone. `drafts`: what `request_drafts` gave for it, if known."""
    if drafts is None:
        drafts = request_drafts(config, backend, request)
    if backend.device.separate:
        return plan_card(file, config, backend, kv_format, request, encoder, drafts)
    weights = read_weights(file, config, request.n_distinct + request.n_new, with_audio=bool(request.clip_frames))
    plan = MemoryPlan(
        weights=weights,
        kv_cache=filled_bytes(config, backend, kv_format, request),
        arena=max(d.plan.arena_bytes for group in drafts.values() for d in group),
        libraries=0,
        audio=audio_bytes(config, request),
    )
    return replace(plan, libraries=library_bytes(plan, drafts))


def library_bytes(plan: MemoryPlan, drafts: Drafts) -> int:
    """What libraries add to the peak of `plan`, in a process that hears first and then writes.

    While it hears, neither the decoder's weights nor the cache have been touched. Of what libraries free then, the C
    allocator gives large blocks back, and may keep the rest while the decoder's libraries ask for more.
    """
    of_phase = {phase: max(d.plan.transient_bytes for d in group) for phase, group in drafts.items()}
    hearing, writing = of_phase.get("encoder", 0), of_phase["decoder"]
    untouched = plan.kv_cache + sum(n for part, n in plan.weights.items() if phase_of_part(part) == "decoder")
    return max(hearing - untouched, writing + min(hearing, KEPT_BYTES))


def plan_card(
    file: GGUFFile,
    config: MossAudioConfig,
    backend: Backend,
    kv_format: Format,
    request: Request,
    encoder: EncoderPlace,
    drafts: Drafts,
) -> MemoryPlan:
    """What is allocated on an accelerator: whole groups of weights, and everything from the start to the end of a
    request, unless the encoder and the decoder make room for each other."""
    device, groups = backend.device, {"decoder", "encoder"} if request.clip_frames else {"decoder"}
    if encoder == "cpu":
        groups, drafts = {"decoder"}, {"decoder": drafts["decoder"]}
    weights = dict.fromkeys(PART_NAMES, 0)
    for name, info in file.tensors.items():
        if phase_of(name) in groups:
            weights[part_of(name)] += device.weight_bytes(info.format, info.shape)
    by_phase = {phase: sum(n for part, n in weights.items() if phase_of_part(part) == phase) for phase in groups}
    arenas = {phase: max(d.plan.arena_bytes for d in group) for phase, group in drafts.items()}
    libraries = max(d.plan.transient_bytes for group in drafts.values() for d in group)
    counters = backend.bind_steps.nbytes(config.decoder.vocab_size, n_slots(config, backend, request))
    rows = 4 * config.n_rows * n_audio(config, request) * config.decoder.hidden_size
    cache = filled_bytes(config, backend, kv_format, request)
    whole = MemoryPlan(weights, cache, max(arenas.values()), libraries, rows, counters)
    if encoder != "dropped" or len(groups) == 1:
        return whole
    hearing = by_phase["encoder"] + arenas["encoder"] + rows + libraries
    writing = by_phase["decoder"] + arenas["decoder"] + rows + libraries + cache + counters
    return replace(whole, apart=whole.total - max(hearing, writing))


def n_slots(config: MossAudioConfig, backend: Backend, request: Request) -> int:
    """Positions of the cache that a request fills, or has where they are had at once."""
    n_ctx = min(request.n_prompt + request.n_new, config.decoder.max_position_embeddings)
    return backend.device.n_slots(n_ctx, config.decoder.max_position_embeddings) if backend.device.separate else n_ctx


def filled_bytes(config: MossAudioConfig, backend: Backend, kv_format: Format, request: Request) -> int:
    """Keys and values of a request, of all layers."""
    d = config.decoder
    shape = (n_slots(config, backend, request), d.num_kv_heads, d.head_dim)
    return backend.device.cache_bytes(2 * d.num_layers, shape, kv_format)


def request_drafts(config: MossAudioConfig, backend: Backend, request: Request) -> dict[str, list[Draft]]:
    """The largest programs of a request, by phase: a batch of windows; a chunk of the prompt, and one token."""
    n_ctx = n_slots(config, backend, request)
    chunk = backend.padded(min(backend.prefill_chunk, request.n_prompt))
    with_audio = bool(request.clip_frames)
    keys = [("decoder", chunk, "last", with_audio), ("decoder", 1, "all", False)]
    drafts = {"decoder": [draft_program(config, backend, n_ctx, key, ["logits"]) for key in keys]}
    windows = [n for frames in request.clip_frames for n in clip_windows(config.encoder, frames)]
    if windows:
        n_windows, n_frames = min(backend.window_batch, len(windows)), max(windows)
        key = ("encoder", n_windows, n_frames, n_windows * token_count(n_frames))
        drafts["encoder"] = [draft_program(config, backend, n_ctx, key, row_stages(config))]
    return drafts


# Within a budget.

PLACES = {"dropped": "the encoder's weights make room for the decoder's", "cpu": "the encoder on the CPU"}
SMALLER = ((1, 1), (2, 2), (4, 4), (8, 8))  # what windows and prompt tokens at a time are divided by


@dataclass(frozen=True)
class Fit:
    """How a request is run, and what it takes so. `changes`: what was changed for it, in words."""

    backend: Backend
    kv_format: Format
    encoder: EncoderPlace
    plan: MemoryPlan
    changes: tuple[str, ...]


def find_fit(
    file: GGUFFile,
    config: MossAudioConfig,
    backend: Backend,
    kv_formats: Sequence[Format],
    request: Request,
    budget: int,
) -> tuple[Fit | None, Fit, Fit]:
    """The first way to run a request in `budget` bytes (None if there is none), the plain way, and the smallest.

    In this order: all as it is; fewer windows and prompt tokens at a time; the next of `kv_formats`; on an accelerator
    the encoder's weights dropped after hearing, and the encoder on the CPU.
    """
    places: tuple[EncoderPlace, ...] = ("kept",)
    if backend.device.separate and request.clip_frames:
        places = ("kept", "dropped", "cpu")
    sized = [scale_batches(backend, *by) for by in SMALLER]
    drafts: dict[int, Drafts] = {}
    smallest = plain = None
    for place, kv_format, (i, smaller) in product(places, kv_formats, enumerate(sized)):
        if i not in drafts:
            drafts[i] = request_drafts(config, smaller, request)
        plan = plan_request(file, config, smaller, kv_format, request, place, drafts[i])
        changes = describe_changes(backend, smaller, place, kv_format if kv_format is not kv_formats[0] else None)
        fit = Fit(smaller, kv_format, place, plan, changes)
        plain = plain or fit
        if smallest is None or plan.total < smallest.plan.total:
            smallest = fit
        if plan.total <= budget:
            return fit, plain, fit
    return None, plain, smallest


def scale_batches(backend: Backend, windows: int, tokens: int) -> Backend:
    return replace(
        backend,
        window_batch=max(1, backend.window_batch // windows),
        prefill_chunk=max(64, backend.prefill_chunk // tokens),
    )


def describe_changes(
    backend: Backend, smaller: Backend, place: EncoderPlace, kv_format: Format | None
) -> tuple[str, ...]:
    fewer = {"prompt tokens": "prefill_chunk", "windows": "window_batch"}
    changes = [
        f"{getattr(smaller, field)} {what} at a time"
        for what, field in fewer.items()
        if getattr(smaller, field) < getattr(backend, field)
    ]
    changes += [f"KV cache in {kv_format.name.lower()}"] if kv_format else []
    changes += [PLACES[place]] if place in PLACES else []
    return tuple(changes)


# Sizes.


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
    spectrogram = 4 * config.encoder.num_mel_bins * sum(request.clip_frames)
    return spectrogram + 4 * config.n_rows * n_audio(config, request) * config.decoder.hidden_size


def n_audio(config: MossAudioConfig, request: Request) -> int:
    return sum(clip_tokens(config.encoder, frames) for frames in request.clip_frames)


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

    Linux tells it by process, as a rule; elsewhere `getrusage` does, whose number a child takes over from its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
