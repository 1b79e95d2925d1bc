"""Digits spoken by espeak-ng in many voices: `python -m auricle.tools.finetune.digits.voices OUT`.

Writes `{digit}_{voice}_{index}.wav` at 16 kHz, the same files for the same seed and version of espeak-ng.
Knows nothing of how the recordings are used.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ....engine.mel import SAMPLE_RATE
from ....engine.outputs import replacing
from ....kernels.display import show
from ....kernels.errors import AuricleError
from ...process import standard_streams
from .recordings import WORDS

LANGUAGES = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5")
ENDINGS = (".", ",", "?", "!")  # each has an intonation of its own


class VoiceError(AuricleError):
    """Synthetic voices cannot be made."""


@dataclass(frozen=True)
class Voice:
    """One setting of espeak-ng. Pitch 0 to 99, speed in words a minute."""

    name: str
    language: str
    pitch: int
    speed: int


def choose_voices(n_voices: int, seed: int) -> list[Voice]:
    """Languages and variants in turn, with a drawn pitch and speed; every voice is another setting."""
    rng = np.random.default_rng(seed)
    pairs = [(language, variant) for language in LANGUAGES for variant in VARIANTS]
    rng.shuffle(pairs)
    chosen = [pairs[at % len(pairs)] for at in range(n_voices)]
    return [
        Voice(f"espeak{at:03d}", f"{language}+{variant}", int(rng.integers(20, 81)), int(rng.integers(110, 221)))
        for at, (language, variant) in enumerate(chosen)
    ]


def write_voices(folder: Path, n_voices: int = 52, n_renderings: int = 3, seed: int = 0) -> int:
    """Writes every digit in every voice `n_renderings` times; returns the number of files.

    The renderings of a word differ in intonation and a little in pitch and speed. Raises VoiceError without espeak-ng.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise VoiceError("espeak-ng is not installed; install it (apt-get install espeak-ng) or train without voices")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed + 1)
    for voice in choose_voices(n_voices, seed):
        for index in range(n_renderings):
            for digit, word in enumerate(WORDS):
                ending = ENDINGS[(index + digit) % len(ENDINGS)]
                pitch = int(np.clip(voice.pitch + rng.integers(-8, 9), 0, 99))
                speed = int(voice.speed * rng.uniform(0.9, 1.1))
                samples = speak(program, f"{word}{ending}", voice.language, pitch, speed)
                with replacing(folder / f"{digit}_{voice.name}_{index}.wav") as part:
                    soundfile.write(part.path, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")
    return n_voices * n_renderings * len(WORDS)


def speak(program: str, text: str, language: str, pitch: int, speed: int) -> np.ndarray:
    """float32 mono [n_samples] at 16 kHz. Raises VoiceError when espeak-ng refuses."""
    command = [program, "-v", language, "-p", str(pitch), "-s", str(speed), "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or len(done.stdout) < 1000:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise VoiceError(f"espeak-ng cannot speak as {language}: {reason[:1]}; install all of its voices")
    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    return soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ") * np.float32(0.7)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Spoken digits in synthetic voices, by espeak-ng.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--voices", type=int, default=52)
    parser.add_argument("--renderings", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        n_files = write_voices(options.folder, options.voices, options.renderings, options.seed)
    except AuricleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{n_files} recordings of {options.voices} voices in {show(options.folder)}")
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
