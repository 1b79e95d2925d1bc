"""How fast a model file runs on this machine: the table behind `auricle bench`, and the clocks of `benchmarks/`.

Measures with a stopwatch over the engine's own interface. A round is one request: a clip is heard, the prompt read and
32 tokens written, whatever they are: a token that would end an answer does not end a round. Does not know what is a
good figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..engine import Model
from ..engine.answer import GenerateOptions
from ..engine.audio import SAMPLE_RATE
from ..engine.backends import find_backend
from ..engine.models.moss_audio import part_of
from ..engine.prompts import TASKS, Prompt
from ..engine.sampling import OptionError, Sampler
from ..engine.session import AudioSource, ContextError, Heard
from .machine import describe_machine

N_NEW = 32  # tokens of a round
CLIP_SECONDS = 11.0
FIRST_OP = "enc.blk.0"  # of a clip of FIRST_OP_FRAMES: the first result that every kind of kernel has a part in
FIRST_OP_FRAMES = 8
MAX_ROUNDS = 99
LONG_S = 120  # a first run longer than this is the only one
FILL_ROWS = 1024
READ_PER_TOKEN = ("decoder", "head")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Round:
    """Seconds of one request. `mel_s`: reading the clip, its spectrogram and the prompt; `first_token_s`: from the clip
    to the first token; `steps_s`: each of the others."""

    mel_s: float
    encoder_s: float
    prefill_s: float
    first_token_s: float
    steps_s: tuple[float, ...]
    clip_s: float
    prompt_tokens: int

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return len(self.steps_s) / sum(self.steps_s)

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of sound, all tokens included."""
        return (self.first_token_s + sum(self.steps_s)) / self.clip_s


FIGURES = (
    "mel_s", "encoder_s", "prefill_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s",
    "real_time_factor",
)  # fmt: skip


@dataclass(frozen=True)
class Opening:
    """Seconds of the way to a model that has computed something. `imports_s`: the arithmetic libraries and the backend;
    `load_s`: the file is open and checked, the cache reserved; `first_op_s`: from the start of `load_s` to the result
    of the encoder's first layer on 80 ms of sound."""

    imports_s: float
    load_s: float
    first_op_s: float


def open_timed(open_model: Callable[[], Model], backend: str, precision: str | None = None) -> tuple[Model, Opening]:
    """Opens a model under the stopwatch; nothing of the backend should have been imported before."""
    clock = [time.perf_counter()]
    _import_libraries(backend, precision)
    clock.append(time.perf_counter())
    model = open_model()
    runtime = model.runtime
    clock.append(time.perf_counter())
    silence = np.zeros((model.config.encoder.num_mel_bins, FIRST_OP_FRAMES), np.float32)
    runtime.trace_encoder([silence], [FIRST_OP], {})
    clock.append(time.perf_counter())
    return model, Opening(clock[1] - clock[0], clock[2] - clock[1], clock[3] - clock[1])


def _import_libraries(backend: str, precision: str | None) -> None:
    find_backend(backend, precision)
    from ..engine import memory, runtime  # noqa: F401


def hear(model: Model, audio: AudioSource, sample_rate: int | None, n_new: int) -> tuple[Heard, Prompt]:
    """A clip's spectrogram and the prompt around it. Raises AudioError, or ContextError when `n_new` tokens more do not
    fit."""
    heard = model.listen(audio, sample_rate)
    prompt = model.build_prompt(TASKS["transcribe"], heard)
    n_tokens = len(prompt.ids) + n_new
    if n_tokens > model.n_ctx:
        raise ContextError(
            f"the clip and the answer are {n_tokens} tokens and the context holds {model.n_ctx}; "
            "use shorter audio or a larger context"
        )
    return heard, prompt


def run_round(model: Model, audio: AudioSource, sample_rate: int | None = None, n_new: int = N_NEW) -> Round:
    """One request under the stopwatch; raises what `hear` raises, and ModelError for weights that are no numbers."""
    start = time.perf_counter()
    heard, prompt = hear(model, audio, sample_rate, n_new)
    listened = time.perf_counter()
    rows = model.runtime.encode(heard.mels)
    model.backend.device.fetch(rows[-1][-1])  # which waits until they are there
    encoded = time.perf_counter()
    logits = model.runtime.prefill(prompt, rows, n_new)
    filled = time.perf_counter()
    with model.blaming():
        _, first, steps = decode_steps(model, logits, len(prompt.ids), n_new)
    return Round(
        mel_s=listened - start,
        encoder_s=encoded - listened,
        prefill_s=filled - encoded,
        first_token_s=first - start,
        steps_s=steps,
        clip_s=heard.seconds,
        prompt_tokens=len(prompt.ids),
    )


def decode_steps(
    model: Model, logits: np.ndarray, position: int, n_new: int
) -> tuple[list[int], float, tuple[float, ...]]:
    """`n_new` likeliest tokens, the first from `logits`; its time, and seconds of each one after it."""
    sampler = Sampler(GenerateOptions())
    ids = [sampler.sample(logits, ())]
    clock = [time.perf_counter()]
    for token in model.runtime.steps(ids[0], position, n_new - 1, sampler):
        ids.append(token)
        clock.append(time.perf_counter())
    return ids, clock[0], tuple(b - a for a, b in pairwise(clock))


