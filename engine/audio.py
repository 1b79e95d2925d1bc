"""What the model hears: audio from any source as float32 mono at 16 kHz, and its log-mel spectrogram (from mel.py).

Resampling is soxr's, block by block behind the decoder, so the peak of memory is little more than the result.
Knows nothing of containers (decode.py) or of models.
"""

from __future__ import annotations

from numbers import Real

import numpy as np

from .decode import AudioError, Source, Track, array_track, file_track
from .mel import HOP, SAMPLE_RATE, hann_window, log_mel, mel_filters, normalize_log_mel, raw_log_mel

__all__ = [
    "AudioError",
    "HOP",
    "SAMPLE_RATE",
    "hann_window",
    "load_audio",
    "log_mel",
    "mel_filters",
    "normalize_log_mel",
    "raw_log_mel",
]

_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000  # Hz, what is taken for a sample rate


def load_audio(source: Source, sample_rate: float | None = None, max_seconds: float | None = None) -> np.ndarray:
    """Decodes, mixes down (the mean of the channels) and resamples: float32 [n_samples] at 16 kHz.

    source: a path, the bytes of a file, a binary file object (read from where it stands to its end), or an array [n] or
    [n, n_channels] of floats, or of 8, 16 or 32-bit integers, which are scaled by their full range.
    sample_rate: of an array, in Hz, by default 16000; files state their own.
    max_seconds: longer audio is refused as soon as that much has been decoded.
    Raises AudioError for a source that is missing, unreadable, foreign, cut off, shorter than 10 ms or longer than
    max_seconds, and for samples that are not finite.
    """
    if isinstance(source, np.ndarray):
        track = array_track(source, SAMPLE_RATE if sample_rate is None else sample_rate)
    elif sample_rate is None:
        track = file_track(source)
    else:
        raise AudioError(f"sample_rate={sample_rate} goes with an array, a file states its own; leave it out")
    rate = track.sample_rate
    if not (isinstance(rate, Real) and _LOWEST_RATE <= rate <= _HIGHEST_RATE):
        allowed = f"{_LOWEST_RATE} to {_HIGHEST_RATE} Hz"
        raise AudioError(f"{track.name}: sample rate {rate!r} is not one of {allowed}; give the true one in Hz")
    return _resample(track, max_seconds)


def _resample(track: Track, max_seconds: float | None) -> np.ndarray:
    rate, n_read, pcm = track.sample_rate, 0, bytearray()
    resampler = None if rate == SAMPLE_RATE else _resampler(rate)
    for block in track.blocks:
        _check_finite(track, block, n_read)
        n_read += len(block)
        if max_seconds is not None and n_read > max_seconds * rate:
            raise AudioError(f"{track.name}: is longer than the limit of {max_seconds:g} s; cut it or raise the limit")
        pcm += (resampler.resample_chunk(block) if resampler else block).tobytes()
    if n_read == 0:
        raise AudioError(f"{track.name}: holds no audio samples; record or export it again")
    if resampler:
        pcm += resampler.resample_chunk(np.empty(0, np.float32), last=True).tobytes()
    samples = np.frombuffer(pcm, np.float32)
    if len(samples) <= HOP:
        length = f"{n_read / rate * 1000:.2f} ms, {len(samples)} samples at 16 kHz"
        raise AudioError(f"{track.name}: is too short ({length}); the model needs more than one frame of 10 ms")
    return samples


def _resampler(rate: float):
    import soxr

    return soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="VHQ")


def _check_finite(track: Track, block: np.ndarray, n_before: int) -> None:
    finite = np.isfinite(block)
    if not finite.all():
        seconds = (n_before + int(finite.argmin())) / track.sample_rate
        raise AudioError(f"{track.name}: the sample at {seconds:.4f} s is NaN or infinite; repair or export it again")
