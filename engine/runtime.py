"""The model at work: mel windows to audio rows, prompt to cache, token to logits.

Decides how work is cut into batches and chunks and keeps the programs for them. Knows no samples, no text
and no sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..kernels.formats import F16, Format
from .executor import Draft, Program, draft_graph
from .graph import label_values
from .models.moss_audio import MossAudioConfig, clip_windows, decoder_graph, encoder_graph, part_of, token_count
from .models.qwen3 import Head
from .prompts import Prompt
from .rewrite import observe

if TYPE_CHECKING:
    from .backends.backend import Backend
    from .gguf import GGUFFile
    from .sampling import Kind, Sampler

MAX_PROGRAMS = 16  # of plain runs; the one not used for longest goes
ONE_TOKEN = ("decoder", 1, "all", False)
Arrays = Mapping[str, np.ndarray]
EncoderPlace = Literal["kept", "dropped", "cpu"]


def phase_of(tensor: str) -> str:
    """What a tensor is for: hearing ("encoder") or writing ("decoder")."""
    return phase_of_part(part_of(tensor))


def phase_of_part(part: str) -> str:
    return "encoder" if part in ("encoder", "adapter", "deepstack") else "decoder"


def row_stages(c: MossAudioConfig) -> list[str]:
    """The encoder's results that the decoder takes, in the order of `audio.rows.K`."""
    return ["adapter", *(f"deepstack.{k}" for k in range(c.n_inject))]


