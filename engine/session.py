"""A model as people use it: audio and a question in, text out, piece by piece.

`load` gives a `Model`; `Model.stream` gives the text as it is made, `Model.generate` the whole result.
Knows no terminal and no network. A model works on one answer at a time; whose turn it is, `turns.py` says.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..kernels.errors import AuricleError
from .answer import GenerateOptions, Result, check_whole
from .audio import SAMPLE_RATE, load_audio
from .backends import find_backend
from .finite import blame
from .gguf import GGUFFile, open_gguf
from .kv_cache import KV_FORMATS, find_kv_format
from .lora import LoraSpec, attach_loras
from .mel import log_mel
from .models.config import ModelError
from .models.moss_audio import MossAudioConfig, assumed_keys, clip_tokens, read_moss_audio
from .prompts import TASKS, Prompt, SpecialIds, build_prompt
from .sampling import NonFiniteError, OptionError
from .stream import Heard, Stream
from .tokenizer import Tokenizer
from .turns import Turn, TurnError, Turns, check_process

if TYPE_CHECKING:
    from ..kernels.formats import Format
    from .backends.backend import Backend
    from .memory import Fit, MemoryPlan
    from .runtime import Runtime

log = logging.getLogger("auricle.session")

MAX_CLIP_SECONDS = 24 * 3600
SPECIAL_KEYS = ("audio_token_id", "audio_start_id", "audio_end_id")  # under `moss_audio.`
AudioSource = str | os.PathLike | bytes | BinaryIO | np.ndarray


class ContextError(AuricleError):
    """A request that does not fit into the context, or a context that does not fit into memory."""


class Model:
    """An open model file on a backend. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        file: GGUFFile,
        backend: Backend,
        *,
        n_ctx: int | None,
        kv_type: str | None,
        poison: bool,
        memory: int | None = None,
    ) -> None:
        """`memory`: bytes that each request must do with."""
        self.file, self.backend, self._plain_backend = file, backend, backend
        self.config: MossAudioConfig = read_moss_audio(file)
        self.tokenizer = Tokenizer.from_metadata(file.metadata)
        if self.tokenizer.n_tokens != self.config.decoder.vocab_size:
            raise ModelError(
                f"{file.path}: {self.tokenizer.n_tokens} tokens but {self.config.decoder.vocab_size} embedding rows; "
                "convert the checkpoint again"
            )
        self.special = SpecialIds(*(self._token_id(f"moss_audio.{key}") for key in SPECIAL_KEYS))
        self.stop_ids = self._find_stop_ids()
        wanted = backend.kv_type if kv_type is None else kv_type
        self.kv_format = find_kv_format(wanted, self.config.decoder.head_dim)
        self._kv_formats, self._encoder, self._memory = self._possible_formats(kv_type), "kept", memory
        self.n_ctx = check_context(n_ctx, self.config.decoder.max_position_embeddings)
        self.assumed = assumed_keys(file.metadata)
        key = "moss_audio.time_markers"
        self.time_markers: bool = self.assumed[key] if key in self.assumed else file.require(key, bool)
        if self.assumed:
            tell_assumed(str(file.path), ", ".join(f"{key} = {value}" for key, value in self.assumed.items()))
        self._poison = poison
        self._runtime: Runtime | None = None
        self.stepped = False  # whether this runtime has decoded
        self._turns = Turns()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back; the model cannot be used afterwards. Waits for a piece of work in another thread,
        whose answer then ends with TurnError."""
        self._turns.close()
        self._drop_runtime()
        self.file.close()

    def _drop_runtime(self) -> None:
        self._runtime, self.stepped = None, False
        if self.backend.device.separate:
            gc.collect()  # an answer that was not read to its end holds on to what it was made with
            self.backend.device.release()

    @property
    def runtime(self) -> Runtime:
        """The bound model; made at the first use."""
        if self._runtime is None:
            from .runtime import Runtime

            sizes = {"n_ctx": self.n_ctx, "kv_format": self.kv_format, "encoder": self._encoder}
            try:
                self._runtime = Runtime(self.file, self.config, self.backend, **sizes, poison=self._poison)
            except RuntimeError as error:  # PyTorch's way to say that memory cannot be reserved
                raise ContextError(
                    f"a cache of {self.n_ctx} tokens does not fit into memory; ask for a smaller context"
                ) from error
        return self._runtime

    def stream(
        self,
        prompt: str = TASKS["transcribe"],
        audio: AudioSource | Sequence[AudioSource] | None = None,
        *,
        sample_rate: int | None = None,
        **options: Any,
    ) -> Stream:
        """Starts an answer; iterate over the result for its text, then read its `result`.

        `audio`: a path, bytes, a binary file or an array (with its `sample_rate`), or a list of these.
        `options`: the fields of `GenerateOptions`. Raises AudioError, OptionError or ContextError before any work.

        The model works on the answer from its first piece to its last. What another thread asks waits for that; what
        the same thread asks ends it, see `Turns`.
        """
        known = {f.name for f in fields(GenerateOptions)}
        if unknown := sorted(options.keys() - known):
            raise OptionError(f"no option {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        chosen = GenerateOptions(**options)
        if self._turns.closed:
            raise TurnError("the model is closed; load it again")
        check_process()
        start = time.perf_counter()
        heard = self.listen(audio, sample_rate)
        ids = self.build_prompt(prompt, heard, chosen.time_markers, chosen.parse_special)
        if len(ids.ids) >= self.n_ctx:
            raise ContextError(
                f"the prompt is {len(ids.ids)} tokens and the context holds {self.n_ctx}; "
                f"use shorter audio or a larger context (at most {self.config.decoder.max_position_embeddings} here)"
            )
        n_new, fit = min(chosen.limit(heard.seconds), self.n_ctx - len(ids.ids)), None
        if self._memory is not None:
            fit = self._fit(tuple(mel.shape[1] for mel in heard.mels), ids.ids, n_new)
        return Stream(self, heard, ids, chosen, n_new, fit, time.perf_counter() - start)

    def generate(
        self,
        prompt: str = TASKS["transcribe"],
        audio: AudioSource | Sequence[AudioSource] | None = None,
        *,
        sample_rate: int | None = None,
        **options: Any,
    ) -> Result:
        """The whole answer; arguments as for `stream`."""
        stream = self.stream(prompt, audio, sample_rate=sample_rate, **options)
        for _ in stream:
            pass
        return stream.result

    def listen(self, audio: AudioSource | Sequence[AudioSource] | None, sample_rate: int | None = None) -> Heard:
        """Reads clips and takes their spectrograms."""
        clips = [] if audio is None else list(audio) if isinstance(audio, (list, tuple)) else [audio]
        tables = [self._table("audio.mel_filters"), self._table("audio.mel_window")]
        # a minute more than the context can hold: what nearly fits is counted in tokens
        longest, mels, n_samples = 60 + 60 * self.n_ctx / clip_tokens(self.config.encoder, 6000), [], 0
        for clip in clips:
            samples = load_audio(clip, sample_rate, longest - n_samples / SAMPLE_RATE)
            mels.append(log_mel(samples, *tables))
            n_samples += len(samples)
        return Heard(mels, n_samples / SAMPLE_RATE)

    def _table(self, name: str) -> np.ndarray | None:
        """A float32 table of the front end, where the file brings it along."""
        info = self.file.tensors.get(name)
        return None if info is None else self.file.data(name).view("<f4").reshape(info.shape)

    def build_prompt(
        self, text: str, heard: Heard, time_markers: bool | None = None, parse_special: bool = False
    ) -> Prompt:
        """The prompt around a question; see `prompts.build_prompt`."""
        markers = self.time_markers if time_markers is None else time_markers
        counts = [clip_tokens(self.config.encoder, mel.shape[1]) for mel in heard.mels]
        return build_prompt(self.tokenizer, self.special, text, counts, markers, parse_special=parse_special)

    def _token_id(self, key: str) -> int:
        """The token that the file names under `key`, which must be one."""
        value = self.file.require(key, int)
        if not 0 <= value < self.tokenizer.n_tokens:
            raise ModelError(f"{self.file.path}: {key} is {value}; the tokens are 0 to {self.tokenizer.n_tokens - 1}")
        return value

    def _find_stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        named = (self.tokenizer.id_of(token) for token in ("<|im_end|>", "<|endoftext|>"))
        keys = ("moss_audio.eos_token_id", "tokenizer.ggml.eos_token_id")
        keyed = (self._token_id(key) for key in keys if key in self.file.metadata)
        return frozenset(i for i in (*named, *keyed) if i is not None)

    def plan(
        self, clip_seconds: Sequence[float], prompt: str = TASKS["transcribe"], max_new_tokens: int | None = None
    ) -> MemoryPlan:
        """What a request would take in memory; nothing runs. Raises ContextError when it would not fit the context."""
        options = GenerateOptions(max_new_tokens=max_new_tokens)
        for seconds in clip_seconds:
            if not 0.01 <= seconds <= MAX_CLIP_SECONDS:
                raise OptionError(f"a clip of {seconds:g} s; it must be from 0.01 to {MAX_CLIP_SECONDS} s")
        frames = tuple(int(s * SAMPLE_RATE) // 160 for s in clip_seconds)
        silent = Heard([np.empty((0, n), np.float32) for n in frames], sum(clip_seconds))
        ids = self.build_prompt(prompt, silent).ids
        n_prompt = len(ids)
        if n_prompt >= self.n_ctx:
            raise ContextError(
                f"the prompt would be {n_prompt} tokens and the context holds {self.n_ctx}; use shorter audio"
            )
        return self._fit(frames, ids, min(options.limit(silent.seconds), self.n_ctx - n_prompt)).plan

    def _possible_formats(self, kv_type: str | None) -> list[Format]:
        """Of the cache: the one that was asked for, or the backend's and a smaller one to fall back on."""
        small = KV_FORMATS["q8_0"]
        free = kv_type is None and self.config.decoder.head_dim % small.length == 0
        return [self.kv_format, small] if free and self.kv_format is not small else [self.kv_format]

    def _fit(self, clip_frames: tuple[int, ...], ids: np.ndarray, n_new: int) -> Fit:
        """How a request is run. Raises ContextError when there is a budget and no way to keep it."""
        from .memory import Request, find_fit, process_bytes

        request = Request(clip_frames, len(ids), len(np.unique(ids)), n_new)
        plain, budget = self._plain_backend, sys.maxsize
        if self._memory is not None:
            beside = plain.device.beside
            with plain.alone():
                taken = process_bytes(self.file, plain, self.kv_format) if beside is None else beside
            budget = self._memory - taken
        fit, first, least = find_fit(self.file, self.config, plain, self._kv_formats, request, budget)
        if fit is None:
            need, small = (format_gib(f.plan.total + taken) for f in (first, least))
            raise ContextError(
                f"--memory {format_gib(self._memory)} does not hold this request, which takes {need}, "
                f"{format_gib(sum(first.plan.weights.values()))} of it weights; the least it can take is {small}"
            )
        return fit

    @contextmanager
    def at_work(self, turn: Turn) -> Iterator[None]:
        """A piece of work for an answer, in its turn. Raises TurnError; GGUFError when the file was cut short
        meanwhile; ModelError in place of NonFiniteError, with the weight at fault."""
        with self._turns.work(turn), self.backend.alone():
            self.file.check_size()
            with self.blaming():
                yield
            self.file.check_size()  # the last page that is left may have been read as zeros

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Raises ModelError in place of NonFiniteError, with the weight at fault."""
        try:
            yield
        except NonFiniteError as error:
            raise blame(self.file, error) from error

    def end(self, turn: Turn) -> None:
        """An answer needs the model no more."""
        self._turns.end(turn)

    def adopt(self, fit: Fit) -> None:
        """Runs from now on as `fit` says; what was set up otherwise is thrown away."""
        chosen = (fit.backend, fit.kv_format, fit.encoder)
        if chosen != (self.backend, self.kv_format, self._encoder):
            self._drop_runtime()
            self.backend, self.kv_format, self._encoder = chosen
            log.info("to stay within %s: %s", format_gib(self._memory), ", ".join(fit.changes) or "as usual")


@cache
def tell_assumed(path: str, assumed: str) -> None:
    """Once for a file."""
    log.warning("%s does not say everything about its model; assumed is %s", path, assumed)


def format_gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def check_context(n_ctx: int | None, n_max: int) -> int:
    """The context in tokens: what was asked for, or all the model has positions for."""
    if n_ctx is None:
        return n_max
    check_whole("--ctx", n_ctx)
    if n_ctx > n_max:
        raise OptionError(f"--ctx is {n_ctx}; this model takes 1 to {n_max}")
    return n_ctx


def load(
    path: str | os.PathLike,
    *,
    backend: str = "auto",
    threads: int | None = None,
    n_ctx: int | None = None,
    kv_type: str | None = None,
    precision: str | None = None,
    lora: Sequence[LoraSpec] = (),
    memory: int | None = None,
    poison: bool = False,
) -> Model:
    """Opens a GGUF file and checks that it can be run; weights are read when they are needed.

    `backend`: "cuda", "cpu", "reference", or "auto": the GPU if there is one that can be used, else the CPU. `threads`:
    None uses all cores. `n_ctx`: context in tokens, None for the model's maximum. `kv_type`: "f32", "f16" or "q8_0",
    None for the backend's choice. `precision`: "auto", "exact" or "bf16", see `backends/cpu.py` and `cuda.py`. `lora`:
    adapters, each a path or "path:scale". `memory`: bytes that a request must do with, see `memory.find_fit`; a request
    that cannot raises ContextError. `poison`: for tests, see `Program`.
    Raises GGUFError, ModelError (LoraError for an adapter), TokenizerError, BackendError or OptionError, each one line.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"the model is of type {type(path).__name__}; it must be the path of a GGUF file")
    if memory is not None:
        check_whole("memory", memory)
    file = open_gguf(path)
    try:
        if threads is not None:
            set_threads(threads)
        chosen = find_backend(backend, precision)
        if lora:
            file, chosen = attach_loras(file, chosen, [lora] if isinstance(lora, (str, os.PathLike)) else lora)
        return Model(file, chosen, n_ctx=n_ctx, kv_type=kv_type, memory=memory, poison=poison)
    except AuricleError:
        file.close()
        raise


def set_threads(n: int) -> None:
    """How many cores the arithmetic uses, for the whole process."""
    check_whole("--threads", n)
    most = 4 * (os.cpu_count() or 1)
    if n > most:
        raise OptionError(f"--threads is {n}; at most {most} make sense on this machine")
    import torch

    torch.set_num_threads(n)
