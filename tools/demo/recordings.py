"""Makes the recordings of the demonstration again: `python -m auricle.tools.demo.recordings FSDD [FOLDER]`.

FSDD is the folder `recordings` of the Free Spoken Digit Dataset (CC BY-SA 4.0, Zohar Jackson and contributors). Each
result strings together recordings of one person that training never heard, with pauses of silence, at their own rate
of 8 kHz. Knows nothing of models.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from ...engine.outputs import replacing
from . import FOLDER

RATE = 8000  # samples a second, of every recording
LEAD_S = 0.3  # of silence before and after


@dataclass(frozen=True)
class Sequence:
    """What is strung together: recording `index` of each digit, with a pause before each but the first."""

    name: str
    speaker: str
    index: int
    digits: str
    pauses_s: tuple[float, ...]

    def samples(self, recordings: Path) -> np.ndarray:
        """int16 [n]."""
        parts = [silence(LEAD_S)]
        for digit, pause in zip(self.digits, (0.0, *self.pauses_s), strict=True):
            word, rate = soundfile.read(recordings / f"{digit}_{self.speaker}_{self.index}.wav", dtype="int16")
            assert rate == RATE, f"{rate=}"
            parts += [silence(pause), word]
        return np.concatenate([*parts, silence(LEAD_S)])


SEQUENCES = (
    Sequence("george", "george", 2, "31415", (0.25, 0.2, 0.3, 0.2)),
    Sequence("jackson", "jackson", 1, "2718281828", (0.3, 0.2, 0.6, 0.15, 0.2, 0.4, 0.2, 0.3, 0.15)),
    Sequence("yweweler", "yweweler", 3, "907", (0.35, 0.3)),
)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.int16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the recordings of the demonstration again.")
    parser.add_argument("recordings", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    a = parser.parse_args()
    for sequence in SEQUENCES:
        path = a.folder / f"{sequence.name}.flac"
        with replacing(path) as part:
            soundfile.write(part.path, sequence.samples(a.recordings), RATE, subtype="PCM_16", format="FLAC")
        print(f"{path}: {' '.join(sequence.digits)}")


if __name__ == "__main__":
    main()
