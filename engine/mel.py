"""The log-mel spectrogram of 16 kHz audio, as Whisper's feature extractor computes it.

The last step takes the maximum of the whole clip, so it stands alone: `raw_log_mel` may be computed piece by piece
while audio arrives, `normalize_log_mel` needs the maximum. All is float64 inside, in slabs, so that memory stays small.
Knows nothing of files, of the encoder's windows or of models.
"""

from __future__ import annotations

import numpy as np

from .audio_bytes import AudioError

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples in a window, 25 ms
HOP = 160  # samples from frame to frame, 10 ms
N_MELS = 128
DYNAMIC_RANGE = 8.0  # decades of power below the clip's maximum, 80 dB

_SLAB = 512  # frames at a time: about 5 MB in flight
_ROWS = (
    8  # frames in one product with the filters: so few that BLAS starts no threads, which is slower on a busy machine
)
_FLOOR = 1e-10  # of mel power
# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1 kHz, then 27 steps from 1 kHz to 6.4 kHz, logarithmic
_LINEAR_HZ, _BREAK_HZ, _LOG_STEP = 200.0 / 3.0, 1000.0, np.log(6.4) / 27.0


def log_mel(samples: np.ndarray, filters: np.ndarray | None = None, window: np.ndarray | None = None) -> np.ndarray:
    """The spectrogram that the encoder takes, of one whole clip.

    samples: [n_samples] at 16 kHz. filters: [201, n_mels] and window: [400], of the model file where it has them.
    Returns float32 [n_mels, n_samples // 160]. Raises AudioError for fewer than 160 samples.
    """
    raw = raw_log_mel(samples, filters, window)
    return normalize_log_mel(raw, out=raw)


def raw_log_mel(
    samples: np.ndarray,
    filters: np.ndarray | None = None,
    window: np.ndarray | None = None,
    start: int = 0,
    stop: int | None = None,
) -> np.ndarray:
    """log10 of the mel power of a clip's frames `start` to `stop` (by default all), before the clip's maximum is taken.

    Frame t covers the samples 160 t - 200 to 160 t + 199; where a clip ends before that, the frame changes as it grows.
    Otherwise as `log_mel`. Returns float32 [n_mels, stop - start].
    """
    filters = mel_filters() if filters is None else filters
    window = hann_window() if window is None else window
    assert samples.ndim == 1, f"{samples.shape=}"
    assert filters.shape[:-1] == (N_FFT // 2 + 1,), f"{filters.shape=}"
    assert window.shape == (N_FFT,), f"{window.shape=}"
    n_frames = len(samples) // HOP
    if n_frames == 0:
        raise AudioError(f"{len(samples)} samples are too short; the model needs at least one frame of 10 ms ({HOP})")
    stop = n_frames if stop is None else stop
    assert 0 <= start <= stop <= n_frames, f"{start=} {stop=} {n_frames=}"

    filters, window = filters.astype(np.float64), window.astype(np.float64)
    mel = np.empty((filters.shape[1], stop - start), np.float32)
    for at in range(start, stop, _SLAB):
        end = min(at + _SLAB, stop)
        mel[:, at - start : end - start] = _log_power(_frames(samples, at, end) * window, filters).T
    return mel


def normalize_log_mel(raw: np.ndarray, maximum: float | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """Clips a raw log-mel 8 below the clip's maximum and scales it. Same shape, float32, in `out` where it is given.

    maximum: of the whole clip, where `raw` is only a piece of it. out: may be `raw` itself.
    """
    maximum = raw.max() if maximum is None else np.float32(maximum)
    mel = np.maximum(raw, maximum - np.float32(DYNAMIC_RANGE), out=out)
    mel += np.float32(4.0)
    mel /= np.float32(4.0)
    return mel


def mel_filters(n_mels: int = N_MELS, n_fft: int = N_FFT, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Triangles evenly spaced on Slaney's mel scale from 0 Hz to half the rate, each of area 1: float32 [201, n_mels].

    Source: M. Slaney, Auditory Toolbox (Interval Research 1998-010).
    """
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)[:, None]  # [n_bins, 1]
    edges = _mel_to_hertz(np.linspace(0.0, _hertz_to_mel(sample_rate / 2), n_mels + 2))
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling))  # [n_bins, n_mels]
    return (triangles * (2.0 / (right - left))).astype(np.float32)


def hann_window(n: int = N_FFT) -> np.ndarray:
    """The periodic Hann window: float32 [n]."""
    return (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(n) / n)).astype(np.float32)


def _frames(samples: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The samples around each frame, with the clip mirrored at both ends: float64 [stop - start, 400]."""
    first, last = start * HOP - N_FFT // 2, (stop - 1) * HOP + N_FFT // 2
    if first >= 0 and last <= len(samples):
        slab = samples[first:last]
    else:
        period = 2 * len(samples) - 2  # a clip shorter than half a window is mirrored again and again
        at = np.arange(first, last) % period
        slab = samples[np.minimum(at, period - at)]
    return np.lib.stride_tricks.sliding_window_view(slab.astype(np.float64), N_FFT)[::HOP]


def _log_power(frames: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """log10 of the mel power of windowed frames: [n_frames, 400] -> [n_frames, n_mels]."""
    spectrum = np.fft.rfft(frames)  # [n_frames, 201]
    power = np.zeros((-(-len(frames) // _ROWS), _ROWS, spectrum.shape[1]))
    power.reshape(-1, spectrum.shape[1])[: len(frames)] = spectrum.real**2 + spectrum.imag**2
    mel = (power @ filters).reshape(-1, filters.shape[1])[: len(frames)]
    return np.log10(np.maximum(mel, _FLOOR))


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return hertz / _LINEAR_HZ
    return _BREAK_HZ / _LINEAR_HZ + np.log(hertz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    above = mel - _BREAK_HZ / _LINEAR_HZ  # in mel; negative in the linear part
    return np.where(above < 0, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(_LOG_STEP * above))
