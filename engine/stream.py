"""An answer in the making: encode, prefill, and token after token, each a piece of work in the answer's turn.

Does not know how a request is read, nor how a model is opened (`session.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np

from .answer import Answer, GenerateOptions, Result, Timings
from .finite import check_logits
from .prompts import Prompt
from .sampling import Sampler
from .turns import Turn, TurnError

if TYPE_CHECKING:
    from .memory import Fit
    from .session import Model


@dataclass(frozen=True)
class Heard:
    """Audio that has been read: a spectrogram [n_mels, n_frames] a clip."""

    mels: list[np.ndarray]
    seconds: float


class Stream:
    """An iterator over the pieces of an answer's text; `result` is there once it has ended. The model works on it from
    the first piece to the last; `close`, or letting go of it, ends that before. Threads may share it."""

    def __init__(
        self,
        model: Model,
        heard: Heard,
        prompt: Prompt,
        options: GenerateOptions,
        n_new: int,
        fit: Fit | None,
        audio_s: float,
    ) -> None:
        """`n_new`: tokens at most. `fit`: how to run it, None as the model runs. `audio_s`: what reading took."""
        self._reading = threading.RLock()
        self._results: list[Result] = []
        # The generator must not refer to this object: it would not end when nobody holds that any more.
        self._pieces = _Work(model, heard, prompt, options, n_new, fit, audio_s).run(self._results)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._reading:
            return next(self._pieces)

    def close(self) -> None:
        """Ends the answer where it is; there is no result then."""
        with self._reading:
            self._pieces.close()

    @property
    def result(self) -> Result:
        """Raises TurnError before the end."""
        if not self._results:
            raise TurnError("the answer has no result: it has not been read to its end")
        return self._results[0]


@dataclass(frozen=True)
class _Work:
    """What an answer is made from."""

    model: Model
    heard: Heard
    prompt: Prompt
    options: GenerateOptions
    n_new: int
    fit: Fit | None
    audio_s: float

    def run(self, results: list[Result]) -> Iterator[str]:
        """The pieces of text; puts the result into `results` at the end."""
        turn = Turn()
        try:
            yield from self._answer(turn, results)
        finally:
            self.model.end(turn)

    def _answer(self, turn: Turn, results: list[Result]) -> Iterator[str]:
        answer = Answer(self.model.tokenizer, self.options.stop, self.heard.seconds)
        logits, clock = self._read(turn)
        finish_reason = "length"
        for token in self._tokens(turn, logits):
            if token in self.model.stop_ids:
                finish_reason = "stop"
                break
            yield from filter(None, [answer.push(token)])
            if answer.stopped:
                finish_reason = "stop"
                break
        yield from filter(None, [answer.close()])
        steps = [b - a for a, b in pairwise([*clock, time.perf_counter()])]
        result = Result(
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            reasoning=answer.reasoning,
            segments=tuple(answer.segments),
            audio_seconds=self.heard.seconds,
            prompt_tokens=len(self.prompt.ids),
            finish_reason=finish_reason,
            timings=Timings(self.audio_s, *steps),
        )
        results.append(result)

    def _read(self, turn: Turn) -> tuple[np.ndarray, list[float]]:
        """Audio and prompt into the cache; gives the logits after them [n_vocab], and the times at which each part
        began or ended."""
        model, mels = self.model, self.heard.mels
        with model.at_work(turn):
            clock = [time.perf_counter()]
            if self.fit is not None:
                model.adopt(self.fit)
            rows = model.runtime.encode(mels) if mels else []
            clock.append(time.perf_counter())
        with model.at_work(turn):
            logits = model.runtime.prefill(self.prompt, rows, self.n_new, self.options.kind)
            check_logits(logits)
            clock.append(time.perf_counter())
        return logits, clock

    def _tokens(self, turn: Turn, logits: np.ndarray) -> Iterator[int]:
        """Sampled ids until the budget or the context is used up; the caller ends it at one that ends the answer."""
        model, work = self.model, partial(self.model.at_work, turn)
        sampler = Sampler(self.options)
        with work():
            first = sampler.sample(logits, ())
            following = model.runtime.steps(first, len(self.prompt.ids), self.n_new - 1, sampler)
            # What the first step of all makes ready, compiles and says comes before any text.
            ahead = [] if model.stepped or first in model.stop_ids else list(islice(following, 1))
            model.stepped = model.stepped or bool(ahead)
        yield first
        yield from ahead
        while True:
            with work():
                token = next(following, None)
            if token is None:
                return
            yield token
