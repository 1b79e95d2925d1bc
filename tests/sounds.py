"""Sounds made for the tests, and the files that hold them."""

from __future__ import annotations

import io

import numpy as np
import soundfile
import soxr

from support import ROOT

JFK = ROOT / "tests" / "data" / "jfk.flac"
SAMPLE_RATE = 16_000
LOSSLESS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "aiff": ("AIFF", "PCM_16"), "w64": ("W64", "PCM_16")}
LOSSY = {"ogg": ("OGG", "VORBIS"), "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS")}
RATES = (8_000, 22_050, 44_100, 48_000)


def synthetic(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Tones that come and go, noise bursts, a quiet beginning and a loud end: float32 [n] or [n, channels], |x| < 1."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (180 * t + 90 * t**2)) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t))
    noise = rng.standard_normal(len(t)) * (np.sin(2 * np.pi * 1.3 * t) > 0.6)
    mono = (0.35 * tone + 0.05 * noise) * np.where(t < seconds / 2, 0.02, 1.0)
    if channels == 1:
        return mono.astype(np.float32)
    return np.stack([mono * (1 - 0.3 * c) for c in range(channels)], axis=1).astype(np.float32)


def encode(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None, **options) -> bytes:
    """The bytes of an audio file."""
    container, default = (LOSSLESS | LOSSY)[kind]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype or default, **options)
    return buffer.getvalue()


def expected(samples: np.ndarray, rate: int) -> np.ndarray:
    """16 kHz mono in one call each of numpy and soxr."""
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ")
