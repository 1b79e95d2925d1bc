"""Timed segments from what a model writes: the authors' grammar `[start]text[end][start]text[end]…` in decimal seconds.

Reads pieces as they come. Knows no tokens and changes no text: who wants the raw answer keeps it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Bounded, so that only the last few characters can be the beginning of a stamp that a later piece completes.
_STAMP = re.compile(r"\[([0-9]{1,6}\.[0-9]{1,3})\]")
_LONGEST_STAMP = len("[123456.123]")
_SPEAKER = re.compile(r"\[(S[0-9]{1,3})\]")
_CUT_BRACKET = re.compile(r"\[(?:[0-9]{1,6}(?:\.[0-9]{0,3})?|S[0-9]{0,3})?$")


@dataclass(frozen=True, slots=True)
class Segment:
    """What was said between two moments of the clip."""

    start: float  # seconds
    end: float  # seconds
    text: str
    speaker: str | None = None


class SegmentParser:
    """Reads an answer piece by piece. A segment is the text between two stamps, whatever the pairing.

    So a missing end is the next start, and the clip's end for the last segment. A reversed pair is turned round, times
    are clamped to the clip, and no segment starts before the previous one has ended. Text before the first stamp
    belongs to no segment. `[S01]` right after a stamp names the speaker.
    """

    def __init__(self, audio_seconds: float) -> None:
        self._audio_seconds = audio_seconds
        self._pending = ""  # what follows the last stamp
        self._scanned = 0  # characters of it in which no stamp begins
        self._stamp: float | None = None
        self._last_end = 0.0

    def feed(self, text: str) -> list[Segment]:
        """The segments that `text` completes."""
        self._pending += text
        segments: list[Segment] = []
        cursor = 0
        for match in _STAMP.finditer(self._pending, self._scanned):
            segments += self._segment(self._pending[cursor : match.start()], float(match[1]))
            self._stamp = float(match[1])
            cursor = match.end()
        self._pending = self._pending[cursor:]
        self._scanned = max(0, len(self._pending) - _LONGEST_STAMP + 1)
        return segments

    def close(self) -> list[Segment]:
        """The segment that was still open, up to the clip's end. A stamp that was cut off is left out of its text."""
        pending, self._pending, self._scanned = self._pending, "", 0
        return self._segment(_CUT_BRACKET.sub("", pending), self._audio_seconds)

    def _segment(self, text: str, end: float) -> list[Segment]:
        """The segment from the last stamp to `end`, or none when there is no text or no stamp before it."""
        text = text.strip()
        label = _SPEAKER.match(text)
        if label:
            text = text[label.end() :].lstrip()
        if self._stamp is None or not text:
            return []
        first, last = sorted((self._stamp, end))
        first = max(self._last_end, min(first, self._audio_seconds))
        self._last_end = max(first, min(last, self._audio_seconds))
        return [Segment(first, self._last_end, text, label[1] if label else None)]


def parse_segments(text: str, audio_seconds: float) -> tuple[Segment, ...]:
    """All segments of a finished answer; a text without stamps has none."""
    parser = SegmentParser(audio_seconds)
    return (*parser.feed(text), *parser.close())
