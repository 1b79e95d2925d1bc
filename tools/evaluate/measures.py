"""Error rates and time errors over many answers. Knows texts and segments; no model, no audio, no files.

WER and CER are edits over reference words or characters, summed over all answers before they are divided (jiwer
aligns). The time error is the accumulated averaging shift (AAS) of Shi et al., "Achieving Timestamp Prediction While
Recognizing with Non-Autoregressive End-to-End ASR Model" (2023), the measure the authors of MOSS-Audio report: the mean
distance between a word's start, or end, and where it should be, here over all starts and ends of words that were heard
right, in milliseconds. (Some add a word's two distances up where we take their mean; the MOSS-Audio tables come without
a formula.) A start belongs to the first word of a segment and an end to its last, so segments may be sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.segments import Segment
from ...kernels.errors import AuricleError
from .text import Spelling

NEAR_MS = 150.0


class EvaluationError(AuricleError):
    """What cannot be measured, and why."""


@dataclass(frozen=True)
class Answer:
    """What should have been said and what was; times in seconds, none where there are no stamps."""

    reference: str
    hypothesis: str
    wanted: tuple[Segment, ...] = ()
    found: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Rates are shares, 1 is 100 %; None where nothing was there to be measured."""

    n_answers: int
    n_words: int
    substitutions: int
    deletions: int
    insertions: int
    wer: float | None
    cer: float | None
    exact: float
    n_boundaries: int  # of the references
    matched: float | None  # of them, those whose word was heard and has a time in the answer
    aas_ms: float | None
    p95_ms: float | None
    near: float | None  # share of the matched boundaries within NEAR_MS


@dataclass(frozen=True)
class Word:
    """A word, and when it starts and ends where a stamp says so, in seconds."""

    text: str
    start: float | None = None
    end: float | None = None


def score(answers: Sequence[Answer], spelling: Spelling | None = None) -> Scores:
    """All measures over `answers`. Raises EvaluationError when there are none, or jiwer is not installed."""
    if not answers:
        raise EvaluationError("there are no answers to score")
    jiwer, spelling = import_jiwer(), spelling or Spelling()
    references = [spelling.clean(answer.reference) for answer in answers]
    hypotheses = [spelling.clean(answer.hypothesis) for answer in answers]
    words = jiwer.process_words(references, hypotheses)
    letters = jiwer.process_characters(references, hypotheses)
    shifts = [shift for answer in answers for shift in boundary_shifts(answer, spelling)]
    n_boundaries = sum(2 * sum(bool(spelling.clean(s.text)) for s in answer.wanted) for answer in answers)
    return Scores(
        n_answers=len(answers),
        n_words=sum(len(text.split()) for text in references),
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        wer=divide(edits(words), sum(len(text.split()) for text in references)),
        cer=divide(edits(letters), sum(map(len, references))),
        exact=sum(r == h for r, h in zip(references, hypotheses, strict=True)) / len(answers),
        n_boundaries=n_boundaries,
        matched=divide(len(shifts), n_boundaries),
        aas_ms=divide(sum(shifts), len(shifts)),
        p95_ms=percentile(shifts, 95),
        near=divide(sum(shift <= NEAR_MS for shift in shifts), len(shifts)),
    )


def import_jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise EvaluationError("error rates need jiwer: pip install 'auricle[evaluate]'") from error
    return jiwer


def edits(output: Any) -> int:
    return output.substitutions + output.deletions + output.insertions


def divide(total: float, n: int) -> float | None:
    return total / n if n else None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that is not below `percent` of all."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1] if values else None


def boundary_shifts(answer: Answer, spelling: Spelling) -> list[float]:
    """The distance in milliseconds of each start and end that both sides have, of words that are aligned and equal."""
    wanted, found = words_of(answer.wanted, spelling), words_of(answer.found, spelling)
    if not wanted or not found:
        return []
    texts = [" ".join(word.text for word in words) for words in (wanted, found)]
    (chunks,) = import_jiwer().process_words(*texts).alignments
    pairs = [
        (wanted[chunk.ref_start_idx + i], found[chunk.hyp_start_idx + i])
        for chunk in chunks
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]
    times = [(want, have) for w, f in pairs for want, have in ((w.start, f.start), (w.end, f.end))]
    # Stamps have two decimals: what is a whole number of tenths of a millisecond shall not differ by a rounding.
    return [round(1000 * abs(want - have), 1) for want, have in times if want is not None and have is not None]


def words_of(segments: Iterable[Segment], spelling: Spelling) -> list[Word]:
    """The words of segments in order; the first of each knows its start, the last its end."""
    words: list[Word] = []
    for segment in segments:
        texts = spelling.clean(segment.text).split()
        last = len(texts) - 1
        words += [
            Word(text, segment.start if i == 0 else None, segment.end if i == last else None)
            for i, text in enumerate(texts)
        ]
    return words
