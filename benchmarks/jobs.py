"""One measurement of `end_to_end.py` in this process: `jobs.py JOB MODEL --sizes …`; prints a JSON document.

Nothing heavy is imported before the clock runs, so that the way from the start of a process can be measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from auricle.engine import Model, load
from auricle.engine.answer import GenerateOptions
from auricle.engine.kv_cache import cache_bytes
from auricle.engine.sampling import Sampler
from auricle.tools.bench import (
    CLIP_SECONDS,
    FIGURES,
    N_NEW,
    SAMPLE_RATE,
    fill_cache,
    make_speech,
    open_timed,
    run_round,
)

FEW_NEW = 8  # tokens after a long clip
STEPS = 16  # tokens at each context
ONCE_S = 120  # a run longer than this is not repeated


def open_model(a: argparse.Namespace) -> Model:
    return load(a.model, backend=a.backend, threads=a.threads)


def job_open(a: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start of the process to each station of the way to a first result."""
    model, opening = open_timed(lambda: open_model(a), a.backend)
    model.close()
    ready = time.time() - a.started
    return {
        "process_to_imports_s": ready - opening.first_op_s,
        "load_s": opening.load_s,
        "first_op_s": opening.first_op_s,
        "process_to_first_op_s": ready,
    }


def job_clip(a: argparse.Namespace) -> dict[str, float]:
    """A request on a clip of so many seconds, and the peak of a process that has seen nothing else."""
    from auricle.engine.memory import peak_bytes

    (clip_s,) = a.sizes
    sound = np.resize(make_speech(CLIP_SECONDS), clip_s * SAMPLE_RATE)
    n_new = N_NEW if clip_s <= 60 else FEW_NEW
    with open_model(a) as model:
        rounds = repeat(lambda: run_round(model, sound, SAMPLE_RATE, n_new), a.rounds)
    figures = {name: median(getattr(r, name) for r in rounds) for name in FIGURES}
    facts = {"clip_s": clip_s, "prompt_tokens": rounds[0].prompt_tokens, "new_tokens": n_new, "rounds": len(rounds)}
    return facts | figures | {"peak_rss_bytes": peak_bytes()} | peak_of_gpu(a)


def job_contexts(a: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of a decoding step after as many tokens as `sizes` say."""
    rows = []
    with open_model(a) as model:
        d = model.config.decoder
        model.runtime.decode(1000, max(a.sizes))  # a cache that grows has room for as many then
        fill_cache(model, max(a.sizes))
        for context in a.sizes:
            steps = [s for _ in range(a.rounds) for s in time_steps(model, context)]
            n_bytes = cache_bytes(d.num_layers, context, d.num_kv_heads, d.head_dim, model.kv_format)
            rows.append({"context": context, "step_s": median(steps), "kv_bytes": n_bytes})
    return rows


def time_steps(model: Model, context: int) -> list[float]:
    """Seconds of each of some tokens after `context` tokens, the first of them not counted."""
    clock = []
    for _ in model.runtime.steps(1000, context, STEPS + 1, Sampler(GenerateOptions())):
        clock.append(time.perf_counter())
    return [b - a for a, b in pairwise(clock)]


def job_encoder(a: argparse.Namespace) -> dict[str, float]:
    """Seconds of the encoder and its adapters on a clip of so many seconds."""
    (clip_s,) = a.sizes

    def run() -> float:
        start = time.perf_counter()
        rows = model.runtime.encode(heard.mels)
        model.backend.device.fetch(rows[-1][-1])  # which waits until they are there
        return time.perf_counter() - start

    with open_model(a) as model:
        heard = model.listen(np.resize(make_speech(CLIP_SECONDS), clip_s * SAMPLE_RATE), SAMPLE_RATE)
        return {"clip_s": clip_s, "encoder_s": median(repeat(run, a.rounds))}


def peak_of_gpu(a: argparse.Namespace) -> dict[str, int]:
    """The most memory that PyTorch had allocated on the card; nothing where there is none."""
    if a.backend != "cuda":
        return {}
    import torch

    return {"peak_gpu_bytes": torch.cuda.max_memory_allocated()}


def repeat(run: Callable[[], Any], n_rounds: int) -> list[Any]:
    """The results after a first run that warms up; of what takes long, the first run is the result."""
    start = time.perf_counter()
    first = run()
    if time.perf_counter() - start > ONCE_S:
        return [first]
    return [run() for _ in range(n_rounds)]


JOBS = {"open": job_open, "clip": job_clip, "contexts": job_contexts, "encoder": job_encoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", help="seconds of a clip, or contexts in tokens")
    parser.add_argument("--started", type=float, default=time.time(), help="when the process was started")
    a = parser.parse_args()
    print(json.dumps(JOBS[a.job](a)))


if __name__ == "__main__":
    main()
