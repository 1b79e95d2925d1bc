"""What of two texts is compared: the spelling that does not count is taken away from both. Knows no metric."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Times and speakers in the authors' notation, as `engine/segments.py` reads them.
_MARK = re.compile(r"\[(?:[0-9]{1,6}\.[0-9]{1,3}|S[0-9]{1,3})\]")


@dataclass(frozen=True)
class Spelling:
    """`lower`: upper and lower case are the same. `punctuation`: it counts. Unicode is brought to NFKC and runs of
    blanks to one in any case; an apostrophe or a hyphen inside a word is part of it."""

    lower: bool = True
    punctuation: bool = False

    def clean(self, text: str) -> str:
        """The words of `text`, with one blank between them; time stamps and speakers are none."""
        text = unicodedata.normalize("NFKC", _MARK.sub(" ", text))
        if self.lower:
            text = text.lower()
        if not self.punctuation:
            text = "".join(_keep(text, at) for at in range(len(text)))
        return " ".join(text.split())

    def describe(self) -> str:
        """For people, in one line."""
        case = "lower case" if self.lower else "case counts"
        return f"NFKC, {case}, {'punctuation counts' if self.punctuation else 'no punctuation'}, no time stamps"


def _keep(text: str, at: int) -> str:
    """The character at `at`, or a blank for punctuation and symbols that stand in no word."""
    char = text[at]
    if unicodedata.category(char)[0] not in "PS":
        return char
    inside = 0 < at < len(text) - 1 and text[at - 1].isalnum() and text[at + 1].isalnum()
    return char if char in "'’-" and inside else " "
