"""What is asked about a clip of spoken digits, and the right answer. Knows no audio beyond carrying it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....engine.prompts import TASKS

PROMPTS: dict[str, str] = {
    "transcribe": TASKS["transcribe"],
    "timestamps": TASKS["timestamps"],
    "count": "How many digits are spoken?",
    "last": "What is the last digit?",
}
WEIGHTS: dict[str, float] = {"transcribe": 0.5, "timestamps": 0.3, "count": 0.1, "last": 0.1}


@dataclass(frozen=True)
class Example:
    """One clip, what is spoken in it and when, and one question with its answer."""

    samples: np.ndarray  # [n_samples] float32 mono at 16 kHz, within [-1, 1]
    words: tuple[str, ...]  # in the order spoken, empty when nobody speaks
    times: tuple[tuple[float, float], ...]  # start and end of each word in seconds
    prompt: str
    answer: str

    def asked(self, task: str) -> Example:
        """The same clip with another question, a key of PROMPTS."""
        return replace(self, prompt=PROMPTS[task], answer=answer_to(task, self.words, self.times))


def ask(
    task: str, samples: np.ndarray, words: Sequence[str] = (), times: Sequence[tuple[float, float]] = ()
) -> Example:
    """The example that puts `task`, a key of PROMPTS, to a clip."""
    answer = answer_to(task, words, times)
    return Example(samples, tuple(words), tuple(times), PROMPTS[task], answer)


def answer_to(task: str, words: Sequence[str], times: Sequence[tuple[float, float]]) -> str:
    """What the model must say; times in seconds are written with two decimals."""
    if task == "transcribe":
        return " ".join(words)
    if task == "timestamps":
        pairs = zip(words, times, strict=True)
        return "".join(f"[{start:.2f}]{word}[{end:.2f}]" for word, (start, end) in pairs)
    if task == "count":
        return str(len(words))
    assert task == "last", f"{task=}"
    return words[-1] if words else "none"
