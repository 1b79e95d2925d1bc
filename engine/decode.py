"""Opens audio in any form (path, bytes, file object, array) as blocks of float32 mono samples at the source's own rate.

Decoding is libsndfile's (soundfile), a block at a time; an mp3 is in memory in its compressed form as well. What cannot
be heard whole (but for 0.1 s) is an error, never a shorter result. Knows nothing of resampling, spectrograms or models.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..kernels.errors import AuricleError
from .container import foreign_kind, ogg_fault, stated_ratio
from .mp3 import Mp3, frame_mp3, is_mp3

_BLOCK = 1 << 16  # frames decoded at a time
_HEAD_BYTES = 4096
_MAX_ARRAY_CHANNELS = 64  # more means a transposed array
UNKNOWN_LENGTH = 1 << 62  # frames; libsndfile gives the largest int64 where a header leaves the length out
_TOLERANCE = 0.1  # seconds that may be missing: encoders count a frame more or less
_CONVERT = "convert it first: ffmpeg -i INPUT -ac 1 -ar 16000 out.wav"
_RESCUE = "copy it again, or keep what is there: ffmpeg -i INPUT -ac 1 -ar 16000 out.wav"

Source = str | os.PathLike | bytes | BinaryIO | np.ndarray


class AudioError(AuricleError):
    """Audio that cannot be read, or that the model cannot take: which one, why, and the remedy."""


@dataclass(frozen=True)
class Track:
    """Opened audio: a name for messages, Hz, and an iterator over float32 mono blocks [n]."""

    name: str
    sample_rate: float
    blocks: Iterator[np.ndarray]


def array_track(array: np.ndarray, sample_rate: float) -> Track:
    """An array [n] or [n, n_channels] as a track. Raises AudioError for another shape or a type without full scale."""
    name = f"array {array.dtype} {list(array.shape)}"
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: audio is [n_samples] or [n_samples, n_channels]; give one clip in that shape")
    n_channels = array.shape[1] if array.ndim == 2 else 1
    if not 1 <= n_channels <= _MAX_ARRAY_CHANNELS:
        raise AudioError(f"{name}: {n_channels} channels, not 1 to {_MAX_ARRAY_CHANNELS}; give [n_samples, n_channels]")
    if array.dtype.kind not in "fiu" or (array.dtype.kind != "f" and array.dtype.itemsize > 4):
        raise AudioError(f"{name}: {array.dtype} samples have no full scale; give float32 from -1 to 1, or int16")
    return Track(name, sample_rate, _array_blocks(array.reshape(len(array), n_channels)))


def file_track(source: str | os.PathLike | bytes | BinaryIO) -> Track:
    """A path, the bytes of a file or a binary file object as a track.

    Raises AudioError for what is missing, unreadable, empty, foreign or cut off; the last also while blocks are read.
    """
    name, path, data = _identify(source)
    head = _read(name, path, _HEAD_BYTES) if data is None else data[:_HEAD_BYTES]
    if not head:
        raise AudioError(f"{name}: is empty (0 bytes); copy or record it again")
    fault = None
    if head.startswith(b"OggS"):
        fault = ogg_fault(_read(name, path) if data is None else data)
    elif is_mp3(head):
        data = _read(name, path) if data is None else data
        mp3 = frame_mp3(data)
        if mp3 is not None:  # else perhaps another kind behind an ID3 tag
            _check_mp3(name, mp3)
            data = mp3.stream
    sound = _open_sound(name, str(path) if data is None else io.BytesIO(data), head)
    return Track(name, sound.samplerate, _sound_blocks(name, sound, fault))


def _array_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    full_scale = 1.0 if array.dtype.kind == "f" else 2.0 ** (8 * array.dtype.itemsize - 1)
    rest = full_scale if array.dtype.kind == "u" else 0.0  # unsigned samples rest at half of their range
    for start in range(0, len(array), _BLOCK):
        with np.errstate(over="ignore"):  # becomes inf, which is reported with its position
            block = array[start : start + _BLOCK].astype(np.float32)
        yield _mix_down((block - np.float32(rest)) / np.float32(full_scale))


def _mix_down(block: np.ndarray) -> np.ndarray:
    """The mean of the channels: [n, n_channels] -> [n]. By columns: six times faster than a mean over a short axis."""
    mono = block[:, 0].copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for channel in block.T[1:]:
            mono += channel
    return mono / np.float32(block.shape[1])


def _identify(source: object) -> tuple[str, Path | None, bytes | None]:
    """A name for messages, and either the path of a regular file or the bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "audio bytes", None, bytes(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name = str(path) if str(path).isprintable() else repr(str(path))
        if _is_regular(name, path) and _is_unicode(str(path)):
            return name, path, None
        return name, None, _read(name, path)
    if isinstance(source, io.TextIOBase):
        raise AudioError("file object is open as text; open it in binary mode ('rb')")
    if hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes):
            raise AudioError(f"file object yields {type(data).__name__}, not bytes; open it in binary mode ('rb')")
        return "file object", None, data
    raise AudioError(f"{type(source).__name__} is no audio; give a path, bytes, a binary file object or a numpy array")


