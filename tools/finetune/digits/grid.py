"""The audio tokens of a clip, one every 80 ms: what is heard in each and where it stands, as classes to be told apart.

Knows words and times; no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from .compose import MAX_SECONDS, MAX_WORDS
from .recordings import WORDS
from .tasks import PROMPTS, Example

TOKEN_MS = 80
N_SOUNDS = 1 + 2 * len(WORDS)
N_PLACES = (int(MAX_SECONDS) + 1, 10, 5, MAX_WORDS + 1)  # whole seconds, tenths, fiftieths, words


def on_grid(example: Example) -> Example:
    """The same with times in whole audio tokens, at least one a word: no finer ones are to be learnt."""
    firsts = [_nearest(start) for start, _ in example.times]
    ends = [max(_nearest(end), first + 1) for first, (_, end) in zip(firsts, example.times, strict=True)]
    times = ((first * TOKEN_MS / 1000, end * TOKEN_MS / 1000) for first, end in zip(firsts, ends, strict=True))
    return replace(example, times=tuple(times))


def sounds_of(example: Example, n_tokens: int) -> list[int]:
    """What is heard at each audio token: silence, the start of a word, or more of it; one of N_SOUNDS."""
    sounds = [0] * n_tokens
    for word, (start, end) in zip(example.words, on_grid(example).times, strict=True):
        first = _nearest(start)
        for at in range(first, min(_nearest(end), n_tokens)):
            sounds[at] = 1 + 2 * WORDS.index(word) + (at > first)
    return sounds


def places_of(sounds: Sequence[int]) -> list[tuple[int, ...]]:
    """Where each audio token stands: seconds, tenths and fiftieths when it starts, and words begun; of N_PLACES."""
    places = []
    for at, n_words in enumerate(accumulate(sound % 2 for sound in sounds)):
        seconds, rest = divmod(at * TOKEN_MS, 1000)
        places.append((seconds, rest // 100, rest % 100 // 20, n_words))
    return places


def aims_of(example: Example, opens: Sequence[bool], n_tokens: int) -> list[int]:
    """The audio token where each token of the answer is decided, or -1: the start or end of a word, which a time tells;
    the start of the word that is written; the start of the last word for the other questions.

    `opens`: which tokens of the answer open a stamp. A transcript has a token a word.
    """
    ends = [_nearest(time) for span in on_grid(example).times for time in span]
    if not ends:
        return [-1] * len(opens)
    if example.prompt == PROMPTS["timestamps"]:
        which = [n - 1 for n in accumulate(opens)]
    elif example.prompt == PROMPTS["transcribe"]:
        which = list(range(0, len(ends), 2))
    else:
        which = [len(ends) - 2] * len(opens)
    return [ends[n] if ends[n] < n_tokens else -1 for n in which]


def _nearest(seconds: float) -> int:
    """The audio token that starts nearest."""
    return round(seconds * 1000 / TOKEN_MS)
