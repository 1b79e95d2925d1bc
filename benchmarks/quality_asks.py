"""What `quality.py` asks of a model file, and the files it asks: quantised ones, and ones with something taken away.

Everything goes through the engine, as a user's request does: clips as samples in, greedy text out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from auricle.convert.hf import convert
from auricle.convert.importance import merge
from auricle.convert.requantize import plan_requantization
from auricle.engine import Model, load
from auricle.engine.gguf import Typed, open_gguf, u32
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.segments import Segment
from auricle.tools.evaluate.measures import Answer, score
from auricle.tools.finetune.digits import PROMPTS, Digits, Example
from auricle.tools.imatrix import collect_importance

SPLITS = {"heard": "test", "unheard": "unheard"}
LIMITS = {"transcribe": 64, "timestamps": 320, "count": 8}  # tokens of an answer at most, by question
N_CTX = 1024
RATE = 16_000


@cache
def read_examples(fsdd: Path, split: str, n: int, seed: int) -> list[Example]:
    return Digits(fsdd, split).fixed(n, seed)


def measure_file(
    path: Path, fsdd: Path, n: int, seed: int, threads: int, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Scores by speakers ("heard", "unheard"); `options` as for `Model.generate`."""
    with load(path, backend="cpu", threads=threads, n_ctx=N_CTX) as model:
        return {
            name: measure(model, read_examples(fsdd, split, n, seed), **(options or {}))
            for name, split in SPLITS.items()
        }


def measure(model: Model, examples: Collection[Example], **options: Any) -> dict[str, Any]:
    """`words`: the scores of transcripts. `times`: of stamped ones. `count`: share of right counts."""
    words, times, n_right = [], [], 0
    for example in examples:
        said = {
            task: model.generate(
                PROMPTS[task], example.samples, sample_rate=RATE, max_new_tokens=LIMITS[task], **options
            )
            for task in LIMITS
        }
        words.append(Answer(" ".join(example.words), said["transcribe"].text))
        wanted = tuple(Segment(*span, word) for span, word in zip(example.times, example.words, strict=True))
        stamped = said["timestamps"]
        times.append(Answer(" ".join(example.words), stamped.text, wanted, stamped.segments))
        n_right += said["count"].text.strip() == example.asked("count").answer
    return {"words": asdict(score(words)), "times": asdict(score(times)), "count": n_right / len(examples)}


# Files.


def collect(model: Path, fsdd: Path, folder: Path, n_clips: int, seed: int) -> dict[str, np.ndarray]:
    """The importance of columns on `n_clips` sequences of the training recordings, for two questions."""
    digits, rng = Digits(fsdd, "train"), np.random.default_rng(seed)
    clips = []
    for number in range(n_clips):
        clips.append(str(folder / f"train-{number}.wav"))
        soundfile.write(clips[-1], digits.draw(rng, augment=False, task="transcribe").samples, RATE)
    with load(model, backend="cpu", n_ctx=N_CTX) as opened:
        tasks = ("transcribe", "timestamps")
        return merge(collect_importance(opened, clips, PROMPTS[t], LIMITS[t]) for t in tasks).importance()


def quantise(model: Path, out: Path, recipe: str, importance: dict[str, np.ndarray] | None = None) -> Path:
    convert(plan_requantization(model, recipe, importance=importance), out)
    return out


def take_away(model: Path, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By what is taken away, a file and the options to ask it with."""
    found = {"no time markers": (model, {"time_markers": False})}
    with open_gguf(model) as file:
        n = min(file.require(f"moss_audio.deepstack.{key}", int) for key in ("num_taps", "num_inject_layers"))
        taps = [file.require(f"moss_audio.deepstack.tap.{k}", int) for k in range(n)]
    if n > 1:  # each merger gets the features of the layer that is the next one's
        turned = {f"moss_audio.deepstack.tap.{k}": u32(taps[(k + 1) % n]) for k in range(n)}
        found["DeepStack inputs shuffled"] = change(model, folder / "shuffled.gguf", turned), {}
    if n:
        silent = [f"deepstack.{k}.down.weight" for k in range(n)]
        found["DeepStack inputs dropped"] = change(model, folder / "dropped.gguf", {}, silent), {}
    return found


def change(model: Path, out: Path, keys: Mapping[str, Typed], zeros: Collection[str] = ()) -> Path:
    """A copy of a model with other values under some keys, and nothing but zeros in some tensors (of plain numbers)."""
    with open_gguf(model) as file:
        tensors = [(info.name, info.shape, info.format) for info in file.tensors.values()]
        assert all(file.tensors[name].format.length == 1 for name in zeros), f"{zeros=}"
        with GGUFWriter(out, plan_layout({**file.types, **keys}, tensors, file.alignment)) as writer:
            for name in file.tensors:
                data = file.data(name)
                writer.write(name, np.zeros_like(data) if name in zeros else data)
    return out
