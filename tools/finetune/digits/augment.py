"""What makes one recording many: another vocal tract, pitch and pace (Voicing), another room and microphone (Channel).

Everything is numpy, cheap enough to be drawn anew for each training step. Knows nothing of digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....engine.mel import SAMPLE_RATE
from .noise import NoiseBank
from .vocoder import resample, warp_voice


@dataclass(frozen=True)
class Voicing:
    """How the words of one sequence are changed before they are strung together."""

    speed: float  # pitch, formants and pace together
    stretch: float  # duration alone
    formant: float  # formants alone
    level_db: float  # standard deviation of the words' levels among themselves

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Voicing:
        """Speed 0.8 to 1.25 in nine of ten; stretch or formants besides in half."""
        speed = np.exp(rng.uniform(np.log(0.8), np.log(1.25))) if rng.random() < 0.9 else 1.0
        stretch = np.exp(rng.uniform(np.log(0.8), np.log(1.25))) if rng.random() < 0.3 else 1.0
        formant = np.exp(rng.uniform(np.log(0.87), np.log(1.15))) if rng.random() < 0.35 else 1.0
        return cls(float(speed), float(stretch), float(formant), float(rng.choice([0.0, 2.0, 4.0])))

    def apply(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One word, float32 [n] to float32 [about n * stretch / speed]; each word strays a little from the setting."""
        if self.stretch != 1 or self.formant != 1:
            samples = warp_voice(samples, self.stretch * rng.uniform(0.96, 1.04), self.formant)
        samples = resample(samples, self.speed * rng.uniform(0.97, 1.03))
        return samples * np.float32(10 ** (rng.normal(0, self.level_db) / 20))


