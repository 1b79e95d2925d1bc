"""Spoken English digits for the demo model: sequences of recordings with exact word times, prompts and answers.

The recordings are the Free Spoken Digit Dataset (Zohar Jackson and contributors,
https://github.com/Jakobovski/free-spoken-digit-dataset), licensed CC BY-SA 4.0; keep that attribution beside
everything made from them. Synthetic voices for training come from espeak-ng (voices.py).
Knows nothing of models, tokenizers or training loops.
"""

from __future__ import annotations

from .compose import MAX_WORDS, Digits
from .recordings import WORDS, DigitsError, Recording
from .tasks import PROMPTS, Example

__all__ = ["MAX_WORDS", "PROMPTS", "WORDS", "Digits", "DigitsError", "Example", "Recording"]
