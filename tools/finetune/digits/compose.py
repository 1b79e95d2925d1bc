"""Sequences of digits strung from recordings, with the exact times of the words, in training and for measurement.

Knows recordings and pauses; what a voice, a room or a microphone does to sound is augment.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ....engine.mel import SAMPLE_RATE
from . import tasks
from .augment import Channel, Voicing, limit
from .noise import NoiseBank
from .recordings import WORDS, DigitsError, Recording, by_speaker, load_recordings, load_split
from .tasks import Example

MAX_SECONDS = 12.0
MAX_WORDS = 10
_N_WORDS = np.array([14, 12, 12, 12, 12, 10, 9, 8, 6, 5]) / 100  # of 1 to 10 words

_SPEECHLESS = 0.04  # of the draws
_SYNTHETIC = 0.25  # of the sequences, when there are synthetic voices
_MIXED = 0.15  # of the sequences in training
_CHANNELLED = 0.5  # of the sequences that are changed


class Digits:
    """Draws clips of spoken digits with questions and answers, from one split of the recordings."""

    def __init__(self, folder: Path, split: str, voices: Path | None = None, speaker: str | None = None):
        """Loads a split of `folder` as `load_split` does, and of `voices` everything.

        Raises DigitsError for an unknown split and for a folder without its recordings.
        """
        self.recordings = load_split(Path(folder), split, speaker)
        self.speakers = by_speaker(self.recordings)
        synthetic = load_recordings(Path(voices), kind="of synthetic voices") if voices else []
        self.voices = by_speaker(synthetic)
        self.noise = NoiseBank()
        self._mixed = _MIXED if split == "train" else 0.0

    def draw(
        self, rng: np.random.Generator, augment: bool = True, task: str | None = None, n_words: int | None = None
    ) -> Example:
        """A clip of at most 12 s and a question about it.

        task: a key of tasks.PROMPTS, by default drawn at tasks.WEIGHTS. n_words: 0 (silence or noise) to 10, by default
        drawn; of words that do not fit into 12 s the last are left out. Without `augment` the words stand as recorded
        between digital silence.
        """
        task = task or str(rng.choice(list(tasks.WEIGHTS), p=list(tasks.WEIGHTS.values())))
        if n_words is None:
            n_words = 0 if rng.random() < _SPEECHLESS else 1 + int(rng.choice(MAX_WORDS, p=_N_WORDS))
        if n_words == 0:
            return tasks.ask(task, self.noise.speechless(rng, int(rng.uniform(0.3, 8) * SAMPLE_RATE), augment))
        spoken = self._choose(rng, n_words)
        if augment:
            voicing = Voicing.draw(rng)
            words = [voicing.apply(recording.samples, rng) for recording in spoken]
        else:
            words = [recording.samples for recording in spoken]
        samples, times = string_together(words, draw_pauses(rng, len(words)))
        if augment:
            channel = rng.random() < _CHANNELLED
            samples = Channel.draw(rng, self.noise).apply(samples, times, rng) if channel else limit(samples)
        return tasks.ask(task, samples, [WORDS[recording.digit] for recording in spoken][: len(times)], times)

    def fixed(self, n: int, seed: int, task: str = "transcribe") -> list[Example]:
        """`n` clean sequences of one speaker each, the same for the same seed, in which every recording occurs.

        `Example.asked` puts another question to the same clip. Raises DigitsError when `n` is too small for that.
        """
        rng = np.random.default_rng(seed)
        decks = {speaker: _shuffled(rng, recordings) for speaker, recordings in self.speakers.items()}
        unused = {speaker: len(deck) for speaker, deck in decks.items()}
        examples = []
        for n_left in range(n, 0, -1):
            left = sum(max(count, 0) for count in unused.values())
            speaker = max(unused, key=unused.__getitem__)
            n_words = min(max(1 + int(rng.integers(MAX_WORDS)), -(-left // n_left)), MAX_WORDS)
            while len(decks[speaker]) < n_words:
                decks[speaker] += _shuffled(rng, self.speakers[speaker])
            spoken = [decks[speaker].pop(0) for _ in range(n_words)]
            pauses = draw_pauses(rng, n_words)
            samples, times = string_together([recording.samples for recording in spoken], pauses)
            decks[speaker] = spoken[len(times) :] + decks[speaker]
            unused[speaker] -= len(times)
            words = [WORDS[recording.digit] for recording in spoken[: len(times)]]
            examples.append(tasks.ask(task, samples, words, times))
        if any(count > 0 for count in unused.values()):
            raise DigitsError(f"{n} sequences do not hold all of {len(self.recordings)} recordings; take more")
        return examples

    def _choose(self, rng: np.random.Generator, n_words: int) -> list[Recording]:
        pool = self.voices if self.voices and rng.random() < _SYNTHETIC else self.speakers
        names = list(pool)
        if rng.random() < self._mixed:
            speakers = [names[at] for at in rng.integers(len(names), size=n_words)]
        else:
            speakers = [names[rng.integers(len(names))]] * n_words
        return [pool[speaker][rng.integers(len(pool[speaker]))] for speaker in speakers]


def draw_pauses(rng: np.random.Generator, n_words: int) -> np.ndarray:
    """Seconds of silence before each word and after the last: [n_words + 1]."""
    low, high = [(0.05, 0.6), (0.05, 0.25), (0.0, 0.08), (0.3, 1.2)][rng.choice(4, p=[0.55, 0.2, 0.1, 0.15])]
    pauses = rng.uniform(low, high, n_words + 1)
    long = rng.random(n_words + 1) < 0.04
    pauses[long] = rng.uniform(0.6, 2.5, int(long.sum()))
    pauses[[0, -1]] = rng.uniform(0, 1, 2) * (rng.random(2) > 0.15)
    return pauses


def string_together(
    words: Sequence[np.ndarray], pauses: np.ndarray
) -> tuple[np.ndarray, tuple[tuple[float, float], ...]]:
    """Words [n] and pauses in seconds [len(words) + 1] in turn: samples float32 and start and end of each word.

    Pauses shrink to fit into MAX_SECONDS; words that still do not fit are left out from the end.
    """
    budget = int(MAX_SECONDS * SAMPLE_RATE)
    n_fit = int(np.searchsorted(np.cumsum([len(word) for word in words]), budget - SAMPLE_RATE // 2, side="right"))
    words = words[: max(n_fit, 1)]
    gaps = np.append(pauses[: len(words)], pauses[-1]) * SAMPLE_RATE
    room = budget - sum(map(len, words))
    gaps = (gaps * min(1.0, room / max(gaps.sum(), 1))).astype(int)
    starts = np.cumsum(gaps[:-1]) + np.cumsum([0, *(len(word) for word in words[:-1])])
    samples = np.zeros(gaps.sum() + sum(map(len, words)), np.float32)
    for start, word in zip(starts, words, strict=True):
        samples[start : start + len(word)] = word
    times = tuple(
        (start / SAMPLE_RATE, (start + len(word)) / SAMPLE_RATE)
        for start, word in zip(starts.tolist(), words, strict=True)
    )
    return samples, times


def _shuffled(rng: np.random.Generator, recordings: Sequence[Recording]) -> list[Recording]:
    return [recordings[at] for at in rng.permutation(len(recordings))]