def _is_unicode(text: str) -> bool:
    """libsndfile's binding takes no other file names."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_regular(name: str, path: Path) -> bool:
    try:
        if path.is_dir():
            raise AudioError(f"{name}: is a directory; name an audio file")
        if not path.exists():
            raise AudioError(f"{name}: no such file; check the path")
        return path.is_file()
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror}); check the path") from error


def _read(name: str, path: Path, n_bytes: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(n_bytes)
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error


def _check_mp3(name: str, mp3: Mp3) -> None:
    seconds = mp3.seconds(mp3.n_frames)
    if mp3.changed:
        before, after = (f"{frame.sample_rate} Hz x {frame.n_channels}" for frame in (mp3.frame, mp3.changed))
        raise AudioError(f"{name}: changes from {before} to {after} channels after {seconds:.2f} s; {_CONVERT}")
    if mp3.n_promised is not None:
        _check_whole(name, seconds, mp3.seconds(mp3.n_promised))
    elif mp3.cut:
        raise AudioError(f"{name}: is cut off inside an mp3 frame after {seconds:.2f} s; {_RESCUE}")
    if mp3.n_frames == 0:
        raise AudioError(f"{name}: holds no audio samples; record or export it again")


def _check_whole(name: str, seconds: float, promised: float) -> None:
    if promised - seconds > _TOLERANCE:
        raise AudioError(
            f"{name}: is cut off or damaged, only {seconds:.2f} s of {promised:.2f} s can be decoded; {_RESCUE}"
        )


@cache
def _forward_reader() -> type:
    """soundfile.SoundFile without its seek after every read: a seek costs an mp3 decoder the bits of earlier frames."""
    import soundfile

    class ForwardReader(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return ForwardReader


def _open_sound(name: str, file: str | BinaryIO, head: bytes):
    """The file opened by soundfile."""
    import soundfile

    if isinstance(file, str) and file.lower().endswith(".raw"):
        raise AudioError(f"{name}: states no rate and no sample type; give an array with sample_rate, or a wav file")
    try:
        return _forward_reader()(file)
    except soundfile.LibsndfileError as error:
        kind = foreign_kind(head)
        if kind and kind.startswith("text"):
            message = f"{name}: is {kind}; give a wav, flac, ogg or mp3 file"
        elif kind:
            message = f"{name}: is {kind}, which cannot be read here; {_CONVERT}"
        else:
            reason = error.error_string.strip().rstrip(".")
            message = (
                f"{name}: is damaged or of an unknown kind ({reason}); give a wav, flac, ogg or mp3, or {_CONVERT}"
            )
        raise AudioError(message) from error


def _sound_blocks(name: str, sound, fault: str | None) -> Iterator[np.ndarray]:
    """Mono blocks of an open sound file [n]; raises AudioError at the end where less came than the file states."""
    import soundfile

    n_read, broken = 0, False
    with sound:
        rate, n_stated = sound.samplerate, sound.frames
        ratio = stated_ratio(sound.extra_info)
        while n_read < n_stated and not broken:
            try:  # never beyond the stated end: FLAC files may carry tags behind it
                block = sound.read(min(_BLOCK, n_stated - n_read), dtype="float32", always_2d=True)  # [n, n_channels]
            except soundfile.LibsndfileError:
                broken = True
                continue
            if len(block) == 0:
                break
            n_read += len(block)
            yield _mix_down(block)
    if n_stated < UNKNOWN_LENGTH:
        _check_whole(name, n_read / rate, max(n_stated, n_read * ratio) / rate)
    elif broken:
        fault = "is cut off or damaged"
    if fault:
        raise AudioError(f"{name}: {fault} after {n_read / rate:.2f} s; {_RESCUE}")