@dataclass(frozen=True)
class Channel:
    """Room, noise, microphone and line of one clip."""

    bank: NoiseBank
    noises: tuple[tuple[float, bool], ...]  # SNR in dB, and whether the noise passes the filter like the speech
    reverberation: float = 0.0  # RT60 in seconds, 0 for none
    band: tuple[float, float] = (0.0, 8000.0)  # Hz
    tilt_db: float = 0.0  # per octave around 1 kHz
    ripple_db: float = 0.0  # size of a random equaliser
    image: float = 0.0  # gain of the mirror image above 4 kHz
    gain_db: float = 0.0
    offset: float = 0.0
    wet: float = 0.5  # share of the room in the power

    @classmethod
    def draw(cls, rng: np.random.Generator, bank: NoiseBank) -> Channel:
        """A random one: three quarters have noise, a third reverberates, a third has a narrow band."""
        noises = [(rng.uniform(5, 40), rng.random() < 0.5)] if rng.random() < 0.75 else []
        if rng.random() < 0.2:
            noises.append((rng.uniform(30, 60), False))
        bands = [(300.0, 3400.0), (0.0, rng.uniform(3000, 4000)), (rng.uniform(60, 250), 8000.0), (100.0, 7000.0)]
        return cls(
            bank,
            tuple(noises),
            reverberation=rng.uniform(0.1, 0.6) if rng.random() < 0.35 else 0.0,
            band=bands[rng.integers(4)] if rng.random() < 0.4 else (0.0, 8000.0),
            tilt_db=rng.uniform(-3, 3) if rng.random() < 0.5 else 0.0,
            ripple_db=rng.uniform(0, 4) if rng.random() < 0.5 else 0.0,
            image=10 ** rng.uniform(-2, -0.3) if rng.random() < 0.25 else 0.0,
            gain_db=rng.uniform(-20, 6),
            offset=rng.uniform(-0.01, 0.01) if rng.random() < 0.1 else 0.0,
            wet=rng.uniform(0.1, 0.7),
        )

    def apply(self, samples: np.ndarray, times: Sequence[tuple[float, float]], rng: np.random.Generator) -> np.ndarray:
        """float32 [n] to float32 [n] within [-1, 1]; `times` in seconds say where speech is, which the SNR counts."""
        power = speech_power(samples, times)
        inside = [snr for snr, filtered in self.noises if filtered]
        for snr in inside:
            samples = samples + self._noise(rng, len(samples), power, snr)
        samples = self._filter(samples, rng)
        power = speech_power(samples, times)
        for snr, filtered in self.noises:
            if not filtered:
                samples = samples + self._noise(rng, len(samples), power, snr)
        samples = samples * np.float32(10 ** (self.gain_db / 20)) + np.float32(self.offset)
        return limit(samples)

    def _noise(self, rng: np.random.Generator, n_samples: int, power: float, snr_db: float) -> np.ndarray:
        return self.bank.take(rng, n_samples) * np.float32(np.sqrt(power * 10 ** (-snr_db / 10)))

    def _filter(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Equaliser, band, mirror image and room in one pass through the spectrum."""
        plain = self.band == (0.0, 8000.0) and not (self.tilt_db or self.ripple_db or self.image or self.reverberation)
        if plain:
            return samples
        n_tail = int(self.reverberation * SAMPLE_RATE) + 512  # keeps the convolution from wrapping around
        n_fft = good_length(len(samples) + n_tail)
        spectrum = np.fft.rfft(samples, n_fft)
        hertz = np.linspace(0, SAMPLE_RATE / 2, len(spectrum))
        gain = self._gain(hertz, rng)
        if self.image:
            # What a careless upsampler leaves above the old Nyquist frequency; recordings at 8 kHz have nothing there.
            mirrored = spectrum[::-1].conj() * np.where(
                (hertz > 4000) & (hertz < 7000), np.float32(self.image), np.float32(0)
            )
            spectrum = spectrum + mirrored
        spectrum *= gain
        if self.reverberation:
            spectrum *= np.fft.rfft(impulse_response(rng, self.reverberation, self.wet), n_fft)
        return np.fft.irfft(spectrum, n_fft)[: len(samples)].astype(np.float32)

    def _gain(self, hertz: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Amplitude over frequency; known at 64 points and interpolated, since the slopes are gentle."""
        points = np.linspace(0, SAMPLE_RATE / 2, 129)
        octaves = np.log2(np.maximum(points, 60) / 1000)
        ripple = np.interp(octaves, np.linspace(-4, 3, 8), rng.normal(0, 1, 8)) * self.ripple_db
        low, high = self.band
        below = 12 * np.log2(np.maximum(low, 30) / np.maximum(points, 30)).clip(0)  # dB, 12 an octave
        above = 60 * np.log2(np.maximum(points, 1) / high).clip(0)
        decibels = np.clip(self.tilt_db * octaves + ripple, -24, 24) - below.clip(0, 40) - above.clip(0, 60)
        return np.interp(hertz, points, 10 ** (decibels / 20)).astype(np.float32)


def limit(samples: np.ndarray) -> np.ndarray:
    """Quieter as a whole where it would be louder than full scale: float32."""
    peak = float(np.abs(samples).max())
    return (samples * np.float32(0.99 / peak) if peak > 0.99 else samples).astype(np.float32, copy=False)


def speech_power(samples: np.ndarray, times: Sequence[tuple[float, float]]) -> float:
    """Mean power inside the words."""
    parts = [samples[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)] for start, end in times]
    return float(sum(np.dot(part, part) for part in parts) / max(sum(map(len, parts)), 1))


def impulse_response(rng: np.random.Generator, seconds: float, wet: float) -> np.ndarray:
    """Direct sound and exponentially decaying noise after it: -60 dB at `seconds`; `wet` is its share of the power."""
    n = int(seconds * SAMPLE_RATE)
    delay = int(rng.uniform(0.001, 0.012) * SAMPLE_RATE)
    tail = rng.standard_normal(n, np.float32) * np.exp(np.linspace(0, -np.log(1000), n, dtype=np.float32))
    tail[:delay] = 0
    response = tail * np.float32(np.sqrt(wet / np.dot(tail, tail)))
    response[0] = np.sqrt(1 - wet)
    return response


def good_length(n: int) -> int:
    """The smallest length from n on of which the FFT is fast: a power of two times 1, 9/8, 5/4, 3/2 or 7/4, even."""
    power = 1 << max(n - 1, 16).bit_length() - 1
    return next(size for part in (8, 9, 10, 12, 14, 16) if (size := power * part // 8) >= n)
