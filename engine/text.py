"""Token ids that come one by one, as text that can be shown at once: whole characters, no think block, no stop string.

Three parts that stand in a row: TextStream, ThinkSplitter, StopStrings. Knows no model and no sampling.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Literal

from .sampling import OptionError
from .tokenizer import Tokenizer

Channel = Literal["reasoning", "content"]

_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)*")


class TextStream:
    """Bytes of tokens into characters; all pieces together are what `Tokenizer.decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.leading_space

    def push(self, token_id: int) -> str:
        """The characters that this token completes, maybe none."""
        if token_id in self._skipped:
            return ""
        return self._text(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def close(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._text(self._decoder.decode(b"", final=True))

    def _text(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text[1:] if text.startswith(" ") else text
        return text


class ThinkSplitter:
    """Sends pieces of an answer to "reasoning" or "content", by the ids of `<think>` and `</think>`.

    Without both ids (None) nothing is split or stripped. Blank lines around the reasoning and right after `</think>`
    are left out. An answer that is cut inside the think block is all reasoning.
    """

    def __init__(self, think_id: int | None, end_id: int | None) -> None:
        both = think_id is not None and end_id is not None
        self._marks: dict[int | None, Channel] = {think_id: "reasoning", end_id: "content"} if both else {}
        self._channel: Channel = "content"
        self._at_start = False  # right after a mark: blank lines are dropped
        self._held = ""  # white space that is shown only when more text follows

    def push(self, token_id: int | None, text: str) -> tuple[Channel, str]:
        """Where the piece `text` of token `token_id` goes, and what of it can be shown now.

        The id is None for what `TextStream.close` gives.
        """
        if token_id in self._marks:  # the piece is the mark itself, or empty
            self._channel = self._marks[token_id]
            self._at_start, self._held = True, ""
            return self._channel, ""
        return self._channel, self._trimmed(text)

    def _trimmed(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        if self._at_start:
            text = self._without_blank_lines(text)
        if self._channel == "reasoning":
            shown = text.rstrip()
            self._held += text[len(shown) :]
            return shown
        return text

    def _without_blank_lines(self, text: str) -> str:
        if not text.strip():
            self._held = text
            return ""
        self._at_start = False
        return text[_BLANK_LINES.match(text).end() :]


class StopStrings:
    """Ends an answer before the first stop string that is complete; holds back what may be the beginning of one.

    The result does not depend on how the text is cut into pieces. Raises OptionError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert not isinstance(stops, str), f"{stops=}"
        if "" in stops:
            raise OptionError("--stop is empty; it must be a text of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """What can be shown now, and whether a stop string has come. Nothing is shown after one."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        shown = len(text) - self._n_held(text)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _n_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
