"""What the model hears: audio from any source as float32 mono at 16 kHz, and its log-mel spectrogram (from mel.py).

Resampling is soxr's, block by block behind the decoder, so the peak of memory is little more than the result.
Knows nothing of containers (decode.py) or of models.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from numbers import Real

import numpy as np

from .audio_bytes import AudioError, LengthError
from .decode import Source, Track, array_track, file_track
from .mel import HOP, SAMPLE_RATE, hann_window, log_mel, mel_filters, normalize_log_mel, raw_log_mel
from .recording import Part
from .streams import TOLERANCE, cut_off

__all__ = [
    "AudioError",
    "HOP",
    "LengthError",
    "SAMPLE_RATE",
    "count_samples",
    "hann_window",
    "load_audio",
    "log_mel",
    "mel_filters",
    "normalize_log_mel",
    "raw_log_mel",
]

log = logging.getLogger("auricle.audio")

_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000  # Hz, what is taken for a sample rate
_LOUDEST = 16.0  # of full scale: beyond it samples are of another scale
_CANCELS = 0.01  # of the energy that the mean of unlike channels keeps: below it they cancel each other
_HEARD = 0.1  # of the energy, what may be lost so without another look


def load_audio(source: Source, sample_rate: float | None = None, max_seconds: float | None = None) -> np.ndarray:
    """Decodes, mixes down (the mean of the channels) and resamples: float32 [n_samples] at 16 kHz.

    source: a path, the bytes of a file, a binary file object (read from where it stands to its end), or an array [n] or
    [n, n_channels] of floats, or of 8, 16 or 32-bit integers, which are scaled by their full range.
    sample_rate: of an array, in Hz, by default 16000; files state their own.
    max_seconds: longer audio is refused before it is decoded where its length is known, else as soon as that much has
    been decoded; no more of an endless stream is read.
    Channels that cancel each other out are heard by the loudest alone. What a header states wrongly, what is left out
    and what is damaged is warned of in the log.
    Raises AudioError for a source that is missing, unreadable, foreign, cut off or shorter than 10 ms, and for samples
    that are not finite or beyond 16 times full scale; LengthError for one longer than max_seconds.
    """
    if isinstance(source, np.ndarray):
        return _hear(array_track(source, SAMPLE_RATE if sample_rate is None else sample_rate), max_seconds)
    kind = type(source).__name__
    if hasattr(source, "__array__") or isinstance(source, (list, tuple)):
        how = "x.detach().cpu().numpy()" if hasattr(source, "detach") else "numpy.asarray(x, numpy.float32)"
        raise AudioError(f"{kind} is no audio; give {how}, a numpy array [n_samples] or [n_samples, n_channels]")
    is_file = isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read")
    if sample_rate is not None and is_file:
        raise AudioError(f"sample_rate={sample_rate} goes with an array, a file states its own; leave it out")
    with file_track(source, max_seconds) as track:
        return _hear(track, max_seconds)


def count_samples(source: Source) -> int | None:
    """How many samples at 16 kHz a file gives, from its headers alone; None where they do not tell.

    Raises AudioError as `load_audio`.
    """
    with file_track(source) as track:
        _check_headers(track, None)
        if any(part.n_frames is None for part in track.parts):
            return None
        return sum(int(part.n_frames * SAMPLE_RATE / part.rate) for part in track.parts)


def _hear(track: Track, max_seconds: float | None) -> np.ndarray:
    _check_headers(track, max_seconds)
    listener = _Listener(track, max_seconds)
    samples = listener.listen()
    if listener.cancelled > _HEARD * listener.energy:
        channel = int(np.argmax(listener.by_channel))
        log.warning("%s: its channels cancel each other out; channel %d alone is heard", track.name, channel + 1)
        samples = _Listener(track, max_seconds, channel).listen()
    for note in filter(None, [*dict.fromkeys(part.note for part in track.parts), track.note]):
        log.warning("%s: %s", track.name, note)
    if len(samples) <= HOP:
        seconds, n = listener.seconds, len(samples)
        if seconds == 0:
            raise AudioError(f"{track.name}: holds no audio samples; record or export it again")
        length = f"{seconds * 1000:.2f} ms, {n} samples at 16 kHz"
        raise AudioError(f"{track.name}: is too short ({length}); the model needs more than one frame of 10 ms")
    return samples


def _check_headers(track: Track, max_seconds: float | None) -> None:
    """Refuses absurd rates, and what is too long by its own header, before anything is decoded."""
    known = 0.0
    for part in track.parts:
        rate = part.rate
        if not (isinstance(rate, Real) and _LOWEST_RATE <= rate <= _HIGHEST_RATE):
            allowed = f"{_LOWEST_RATE} to {_HIGHEST_RATE} Hz"
            raise AudioError(f"{track.name}: sample rate {rate!r} is not one of {allowed}; give the true one in Hz")
        known += (part.n_frames or 0) / rate
    if max_seconds is not None and (known > max_seconds or track.cut):
        raise _too_long(track, max_seconds)


def _too_long(track: Track, max_seconds: float) -> LengthError:
    return LengthError(f"{track.name}: is longer than the limit of {max_seconds:g} s; cut it or raise the limit")


class _Listener:
    """Decodes a track once: mixes, checks and resamples, and takes note of what the mix has lost.

    seconds: decoded. energy, by_channel: of the channels before they are mixed; cancelled: where the mix is silent.
    """

    def __init__(self, track: Track, max_seconds: float | None, channel: int | None = None) -> None:
        """channel: the only one to hear, instead of the mean."""
        self._track, self._max_seconds, self._channel = track, max_seconds, channel
        self.seconds = self.energy = self.cancelled = 0.0
        self.by_channel = np.zeros(max(part.n_channels for part in track.parts))

    def listen(self) -> np.ndarray:
        """float32 [n_samples] at 16 kHz."""
        pcm = bytearray()
        for rate, parts in _runs(self._track.parts):
            resampler = None if rate == SAMPLE_RATE else _resampler(rate)
            for part in parts:
                for mono in self._mono_blocks(part):
                    pcm += (resampler.resample_chunk(mono) if resampler else mono).tobytes()
            if resampler:
                pcm += resampler.resample_chunk(np.empty(0, np.float32), last=True).tobytes()
        return np.frombuffer(pcm, np.float32)

    def _mono_blocks(self, part: Part):
        before, n_read = self.seconds, 0
        for block in part.blocks():
            self._check_samples(block, before + n_read / part.rate, part.rate)
            n_read += len(block)
            self.seconds = before + n_read / part.rate
            if self._max_seconds is not None and self.seconds > self._max_seconds:
                raise _too_long(self._track, self._max_seconds)
            yield self._mix_down(block)
        promised = max(part.n_frames or 0, n_read * part.missing)
        if (promised - n_read) / part.rate > TOLERANCE:
            raise AudioError(cut_off(self._track.name, before + n_read / part.rate, before + promised / part.rate))
        if part.n_frames and (n_read - part.n_frames) / part.rate > TOLERANCE and self._channel is None:
            seconds, stated = n_read / part.rate, part.n_frames / part.rate
            log.warning("%s: its header states %.2f s, all %.2f s are heard", self._track.name, stated, seconds)

    def _check_samples(self, block: np.ndarray, seconds: float, rate: float) -> None:
        if max(block.max(), -block.min()) <= _LOUDEST:
            return
        at, channel = np.argwhere(~(np.abs(block) <= _LOUDEST))[0]
        value, when = block[at, channel], f"{seconds + at / rate:.4f} s"
        if not np.isfinite(value):
            raise AudioError(f"{self._track.name}: the sample at {when} is NaN or infinite; repair or export it again")
        raise AudioError(
            f"{self._track.name}: the sample at {when} is {value:g}, where full scale is 1; "
            "divide by the true full scale (32768 for 16-bit values) or give integers as such"
        )

    def _mix_down(self, block: np.ndarray) -> np.ndarray:
        """[n, n_channels] -> [n]. By columns: six times faster than a mean over a short axis."""
        n_channels = block.shape[1]
        if n_channels == 1:
            return block[:, 0]
        if self._channel is not None:
            return block[:, min(self._channel, n_channels - 1)].copy()
        mono = block[:, 0].copy()
        for channel in block.T[1:]:
            mono += channel
        mono /= np.float32(n_channels)
        by_channel = np.array([float(channel @ channel) for channel in np.ascontiguousarray(block.T)])
        energy = by_channel.sum() / n_channels
        self.by_channel[:n_channels] += by_channel
        self.energy += energy
        if float(mono @ mono) < _CANCELS / n_channels * energy:
            self.cancelled += energy
        return mono


def _runs(parts: Sequence[Part]):
    """Neighbouring recordings of one rate together, since a resampler goes on from one to the next."""
    at = 0
    while at < len(parts):
        stop = next((n for n in range(at, len(parts)) if parts[n].rate != parts[at].rate), len(parts))
        yield parts[at].rate, parts[at:stop]
        at = stop


def _resampler(rate: float):
    import soxr

    return soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="VHQ")
