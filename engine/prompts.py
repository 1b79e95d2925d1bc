"""From a question and the lengths of its clips to the ids the decoder reads, as the authors' processor builds them.

Knows the form of the prompt and of an audio span; knows no audio, no model and no chat history.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.errors import AuricleError
from .tokenizer import Tokenizer

TOKENS_PER_MARKER = 25  # 12.5 audio tokens a second, a marker every 2 seconds
SECONDS_PER_MARKER = 2

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
# Stands for a clip in a text; never tokenised.
_SPAN_PATTERN = re.compile(r"<\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>")

# The wording the authors themselves give: other words work, these are what they evaluate with.
TASKS: dict[str, str] = {
    "transcribe": "Transcribe the audio.",
    "timestamps": (
        "Transcribe the audio into sentence-level timestamps using the format [xx.xx]text[yy.yy], "
        "where xx.xx and yy.yy are the start and end in seconds rounded to two decimal places. "
        "Concatenate consecutive segments without breaks, "
        "for example [0.00]hello there[2.01][2.01]the weather is nice today[4.32]. "
        "Exclude any additional content such as explanations, headings, or annotations."
    ),
    "diarise": (
        "Transcribe the audio into text. "
        "Each sentence should begin with a start timestamp and a speaker label ([S01], [S02], [S03], …), "
        "followed by the corresponding spoken content, "
        "and end with an end timestamp to clearly indicate the time span of that sentence."
    ),
    "describe": "Describe this audio.",
    "caption": (
        "Describe the vocal characteristics in the audio in JSON format. "
        "Include the following fields: gender, age, pitch, speed, volume, clarity, fluency, accent, texture, "
        "emotion, tone, personality, and summary. "
        "Fill each field with the corresponding description."
    ),
    "events": (
        "Analyze the audio and describe the main sound events in chronological order. "
        "Output one event per line using this format:\nstart_sec - end_sec: event description\n"
        "Use plain decimal seconds for start_sec and end_sec. "
        "Cover the full timeline from beginning to end when possible."
    ),
}


Piece = tuple[str, bool]  # some text, and whether control tokens are recognised in it


class PromptError(AuricleError):
    """A prompt cannot be built from what was given."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the audio slot and of the two marks around a clip."""

    audio: int
    audio_start: int
    audio_end: int


@dataclass(frozen=True)
class Prompt:
    """What prefill reads: token ids and, at the audio slots, which audio row replaces the embedding."""

    ids: np.ndarray  # [T] int32
    audio_rows: np.ndarray  # [T] int32, row in the concatenated clips, -1 for a text token


def build_prompt(
    tokenizer: Tokenizer,
    special: SpecialIds,
    text: str,
    clip_tokens: Sequence[int],
    time_markers: bool,
    *,
    parse_special: bool = False,
) -> Prompt:
    """The default prompt around `text`, one span line a clip.

    `text` may come from anybody: what is written like a control token in it is text, unless `parse_special`. With that,
    as in the authors' code, control tokens are obeyed, and a `text` that holds spans itself is the whole prompt.
    `clip_tokens`: audio tokens of each clip, in order. The text before the first span, between spans and after the last
    one is tokenised in one call each, since BPE is not compositional. Raises PromptError for what is no text, and when
    spans and clips disagree.
    """
    if not isinstance(text, str):
        raise PromptError(f"the prompt is of type {type(text).__name__}; it must be a text (str)")
    parts = default_parts(text, len(clip_tokens), parse_special)
    if parse_special and _SPAN_PATTERN.search(text):
        parts = [[(part, True)] for part in _SPAN_PATTERN.split(text)]
    if len(parts) - 1 != len(clip_tokens):
        raise PromptError(
            f"the prompt has {len(parts) - 1} audio spans for {len(clip_tokens)} clips; give one span a clip"
        )
    digits = digit_ids(tokenizer) if time_markers and clip_tokens else None
    ids = tokenizer.encode_parts(parts[0])
    slots: list[int] = []  # positions of the audio slots
    for n_tokens, part in zip(clip_tokens, parts[1:], strict=True):
        span = audio_span(n_tokens, special, digits)
        slots += [len(ids) + at for at, token_id in enumerate(span[1:-1], 1) if token_id == special.audio]
        ids += span + tokenizer.encode_parts(part)
    audio_rows = np.full(len(ids), -1, np.int32)
    audio_rows[slots] = np.arange(len(slots), dtype=np.int32)
    return Prompt(np.array(ids, np.int32), audio_rows)


def default_parts(text: str, n_clips: int, parse_special: bool) -> list[list[Piece]]:
    """The conversation the authors' processor writes around a question: what is before the first of `n_clips` spans,
    between them, and after the last one."""
    question: list[Piece] = [(text, parse_special), (CLOSING, True)]
    if n_clips == 0:
        return [[(OPENING, True), *question]]
    return [[(OPENING, True)], *([("\n", True)] for _ in range(n_clips - 1)), [("\n", True), *question]]


def default_prompt(text: str) -> str:
    """That conversation as one text, without clips."""
    return f"{OPENING}{text}{CLOSING}"


def audio_span(n_tokens: int, special: SpecialIds, digits: Sequence[int] | None) -> list[int]:
    """Ids of one clip and its marks. With `digits` (ids of '0'..'9') the second follows each 25 audio tokens."""
    assert n_tokens > 0, f"{n_tokens=}"
    span = [special.audio_start]
    for at in range(0, n_tokens, TOKENS_PER_MARKER):
        n_slots = min(TOKENS_PER_MARKER, n_tokens - at)
        span += [special.audio] * n_slots
        if digits is not None and n_slots == TOKENS_PER_MARKER:
            second = (at // TOKENS_PER_MARKER + 1) * SECONDS_PER_MARKER
            span += [digits[int(digit)] for digit in str(second)]
    return [*span, special.audio_end]


def digit_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the tokens '0' to '9', which time markers consist of. Raises PromptError when the vocabulary lacks one."""
    ids = tuple(tokenizer.id_of(str(digit)) for digit in range(10))
    if None in ids:
        raise PromptError(f"the vocabulary has no token for the digit {ids.index(None)}; turn time markers off")
    return ids
