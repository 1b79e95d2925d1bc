"""What an answer is, and how one is put together from tokens.

Knows text, think blocks, stop strings and time stamps. Does not know where tokens come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .sampling import OptionError, SamplingOptions
from .segments import Segment, SegmentParser
from .text import StopStrings, TextStream, ThinkSplitter
from .tokenizer import Tokenizer

# How long an answer may get where nobody says it. English speech is 2.5 to 3.5 tokens a second in Qwen's vocabulary; a
# sentence of four seconds with its two times adds as much again, [12.34] being 7 tokens: a third is left to spare.
FEWEST_NEW_TOKENS = 1024
NEW_TOKENS_PER_SECOND = 10


def default_new_tokens(audio_seconds: float) -> int:
    """`max_new_tokens` for so much audio."""
    return FEWEST_NEW_TOKENS + math.ceil(NEW_TOKENS_PER_SECOND * audio_seconds)


def check_whole(name: str, value: Any) -> None:
    """Refuses what is no whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise OptionError(f"{name} is {value!r}; it must be a whole number of at least 1")


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions):
    """Sampling, and when to stop. `max_new_tokens`: None takes `default_new_tokens`. `stop`: strings that end the
    answer and are not part of it. `time_markers`: None takes what the model file says. `parse_special`: control tokens
    written in the question are obeyed, see `build_prompt`."""

    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    time_markers: bool | None = None
    parse_special: bool = False

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        if self.max_new_tokens is not None:
            check_whole("max_new_tokens", self.max_new_tokens)
        given = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        stop = tuple(given) if isinstance(given, Iterable) else ("",)
        if any(not isinstance(s, str) or not s for s in stop):
            raise OptionError(f"stop is {self.stop!r}; it must be texts of at least one character")
        object.__setattr__(self, "stop", stop)
        if self.time_markers not in (True, False, None):
            raise OptionError(f"time_markers is {self.time_markers!r}; it must be True, False or None")
        if self.parse_special not in (True, False):
            raise OptionError(f"parse_special is {self.parse_special!r}; it must be True or False")

    def limit(self, audio_seconds: float) -> int:
        """Tokens at most, about so much audio."""
        return default_new_tokens(audio_seconds) if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: reading and transforming the audio, encoding it, filling the cache with the prompt, and decoding."""

    audio_s: float
    encode_s: float
    prefill_s: float
    decode_s: float

    @property
    def first_token_s(self) -> float:
        return self.audio_s + self.encode_s + self.prefill_s


@dataclass(frozen=True, slots=True)
class Result:
    """One answer. `text` has neither the think block (`reasoning`) nor the stop string; `token_ids` are all generated
    ids (those of a stop string too) but a stop token; `finish_reason` is "stop", or "length" for an answer that was cut
    off by `max_new_tokens` or by the end of the context."""

    text: str
    token_ids: tuple[int, ...]
    reasoning: str
    segments: tuple[Segment, ...]
    audio_seconds: float
    prompt_tokens: int
    finish_reason: str
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class Answer:
    """Tokens to text: whole characters, the think block apart, nothing beyond a stop string, time stamps parsed."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], audio_seconds: float) -> None:
        self._text, self._stop = TextStream(tokenizer), StopStrings(stop)
        self._split = ThinkSplitter(tokenizer.id_of("<think>"), tokenizer.id_of("</think>"))
        self._parser = SegmentParser(audio_seconds)
        self.token_ids: list[int] = []
        self.text, self.reasoning = "", ""
        self.segments: list[Segment] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes one id; gives the text that can be shown now."""
        self.token_ids.append(token)
        return self._route(token, self._text.push(token))

    def close(self) -> str:
        """Gives the text that was held back."""
        shown = self._route(None, self._text.close())
        if not self.stopped:
            shown += self._keep(self._stop.flush())
        self.segments += self._parser.close()
        return shown

    def _route(self, token: int | None, piece: str) -> str:
        channel, text = self._split.push(token, piece)
        if channel == "reasoning":
            self.reasoning += text
            return ""
        shown, self.stopped = self._stop.push(text)
        return self._keep(shown)

    def _keep(self, shown: str) -> str:
        self.text += shown
        self.segments += self._parser.feed(shown)
        return shown
