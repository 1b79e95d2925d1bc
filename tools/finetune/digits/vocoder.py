"""Pace, pitch and vocal tract of a voice, changed with numpy: a resampler and a phase vocoder.

Knows one signal at a time; random settings are augment.py's.
"""

from __future__ import annotations

import numpy as np

_N_FFT, _HOP = 512, 128  # 32 ms and 8 ms at 16 kHz
_N_LEAD = _N_FFT - _HOP  # so that the first sample already lies in four frames
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_N_FFT) / _N_FFT)).astype(np.float32)
_OMEGA = (2 * np.pi * _HOP / _N_FFT) * np.arange(_N_FFT // 2 + 1, dtype=np.float32)  # phase advance of a bin over a hop
_N_LIFTER = 30  # cepstral coefficients of the envelope: pitches below 530 Hz stay out of it
_MAX_NEPERS = 3.0


def resample(samples: np.ndarray, speed: float) -> np.ndarray:
    """Plays float32 [n] `speed` times as fast: [n / speed], pitch and formants move along.

    Cubic interpolation (Catmull-Rom): content below 4 kHz at 16 kHz keeps more than 40 dB to its images, and a filter
    against aliasing would cost more than the whole rest.
    """
    n_out = max(int(len(samples) / speed), 1)
    place = np.arange(n_out) * speed
    at = place.astype(np.int64)
    x = (place - at).astype(np.float32)
    padded = np.concatenate([samples[:1], samples, np.zeros(3, np.float32)])
    before, here, after, beyond = (padded[at + shift] for shift in range(4))
    slope = (after - before) * np.float32(0.5)
    next_slope = (beyond - here) * np.float32(0.5)
    rise = after - here
    return here + x * (slope + x * (3 * rise - 2 * slope - next_slope + x * (slope + next_slope - 2 * rise)))


def warp_voice(samples: np.ndarray, stretch: float, formant: float) -> np.ndarray:
    """Makes float32 [n] last `stretch` times as long and moves its formants by the factor `formant`; the pitch stays.

    Phase vocoder: magnitudes are interpolated between frames and phases advance as they do between the two frames.
    The envelope is the cepstrum's low end.
    """
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, (_N_LEAD, _N_FFT)), _N_FFT)[::_HOP]
    spectra = np.fft.rfft(frames * _HANN)  # [n_frames, n_bins]
    if formant != 1:
        spectra = spectra * _envelope_gain(np.abs(spectra), formant)
    if stretch != 1:
        spectra = _stretch(spectra, stretch)
    windowed = np.fft.irfft(spectra).astype(np.float32) * _HANN
    overlap = _N_FFT // _HOP
    out = np.zeros((len(windowed) + overlap - 1, _HOP), np.float32)
    for part in range(overlap):
        out[part : part + len(windowed)] += windowed[:, part * _HOP : (part + 1) * _HOP]
    start = round((_N_LEAD - _N_FFT // 2) * stretch) + _N_FFT // 2  # frames stay where their centres are
    n_out = max(int(len(samples) * stretch), 1)
    return out.ravel()[start : start + n_out] / np.float32(1.5)  # the sum of four squared windows


def _stretch(spectra: np.ndarray, stretch: float) -> np.ndarray:
    steps = np.arange(0, len(spectra) - 1, 1 / stretch)
    at = steps.astype(int)
    between = (steps - at).astype(np.float32)[:, None]
    magnitude, phase = np.abs(spectra), np.angle(spectra)
    advance = phase[at + 1] - phase[at] - _OMEGA
    advance -= 2 * np.pi * np.round(advance / (2 * np.pi))
    total = phase[0] + np.concatenate(
        [np.zeros((1, len(_OMEGA)), np.float32), np.cumsum(advance[:-1] + _OMEGA, axis=0)]
    )
    return ((1 - between) * magnitude[at] + between * magnitude[at + 1]) * np.exp(1j * total)


def _envelope_gain(magnitude: np.ndarray, formant: float) -> np.ndarray:
    """What moves the envelope of each frame along the frequency axis by `formant`: [n_frames, n_bins]."""
    cepstra = np.fft.irfft(np.log(magnitude + np.float32(1e-5)))
    cepstra[:, _N_LIFTER : _N_FFT - _N_LIFTER + 1] = 0
    envelope = np.fft.rfft(cepstra).real
    n_bins = envelope.shape[1]
    source = np.minimum(np.arange(n_bins) / formant, n_bins - 1.001)
    low = source.astype(int)
    part = (source - low).astype(np.float32)
    moved = envelope[:, low] * (1 - part) + envelope[:, low + 1] * part
    return np.exp(np.clip(moved - envelope, -_MAX_NEPERS, _MAX_NEPERS))