@dataclass(frozen=True)
class Batch:
    """Some windows of a request: `mel` [n, 1, n_mels, n_frames] zero-padded, the valid tokens of each, and where they
    lie among all windows and all audio tokens of the request."""

    mel: np.ndarray
    lengths: np.ndarray
    windows: slice
    tokens: slice

    @property
    def valid(self) -> np.ndarray:
        """Flat numbers of the valid tokens, windows one after another."""
        n_tokens = token_count(self.mel.shape[-1])
        starts = np.arange(len(self.lengths), dtype=np.int32) * n_tokens
        return np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, self.lengths, strict=True)])

    def take(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """This batch's part of a stage of the request, in `shape`. With two dimensions `value` has a row for each valid
        token, and padding becomes 0; with more it has an element for each window."""
        if value.ndim > 2:
            return value[self.windows]
        if len(shape) == 2:
            return value[self.tokens]
        padded = np.zeros((shape[0] * shape[1], value.shape[1]), np.float32)
        padded[self.valid] = value[self.tokens]
        return padded.reshape(shape)


def cut_windows(c: MossAudioConfig, mels: list[np.ndarray], n_batch: int) -> Iterator[Batch]:
    """Windows of all clips, `n_batch` at a time, each padded to the longest window of the request."""
    windows = [
        mel[:, start : start + c.encoder.window_frames]
        for mel in mels
        for start in range(0, mel.shape[1], c.encoder.window_frames)
    ]
    n_frames = max(w.shape[1] for w in windows)
    first_token = 0
    for first in range(0, len(windows), n_batch):
        group = windows[first : first + n_batch]
        mel = np.zeros((len(group), 1, c.encoder.num_mel_bins, n_frames), np.float32)
        for i, window in enumerate(group):
            mel[i, 0, :, : window.shape[1]] = window
        lengths = np.array([token_count(w.shape[1]) for w in group], np.int32)
        last_token = first_token + int(lengths.sum())
        yield Batch(mel, lengths, slice(first, first + len(group)), slice(first_token, last_token))
        first_token = last_token


class Runtime:
    """A model file bound to a backend, with one KV cache. One request at a time."""

    def __init__(
        self,
        file: GGUFFile,
        config: MossAudioConfig,
        backend: Backend,
        *,
        n_ctx: int,
        kv_format: Format,
        poison: bool = False,
        observers: dict[str, torch.Tensor] | None = None,
        encoder: EncoderPlace = "kept",
    ) -> None:
        """`observers`: takes up the sums that `rewrite.observe` makes, by state, over all runs without `feed`; None
        observes nothing. `encoder`: whether its weights stay beside the decoder's, or each make room for the other's,
        or the CPU hears instead."""
        self._observers, self._kv_format, self._encoder = observers, kv_format, encoder
        self.config, self.backend, self.n_ctx, self.poison = config, backend, n_ctx, poison
        self._device = backend.device
        self._weights = self._device.weights(file, phase_of)
        self._listener: Runtime | None = None  # who hears, if not this one
        if encoder == "cpu":
            self._listener = Runtime(file, config, listening_backend(backend), n_ctx=1, kv_format=F16)
        self._programs: dict[tuple, Any] = {}
        self._arena: torch.Tensor | None = None
        self._phase: str | None = None
        self.caches: dict[str, Any] = {}
        self.n_slots = 0
        self.find_room(0)

    def find_room(self, n_tokens: int, keep: bool = False) -> None:
        """Sees to it that the cache has a position for each of `n_tokens`; `keep`: and what it holds."""
        n_slots = self._device.n_slots(n_tokens, self.n_ctx)
        if n_slots <= self.n_slots and self.caches:
            return
        d = self.config.decoder
        names = [f"kv.{n}.{part}" for n in range(d.num_layers) for part in "kv"]
        old = self.caches if keep else {}
        self._programs.clear()  # they are bound to the cache that was
        self.caches = {}
        self._device.release()
        self.caches = self._device.caches(names, (n_slots, d.num_kv_heads, d.head_dim), self._kv_format)
        self.n_slots = n_slots
        if old:
            self._device.copy_caches(old.values(), self.caches.values())

    def _enter(self, phase: str) -> None:
        """Makes room for what a phase needs, where the other phase cannot stay beside it."""
        if self._encoder == "dropped" and phase != self._phase:
            self._programs.clear()
            self._arena = None
            self._weights.drop("decoder" if phase == "encoder" else "encoder")
            if phase == "encoder":
                self.caches, self.n_slots = {}, 0
            self._device.release()
        self._phase = phase

    # Encoding.

    def encode(self, mels: list[np.ndarray]) -> list[torch.Tensor]:
        """Log-mel spectrograms [n_mels, n_frames], one a clip -> the rows of `row_stages`, each [n_audio, hidden]."""
        self._enter("encoder")
        names, d_model = row_stages(self.config), self.config.decoder.hidden_size
        windows = [n for mel in mels for n in clip_windows(self.config.encoder, mel.shape[1])]
        n_audio = sum(token_count(n) for n in windows)
        memory = self._device.empty(4 * len(names) * n_audio * d_model)
        rows = list(memory.view(torch.float32).view(len(names), n_audio, d_model))
        listener = self._listener or self
        for batch in cut_windows(self.config, mels, listener.backend.window_batch):
            results = listener._run_batch(batch, names)
            for name, target in zip(names, rows, strict=True):
                target[batch.tokens] = results[name]
        return rows

    def trace_encoder(self, mels: list[np.ndarray], capture: Collection[str], feed: Arrays) -> dict[str, np.ndarray]:
        """Any stages of the encoder, whole. A stage in `feed` is taken as given: in the shape it has when captured, or
        [n_audio, d] with a row for each valid token."""
        parts = [part for _, part in self.trace_windows(mels, capture, feed)]
        return {name: np.concatenate([part[name] for part in parts]) for name in capture}

    def trace_windows(
        self, mels: list[np.ndarray], capture: Collection[str], feed: Arrays
    ) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """As `trace_encoder`, batch by batch."""
        for batch in cut_windows(self.config, mels, self.backend.window_batch):
            results = self._run_batch(batch, capture, feed)
            yield batch, {name: self._device.fetch(value).copy() for name, value in results.items()}

    def _run_batch(self, batch: Batch, capture: Collection[str], feed: Arrays | None = None) -> dict[str, torch.Tensor]:
        n_windows, _, _, n_frames = batch.mel.shape
        n_rows = int(batch.lengths.sum())
        program = self._program(("encoder", n_windows, n_frames, n_rows), capture, feed)
        inputs = {"mel": batch.mel, "lengths": batch.lengths, "valid": batch.valid}
        return program.run(
            {
                name: batch.take(feed[name], tuple(tensor.shape)) if feed and name in feed else inputs[name]
                for name, tensor in program.inputs.items()
            }
        )

    # Decoding.

    def prefill(self, prompt: Prompt, rows: list[torch.Tensor], n_new: int = 0, kind: Kind | None = None) -> np.ndarray:
        """Fills the cache with a prompt from position 0 on; gives the logits after its last token [n_vocab], which the
        next run overwrites. `n_new`: tokens that will come after it, so that the cache need not grow; `kind`: how they
        will be chosen, so that `steps` begins at once."""
        n = len(prompt.ids)
        self._enter("decoder")
        self.find_room(n + n_new)
        step = self.backend.prefill_chunk
        for start in range(0, n, step):
            stop = min(start + step, n)
            head: Head = "last" if stop == n else "none"
            results = self._run_chunk(prompt, rows, slice(start, stop), head, ["logits"] if head == "last" else [])
        if kind is not None and n_new > 1 and self.backend.bind_steps is not None:
            self._stepper(kind)  # while an accelerator is at work
        return self._device.fetch(results["logits"][0])

    def decode(self, token: int, position: int) -> np.ndarray:
        """Appends one token to the cache at `position`; gives the logits after it [n_vocab], as `prefill` does."""
        self.find_room(position + 1, keep=True)
        program = self._program(ONE_TOKEN, ["logits"], None)
        inputs = {"input_ids": np.array([token], np.int32), "positions": np.array([position], np.int32)}
        return self._device.fetch(program.run(inputs)["logits"][0])

    def steps(self, token: int, position: int, n_steps: int, sampler: Sampler) -> Iterator[int]:
        """Appends `token` at `position`, and then each token that `sampler` draws, which it gives; `n_steps` of them.
        Where the backend looks ahead, the cache may already hold one more."""
        if self.backend.bind_steps is None:
            history = [token]
            for i in range(n_steps):
                history.append(sampler.sample(self.decode(history[-1], position + i), history))
                yield history[-1]
            return
        if n_steps == 0:
            return
        self.find_room(position + n_steps, keep=True)
        yield from self._stepper(sampler.options.kind).run(token, position, n_steps, sampler)

    def _stepper(self, kind: Kind) -> Any:
        """What makes steps with tokens chosen in one way, where the backend does that."""
        key = ("steps", *kind)
        if key not in self._programs:
            draft = self._fit_arena(draft_program(self.config, self.backend, self.n_slots, *step_program(kind)))
            sizes = (kind, self.config.decoder.vocab_size, self.n_slots)
            with self._device.binding():
                self._keep(key, self.backend.bind_steps(draft, self._weights, self.caches, self._arena, *sizes))
        self._programs[key] = self._programs.pop(key)  # the last used goes last
        return self._programs[key]

    def trace_decoder(
        self, prompt: Prompt, rows: list[torch.Tensor], capture: Collection[str], feed: Arrays
    ) -> dict[str, np.ndarray]:
        """Any stages of the decoder for every token of the prompt (logits too); the cache is filled as by `prefill`,
        unless something is fed."""
        parts = []
        self._enter("decoder")
        self.find_room(len(prompt.ids))
        for start in range(0, len(prompt.ids), self.backend.prefill_chunk):
            chunk = slice(start, min(start + self.backend.prefill_chunk, len(prompt.ids)))
            results = self._run_chunk(prompt, rows, chunk, "all", capture, feed)
            n = chunk.stop - chunk.start
            parts.append({name: self._device.fetch(value[:n]).copy() for name, value in results.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in capture}

    def _run_chunk(
        self,
        prompt: Prompt,
        rows: list[torch.Tensor],
        chunk: slice,
        head: Head,
        capture: Collection[str],
        feed: Arrays | None = None,
    ) -> dict[str, torch.Tensor]:
        """Of stages with a row for each token, the rows after those of the chunk are padding."""
        n_tokens = chunk.stop - chunk.start
        # Observers take up every row there is.
        n_rows = n_tokens if self._observers is not None else self.backend.padded(n_tokens)
        index = pad_rows(prompt.audio_rows[chunk], n_rows, -1)
        with_audio = bool(rows) and (feed is not None or bool((index >= 0).any()))
        program = self._program(("decoder", n_rows, head, with_audio), capture, feed)
        inputs = {
            "input_ids": pad_rows(prompt.ids[chunk], n_rows, prompt.ids[chunk.start]),
            "positions": pad_rows(np.arange(chunk.start, chunk.stop, dtype=np.int32), n_rows, -1),
            "last_row": np.array([n_tokens - 1], np.int32),
            **(chunk_rows(index, rows) if with_audio else {}),
        }
        return program.run(
            {
                name: pad_rows(feed[name][chunk], n_rows, 0).reshape(tensor.shape)
                if feed and name in feed
                else inputs[name]
                for name, tensor in program.inputs.items()
            }
        )

    def _program(self, key: tuple, capture: Collection[str], feed: Arrays | None) -> Program:
        """The program of a key: ("encoder", windows, frames, rows) or ("decoder", tokens, head, with audio).

        Without `feed` it is a plain run: its program is kept, and all of these share one arena. A traced run (`feed`
        may be empty) has a program and an arena of its own.
        """
        full_key = (*key, *capture)
        if feed is None and full_key in self._programs:
            self._programs[full_key] = self._programs.pop(full_key)  # the last used goes last
            return self._programs[full_key]
        observed = self._observers is not None
        draft = draft_program(self.config, self.backend, self.n_slots, key, capture, feed or (), observed=observed)
        states = self.caches | self._sums_of(draft)
        if feed is None:
            draft = self._fit_arena(draft)
        with self._device.binding():
            program = Program(draft, self._weights, states, self._arena if feed is None else None, self.poison)
        return self._keep(full_key, program) if feed is None else program

    def _fit_arena(self, draft: Draft) -> Draft:
        """Sees to it that the arena that plain runs share is large enough."""
        if self._arena is None or self._arena.numel() < draft.plan.arena_bytes:
            self._programs.clear()
            self._arena = None
            self._device.release()
            self._arena = self._device.empty(draft.plan.arena_bytes)
        return draft

    def _keep(self, key: tuple, program: Any) -> Any:
        if len(self._programs) >= MAX_PROGRAMS:
            self._programs.pop(next(iter(self._programs)))
        self._programs[key] = program
        return program

    def _sums_of(self, draft: Draft) -> dict[str, torch.Tensor]:
        """The observers' states in a program; those it is the first to need begin at zero."""
        leaves = [leaf for leaf in draft.graph.leaves_of("state") if leaf.name not in self.caches]
        return {v.name: self._observers.setdefault(v.name, torch.zeros(v.shape, dtype=torch.float64)) for v in leaves}


def listening_backend(backend: Backend) -> Backend:
    """The CPU's, with the rules that were put before those of `backend` for this model: its adapters."""
    from .backends import find_backend

    chosen = find_backend("cpu")
    adapters = tuple(rule for rule in backend.rules if isinstance(rule, partial))
    return replace(chosen, rules=(*adapters, *chosen.rules))


def step_program(kind: Kind) -> tuple[tuple, list[str]]:
    """Key and result of the program for a step whose token is chosen in that way."""
    head, result = ("token", "token") if kind.likeliest else ("all", "logits")
    return ("decoder", 1, head, False), [result]


def draft_program(
    config: MossAudioConfig,
    backend: Backend,
    n_ctx: int,
    key: tuple,
    capture: Collection[str],
    feed: Collection[str] = (),
    *,
    observed: bool = False,
) -> Draft:
    """Drafts a program by its key, without weights or caches. `capture` and `feed` name stages, or any value as
    `label_values` does. `observed`: see `rewrite.observe`."""
    kind, *sizes = key
    if kind == "encoder":
        graph = encoder_graph(config, *sizes)
    else:
        n_tokens, head, with_audio = sizes
        graph = decoder_graph(config, n_tokens, n_ctx, head=head, with_audio=with_audio)
    if not graph.stages.keys() >= {*capture, *feed}:
        label_values(graph)
    return draft_graph(observe(graph) if observed else graph, backend, capture, feed)


def pad_rows(rows: np.ndarray, n: int, value: float) -> np.ndarray:
    """n rows: those there are, and rows of `value`."""
    return np.pad(rows, [(0, n - len(rows)), *[(0, 0)] * (rows.ndim - 1)], constant_values=value)


def chunk_rows(index: np.ndarray, rows: list[torch.Tensor]) -> dict[str, np.ndarray | torch.Tensor]:
    """The audio inputs of a chunk: its own rows to the front, numbered from 0; the rest is never read."""
    used = index[index >= 0]
    first, n = (int(used[0]), len(used)) if len(used) else (0, 0)
    inputs: dict[str, np.ndarray | torch.Tensor] = {
        "audio.index": np.where(index >= 0, index - first, -1).astype(np.int32)
    }
    for k, values in enumerate(rows):
        inputs[f"audio.rows.{k}"] = values[first : first + n]
    return inputs
