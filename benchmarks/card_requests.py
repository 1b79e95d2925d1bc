"""Whole requests on a card: clips, contexts, the encoder, their memory, and the way from a start to a first token.

One process goes through the steps of one file, so that it is opened once; memory is measured by its first step, before
anything else was. Knows the engine's interface and the stopwatch of `tools/bench.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from card_device import Gpu

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import Model
from auricle.engine.answer import GenerateOptions
from auricle.engine.gguf import open_gguf
from auricle.engine.kv_cache import cache_bytes
from auricle.engine.sampling import Sampler
from auricle.tools.bench import CLIP_SECONDS, FIGURES, SAMPLE_RATE, Round, fill_cache, hear, make_speech, run_round
from auricle.tools.sample import write_checkpoint
from auricle.tools.synth import plan_synth, write_synth

Step = tuple[str, Callable[[], dict[str, Any]]]
ROUNDS = 5
TOKEN = 100  # any
STEPS = 48  # tokens at each context


class Sizes:
    """Of a full run, and of a rehearsal."""

    def __init__(self, rehearsal: bool) -> None:
        self.clip_s, self.long_s = (0.4, 0.5) if rehearsal else (CLIP_SECONDS, 600.0)
        self.contexts = (20, 30) if rehearsal else (200, 8192)
        self.n_new, self.n_steps, self.rounds = (3, 2, 1) if rehearsal else (32, STEPS, ROUNDS)


def make_file(path: Path, recipe: str, rehearsal: bool) -> dict[str, Any]:
    """Writes the synthetic model file; of a rehearsal a model that an interpreter can run."""
    start = time.perf_counter()
    if rehearsal:
        from cuda_worker import SMALL

        convert(plan_conversion(write_checkpoint(path.with_suffix(""), SMALL), "q8_0"), path)
    else:
        write_synth(plan_synth("moss-audio-4b", recipe), path)
    return {"bytes": path.stat().st_size, "write_s": time.perf_counter() - start}


def sound(seconds: float) -> np.ndarray:
    return np.resize(make_speech(CLIP_SECONDS), round(seconds * SAMPLE_RATE))


class Requests:
    """The steps over one open file."""

    def __init__(self, gpu: Gpu, path: Path) -> None:
        self.gpu, self.path, self.sizes = gpu, path, Sizes(gpu.rehearsal)
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = Model(open_gguf(self.path), self.gpu.backend(), n_ctx=None, kv_type=None, poison=False)
        return self._model

    def steps(self) -> Iterator[Step]:
        clip, long = self.sizes.clip_s, self.sizes.long_s
        yield "first request", lambda: self.first(clip)
        yield "clip", lambda: self.clip(clip, self.sizes.rounds)
        yield "contexts", self.contexts
        yield "long clip", lambda: self.clip(long, 1)
        yield "encoder", lambda: self.encoder(long)

    def first(self, seconds: float) -> dict[str, Any]:
        """The first request of a process: compiling or reading kernels, bringing weights, and its memory."""
        before, free = self.gpu.forget_peak(), self.gpu.free_bytes()
        start = time.perf_counter()
        model = self.model
        planned = model.plan([seconds], max_new_tokens=self.sizes.n_new)
        r = run_round(model, sound(seconds), SAMPLE_RATE, self.sizes.n_new)
        whole = self.gpu.wait() - start
        return {
            "whole_s": whole,
            **figures([r]),
            **self._memory(planned, before),
            "taken_bytes": free - self.gpu.free_bytes(),  # with what PyTorch keeps for later, and compiled kernels
        }

    def _memory(self, planned: Any, before: int) -> dict[str, Any]:
        allocated = planned.total - planned.libraries  # what libraries take is free again when the decoder comes
        return {"planned_bytes": planned.total, "planned_without_libraries": allocated, "plan": asdict(planned)} | {
            "peak_bytes": self.gpu.peak_bytes() - before
        }

    def clip(self, seconds: float, n_rounds: int) -> dict[str, Any]:
        samples, n_new = sound(seconds), self.sizes.n_new
        run_round(self.model, samples, SAMPLE_RATE, n_new)
        before = self.gpu.forget_peak()
        rounds = [run_round(self.model, samples, SAMPLE_RATE, n_new) for _ in range(n_rounds)]
        planned = self.model.plan([seconds], max_new_tokens=n_new)
        return figures(rounds) | {"planned_bytes": planned.total, "peak_bytes": self.gpu.peak_bytes(), "held": before}

    def contexts(self) -> dict[str, Any]:
        """Seconds of a decoding step after so many tokens."""
        d, rows = self.model.config.decoder, []
        self.model.runtime.decode(TOKEN, max(self.sizes.contexts) + self.sizes.n_steps + 1)  # room for as many
        fill_cache(self.model, max(self.sizes.contexts))
        for context in self.sizes.contexts:
            times = [self._time_steps(context) for _ in range(self.sizes.rounds)]
            n_bytes = cache_bytes(d.num_layers, context, d.num_kv_heads, d.head_dim, self.model.kv_format)
            rows.append({"context": context, "step_s": median(times), "steps_s": times, "kv_bytes": n_bytes})
        return {"rows": rows}

    def _time_steps(self, context: int) -> float:
        """Seconds of one of many tokens, the first two left out."""
        n, clock = self.sizes.n_steps, []
        for _ in self.model.runtime.steps(TOKEN, context, n + 2, Sampler(GenerateOptions())):
            clock.append(time.perf_counter())
        return (clock[-1] - clock[1]) / (len(clock) - 2)

    def encoder(self, seconds: float) -> dict[str, Any]:
        heard, times = self.model.listen(sound(seconds), SAMPLE_RATE), []
        for _ in range(self.sizes.rounds):
            start = time.perf_counter()
            rows = self.model.runtime.encode(heard.mels)
            self.model.backend.device.fetch(rows[-1][-1])
            times.append(time.perf_counter() - start)
        return {"clip_s": seconds, "encoder_s": median(times), "each_s": times}


def figures(rounds: list[Round]) -> dict[str, Any]:
    found = {name: median(getattr(r, name) for r in rounds) for name in FIGURES}
    steps = [s for r in rounds for s in r.steps_s[2:]] or [s for r in rounds for s in r.steps_s]
    facts = {"clip_s": rounds[0].clip_s, "prompt_tokens": rounds[0].prompt_tokens, "rounds": len(rounds)}
    return facts | found | {"step_s": median(steps)}


def start_steps(gpu: Gpu, path: Path, started: float) -> Iterator[Step]:
    """From the start of the process to the first token of a clip; the compile cache is the environment's."""

    def first_token() -> dict[str, Any]:
        imported, sizes = time.time(), Sizes(gpu.rehearsal)
        requests = Requests(gpu, path)
        heard, prompt = hear(requests.model, sound(sizes.clip_s), SAMPLE_RATE, sizes.n_new)
        rows = requests.model.runtime.encode(heard.mels)
        logits = requests.model.runtime.prefill(prompt, rows, sizes.n_new)
        first = int(logits.argmax())
        at_first, clock = time.time(), []
        for _ in requests.model.runtime.steps(first, len(prompt.ids), 3, Sampler(GenerateOptions())):
            clock.append(time.time())
        steps = [b - a for a, b in pairwise([at_first, *clock])]
        return {
            "to_imports_s": imported - started,
            "to_first_token_s": at_first - started,
            "to_second_token_s": clock[0] - started,
            "steps_s": steps,
        }

    yield "start", first_token


def make_steps(gpu: Gpu, path: Path, recipe: str) -> Iterator[Step]:
    """The file, and then one request of each kind on it, so that what it needs is compiled."""
    yield "write", lambda: make_file(path, recipe, gpu.rehearsal)
    requests = Requests(gpu, path)
    yield "compile", lambda: requests.first(requests.sizes.clip_s)
    yield "compile contexts", requests.contexts
