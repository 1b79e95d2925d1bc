"""Recordings of single digits: found by file name, split by index and speaker, brought to 16 kHz and trimmed.

Names are `{digit}_{speaker}_{index}.wav`, those of the Free Spoken Digit Dataset (Zohar Jackson and contributors,
CC BY-SA 4.0). Knows nothing of sequences or augmentation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ....engine.mel import SAMPLE_RATE
from ....kernels.errors import AuricleError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNHEARD_SPEAKER = "yweweler"  # never in training or validation

_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")
_INDICES = {"train": range(10, 1000), "validation": range(5, 10), "test": range(5)}
SPLITS = (*_INDICES, "unheard")

_WINDOW, _HOP = SAMPLE_RATE // 50, SAMPLE_RATE // 200  # 20 ms of energy, every 5 ms
_CLOSURE = 30  # such steps of 5 ms without sound, the longest inside a word
_KEPT = SAMPLE_RATE // 100  # 10 ms left around the word
_FADE = SAMPLE_RATE // 333  # 3 ms


class DigitsError(AuricleError):
    """The recordings of digits are missing, misnamed or too few."""


@dataclass(frozen=True)
class Recording:
    """One spoken digit, trimmed to the word."""

    digit: int
    speaker: str
    index: int
    samples: np.ndarray  # [n_samples] float32 at 16 kHz


def load_split(folder: Path, split: str, speaker: str | None = None) -> list[Recording]:
    """The recordings of a split, "train", "validation", "test" or "unheard", in the order of their names.

    Indices 0-4 are test, 5-9 validation, the rest training; one speaker is kept out of all three and is "unheard". The
    split of one `speaker`, whoever that is, goes by the index alone. Raises DigitsError for an unknown split and when
    the folder holds none of its recordings.
    """
    if split not in SPLITS:
        raise DigitsError(f"split {split!r} is unknown; take one of {', '.join(SPLITS)}")
    if split == "unheard":
        return load_recordings(folder, lambda who, _: who == UNHEARD_SPEAKER, "of the speaker kept out")

    def wanted(who: str, index: int) -> bool:
        return index in _INDICES[split] and (who == speaker if speaker else who != UNHEARD_SPEAKER)

    return load_recordings(folder, wanted, f"of the split {split!r}" + (f" by {speaker}" if speaker else ""))


def load_recordings(
    folder: Path, wanted: Callable[[str, int], bool] = lambda speaker, index: True, kind: str = ""
) -> list[Recording]:
    """All recordings in `folder` whose speaker and index are wanted. Raises DigitsError when there are none."""
    named = [(match, path) for path in sorted(folder.glob("*.wav")) if (match := _NAME.fullmatch(path.name))]
    found = [
        Recording(int(match[1]), match[2], int(match[3]), trim(read_16k(path)))
        for match, path in named
        if wanted(match[2], int(match[3]))
    ]
    if not found:
        what = f"no recordings {kind}".strip()
        raise DigitsError(f"{folder}: holds {what} named like 7_george_12.wav; get the Free Spoken Digit Dataset there")
    return found


def read_16k(path: Path) -> np.ndarray:
    """float32 mono [n_samples] at 16 kHz."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE, quality="HQ").astype(np.float32)


def trim(samples: np.ndarray) -> np.ndarray:
    """The word without the silence around it: 10 ms are left at each end and faded over 3 ms.

    A moment belongs to the word when its energy, smoothed over 20 ms, stands out; or that of its treble, if it is not
    as even as noise is: the fricatives of "six" may be 40 dB below its vowel, and 28 in the treble. What stands apart
    from the loudest moment by more than the closure of a "t" or "k" is a click.
    """
    level, treble = relative_db(samples), relative_db(emphasise(samples))
    hisses = stands_out(treble) & (treble > np.percentile(treble, 2) + 3)
    inside = np.flatnonzero(stands_out(level) | hisses)
    parts = np.split(inside, np.flatnonzero(np.diff(inside) > _CLOSURE) + 1)
    inside = next(part for part in parts if level.argmax() <= part[-1])
    # The energy of frame i is that of samples [i hop, i hop + window): the word starts late in its first frame.
    start = max(int(inside[0]) * _HOP + _WINDOW - _HOP - _KEPT, 0) if inside[0] else 0
    end = len(samples) if inside[-1] == len(level) - 1 else int(inside[-1]) * _HOP + _HOP + _KEPT
    word = samples[start:end].copy()
    ramp = np.linspace(0, 1, _FADE, dtype=np.float32)
    word[:_FADE] *= ramp
    word[-_FADE:] *= ramp[::-1]
    return word


def stands_out(level: np.ndarray) -> np.ndarray:
    """Where a level in dB below its peak, [n_frames], is within 35 dB of it and above the noise floor by 6 dB.

    The floor is the quieter end of the recording; one above -34 dB is taken for speech, since many recordings are cut
    at the word already.
    """
    floor = min(level[:3].mean(), level[-3:].mean())
    return level > (max(-35.0, floor + 6) if floor < -34 else -35.0)


def emphasise(samples: np.ndarray) -> np.ndarray:
    """Treble raised by 6 dB an octave, as linear prediction has it: x[n] - 0.95 x[n - 1]."""
    return np.append(samples[:1], samples[1:] - np.float32(0.95) * samples[:-1])


def relative_db(samples: np.ndarray) -> np.ndarray:
    """`energy_db` below its peak: [n_frames]."""
    level = energy_db(samples)
    return level - level.max()


def energy_db(samples: np.ndarray) -> np.ndarray:
    """Mean power in dB over 20 ms, every 5 ms: [n_frames]. Digital silence gives -140."""
    total = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    window = min(_WINDOW, len(samples))
    power = (total[window:] - total[:-window])[::_HOP] / window
    return 10 * np.log10(np.maximum(power, 1e-14))


def by_speaker(recordings: Sequence[Recording]) -> dict[str, list[Recording]]:
    """Recordings of each speaker, in order."""
    groups: dict[str, list[Recording]] = defaultdict(list)
    for recording in recordings:
        groups[recording.speaker].append(recording)
    return dict(groups)