def fill_cache(model: Model, n_tokens: int) -> None:
    """Makes positions 0 to n_tokens - 1 of the cache hold something: normal random keys and values.

    Every byte is written, so that attention reads what it would read after a prompt of that length.
    """
    import torch

    model.runtime.find_room(n_tokens)
    caches = model.runtime.caches
    shape = next(iter(caches.values())).shape
    for start in range(0, n_tokens, FILL_ROWS):
        positions = torch.arange(start, min(start + FILL_ROWS, n_tokens), dtype=torch.int32)
        rows = torch.randn(len(positions), *shape[1:])
        for cache in caches.values():
            cache.write(positions, rows)


def run_bench(
    open_model: Callable[[], Model],
    backend: str,
    audio: Path | None = None,
    seconds: float = 60.0,
    say: Say = print,
    precision: str | None = None,
) -> dict[str, Any]:
    """Opens a model and measures for about `seconds`; plain data, for JSON. `backend` and `precision` are those that
    `open_model` takes.

    The first round warms up; its figures stand apart, under `first_run`. The others are medians over the rounds after
    it, of which there is at least one, unless the first took LONG_S. `audio`: None takes a sound that is made here.
    `say` takes lines that tell what goes on. Raises what opening and reading raise, OptionError, or ContextError.
    """
    if not 0 < seconds <= 3600:
        raise OptionError(f"--seconds is {seconds:g}; it must be above 0 and at most 3600")
    source = make_speech(CLIP_SECONDS) if audio is None else audio
    rate = SAMPLE_RATE if audio is None else None
    end = time.perf_counter() + seconds
    model, opening = open_timed(open_model, backend, precision)
    from ..engine.memory import peak_bytes

    with model:
        hear(model, source, rate, N_NEW)
        say("warming up: the first run in this process, told apart from the others")
        first, rounds = run_round(model, source, rate), []
        again = whole_s(first) <= LONG_S
        if not again:
            say(f"that took {whole_s(first):.0f} s, so it is not repeated")
            rounds.append(first)
        while again and (not rounds or (time.perf_counter() + whole_s(rounds[-1]) < end and len(rounds) < MAX_ROUNDS)):
            rounds.append(run_round(model, source, rate))
            say(f"round {len(rounds)}: first token after {rounds[-1].first_token_s:.2f} s")
        peak = peak_bytes()  # before the machine is looked at, which takes memory, too
        read = bytes_per_token(model)
        return {
            "model": str(model.file.path),
            "name": model.file.get("general.name", str, ""),
            "file_bytes": sum(path.stat().st_size for path in model.file.paths),
            "backend": model.backend.name,
            "precision": precision,
            "kv_type": model.kv_format.name.lower(),
            "audio": None if audio is None else str(audio),
            "clip_s": first.clip_s,
            "prompt_tokens": first.prompt_tokens,
            "new_tokens": N_NEW,
            "rounds": len(rounds),
            **asdict(opening),
            **{name: median(getattr(r, name) for r in rounds) for name in FIGURES},
            "decode_bytes_per_token": read,
            "peak_rss_bytes": peak,
            "first_run": {name: getattr(first, name) for name in FIGURES},
            "machine": describe_machine(),
        }


def whole_s(r: Round) -> float:
    return r.first_token_s + sum(r.steps_s)


def bytes_per_token(model: Model) -> int:
    """Weights that one token reads: all of the decoder and the head."""
    parts = READ_PER_TOKEN if not model.config.tied else (*READ_PER_TOKEN, "embedding")
    return sum(t.nbytes for t in model.file.tensors.values() if part_of(t.name) in parts)


# A sound with the statistics of speech, near enough for a clock: nothing in a file has to be shipped for it.

FORMANTS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))  # Hz, vowels
SYLLABLE_S = 0.22


def make_speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Syllables of a buzz shaped by formants, hisses between them, pauses: float32 [n] at 16 kHz, below 1."""
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    n_left = round(seconds * SAMPLE_RATE)
    while n_left > 0:
        part = _make_syllable(rng)[:n_left]
        parts.append(part)
        n_left -= len(part)
    return np.concatenate(parts)


def _make_syllable(rng: np.random.Generator) -> np.ndarray:
    """A hiss, a vowel, and now and then a pause."""
    n = int(SAMPLE_RATE * SYLLABLE_S * rng.uniform(0.6, 1.4))
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    pitch = rng.uniform(95, 150) * (1 - 0.3 * t)  # Hz, falling
    harmonics = np.arange(1, 32, dtype=np.float32)[:, None]
    loudness = _formant_gain(harmonics * pitch.mean(), FORMANTS[rng.integers(len(FORMANTS))]) / harmonics
    vowel = (loudness * np.sin(2 * np.pi * harmonics * np.cumsum(pitch) / SAMPLE_RATE)).sum(0)
    vowel *= np.hanning(n) * 0.4 / np.abs(vowel).max()
    hiss = 0.05 * np.diff(rng.standard_normal(int(SAMPLE_RATE * rng.uniform(0.02, 0.08)) + 1))
    pause = np.zeros(int(SAMPLE_RATE * 0.3) if rng.random() < 0.15 else 0)
    return np.concatenate([hiss, vowel, pause]).astype(np.float32)


def _formant_gain(hz: np.ndarray, formants: Sequence[float]) -> np.ndarray:
    """Resonances 100 Hz wide."""
    return sum(1 / (1 + ((hz - f) / 100) ** 2) for f in formants)
