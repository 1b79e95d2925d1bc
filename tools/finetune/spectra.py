"""Changes of a log-mel that make more voices and conditions of one: masks, a warp of frequency, other dynamics.

Park et al., SpecAugment, 2019; Jaitly and Hinton, Vocal tract length perturbation, 2013. And the log-mel itself in
float32, faster than the engine's, from which it differs by rounding. Knows no files and no words.
"""

from __future__ import annotations

import numpy as np
import torch

from ...engine.mel import DYNAMIC_RANGE, HOP, N_FFT, hann_window, mel_filters, normalize_log_mel


class LogMel:
    """engine.mel.log_mel for training: float32 [n_samples] -> float32 [n_mels, n_samples // 160]."""

    def __init__(self) -> None:
        self._filters = torch.from_numpy(mel_filters().T.copy())  # [n_mels, 201]
        self._window = torch.from_numpy(hann_window())

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """More than 200 samples are needed."""
        x = torch.from_numpy(samples)
        spectrum = torch.stft(x, N_FFT, HOP, window=self._window, pad_mode="reflect", return_complex=True)
        power = torch.view_as_real(spectrum[:, : len(samples) // HOP]).square().sum(-1)  # [201, n_frames]
        raw = (self._filters @ power).clamp(min=1e-10).log10().numpy()
        return normalize_log_mel(raw, out=raw)


def warp_frequency(mel: np.ndarray, factor: float) -> np.ndarray:
    """Resonances times `factor`: each band of the log-mel [n_mels, n_frames] is read between two bands.

    On Slaney's scale, linear below 1 kHz and logarithmic above, as in engine/mel.py.
    """
    hertz = _band_hertz(mel.shape[0])
    at = np.interp(hertz / factor, hertz, np.arange(len(hertz)))
    low = np.minimum(at.astype(int), len(hertz) - 2)
    share = (at - low).astype(np.float32)[:, None]
    return mel[low] * (1 - share) + mel[low + 1] * share


def expand(mel: np.ndarray, factor: float) -> np.ndarray:
    """A log-mel [n_mels, n_frames] whose quieter frames lie `factor` times as far below the loudest, as of an
    expander, or below 1 a compressor: vowels with weaker fricatives. No band falls below the floor of a log-mel.
    """
    loudest = mel.max(axis=0)
    peak = loudest.max()
    return np.maximum(mel - np.float32(factor - 1) * (peak - loudest), peak - np.float32(DYNAMIC_RANGE / 4))


def mask(mel: np.ndarray, rng: np.random.Generator, n_bands: int = 18, n_frames: int = 12) -> np.ndarray:
    """Up to two bands and, a stretch for each two seconds, up to `n_frames` frames (10 ms each) become its mean."""
    mel = mel.copy()
    mean = mel.mean()
    for _ in range(rng.integers(3)):
        width = rng.integers(1, n_bands + 1)
        start = rng.integers(mel.shape[0] - width + 1)
        mel[start : start + width] = mean
    for _ in range(rng.integers(mel.shape[1] // 200 + 2)):
        width = min(int(rng.integers(1, n_frames + 1)), mel.shape[1])
        start = rng.integers(mel.shape[1] - width + 1)
        mel[:, start : start + width] = mean
    return mel


def _band_hertz(n_mels: int) -> np.ndarray:
    """Centres of the bands: [n_mels]."""
    top = 15 + 27 * np.log(8.0) / np.log(6.4)  # mel of 8 kHz
    mels = np.linspace(0, top, n_mels + 2)[1:-1]
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
