"""Sounds without speech: coloured noise, mains hum, tones, clicks. Knows no recordings."""

from __future__ import annotations

import numpy as np

from ....engine.mel import SAMPLE_RATE

_N_BANK = 1 << 18  # 16.4 s of each colour, cut out at random places; it wraps around without a seam
_COLOURS = {"white": 0.0, "pink": -0.5, "brown": -1.0, "blue": 0.5}  # exponent of the amplitude over frequency


class NoiseBank:
    """Noise of unit power, prepared once since drawing it anew costs more than everything else."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.colours = [_coloured(rng, exponent) for exponent in _COLOURS.values()]

    def take(self, rng: np.random.Generator, n_samples: int) -> np.ndarray:
        """[n_samples] float32 of power 1: a colour or hum, or the sum of both."""
        kind = rng.random()
        if kind < 0.12:
            return hum(rng, n_samples)
        noise = self.colour(rng, n_samples)
        if kind < 0.25:
            return np.float32(0.8) * noise + np.float32(0.6) * hum(rng, n_samples)
        return noise

    def colour(self, rng: np.random.Generator, n_samples: int) -> np.ndarray:
        """[n_samples] float32 of power 1 in a random colour; slow swells in a third of the cases."""
        bank = self.colours[rng.choice(4, p=[0.4, 0.35, 0.15, 0.1])]
        at = int(rng.integers(_N_BANK))
        noise = bank[at : at + n_samples]
        if len(noise) < n_samples:
            noise = np.concatenate([noise, np.resize(bank, n_samples - len(noise))])
        if rng.random() < 0.33:
            points = np.arange(0, n_samples + SAMPLE_RATE, SAMPLE_RATE // 2)
            swell = np.interp(np.arange(n_samples), points, rng.uniform(0.5, 1.3, len(points))).astype(np.float32)
            return noise * swell
        return noise

    def speechless(self, rng: np.random.Generator, n_samples: int, augment: bool = True) -> np.ndarray:
        """[n_samples] float32 in which nobody speaks, at a random level; digital silence without `augment`."""
        kind = rng.random() if augment else 0.0
        if kind < 0.12:
            return np.zeros(n_samples, np.float32)
        sound = self.take(rng, n_samples)
        if kind > 0.6:
            other = [_tones, _clicks, _bursts][rng.integers(3)](rng, n_samples)
            sound = sound * np.float32(10 ** rng.uniform(-2.5, -0.5)) + other
        peak = np.float32(10 ** rng.uniform(-3, -0.1))
        return (sound * (peak / max(np.abs(sound).max(), 1e-9))).astype(np.float32)


def hum(rng: np.random.Generator, n_samples: int) -> np.ndarray:
    """Mains hum of 50 or 60 Hz with harmonics, power 1: [n_samples] float32."""
    n_period, turns = [(320, 1), (800, 3)][rng.integers(2)]
    phase = 2 * np.pi * turns * np.arange(n_period) / n_period
    harmonics = np.arange(1, 13)
    size = rng.uniform(0.1, 1, 12) / harmonics ** rng.uniform(0.3, 1.5)
    period = (size[:, None] * np.sin(harmonics[:, None] * phase + rng.uniform(0, 6.28, (12, 1)))).sum(0)
    return np.resize((period / np.sqrt(np.mean(period**2))).astype(np.float32), n_samples)


def _coloured(rng: np.random.Generator, exponent: float) -> np.ndarray:
    spectrum = np.fft.rfft(rng.standard_normal(_N_BANK))
    bins = np.arange(len(spectrum))
    lowest = 40 * _N_BANK // SAMPLE_RATE  # Hz; below, a falling colour would be nothing but rumble
    spectrum *= np.maximum(bins, lowest) ** exponent
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum)
    return (noise / noise.std()).astype(np.float32)


def _tones(rng: np.random.Generator, n_samples: int) -> np.ndarray:
    """Beeps and slides, on and off."""
    seconds = np.arange(n_samples) / SAMPLE_RATE
    sound = np.zeros(n_samples)
    for _ in range(int(rng.integers(1, 5))):
        start, length = rng.uniform(0, seconds[-1]), rng.uniform(0.05, 1.5)
        low, slide = rng.uniform(100, 4000), rng.choice([0, 1]) * rng.uniform(-800, 800)
        since = seconds - start
        edge = np.clip(np.minimum(since, length - since) / 0.005, 0, 1)
        sound += edge * np.sin(2 * np.pi * (low + slide * since / 2) * since) * rng.uniform(0.2, 1)
    return sound.astype(np.float32)


def _clicks(rng: np.random.Generator, n_samples: int) -> np.ndarray:
    """Knocks and clicks: short decaying bursts."""
    sound = np.zeros(n_samples, np.float32)
    for start in rng.integers(0, n_samples, int(rng.integers(1, 12))):
        n = min(int(rng.uniform(0.002, 0.06) * SAMPLE_RATE), n_samples - start)
        sound[start : start + n] += rng.standard_normal(n) * np.exp(-6 * np.arange(n) / n) * rng.uniform(0.2, 1)
    return sound


def _bursts(rng: np.random.Generator, n_samples: int) -> np.ndarray:
    """Rustle and breath: noise of a band, swelling as long as a word."""
    sound = np.zeros(n_samples, np.float32)
    for start in rng.integers(0, n_samples, int(rng.integers(1, 6))):
        n = min(int(rng.uniform(0.1, 0.7) * SAMPLE_RATE), n_samples - start)
        width = int(rng.integers(1, 12))
        burst = np.convolve(rng.standard_normal(n + width - 1), np.ones(width) / width, "valid")
        sound[start : start + n] += np.hanning(n) * burst * rng.uniform(0.2, 1)
    return sound
