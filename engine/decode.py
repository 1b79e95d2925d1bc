"""Opens audio in any form (path, bytes, file object, array) as recordings: blocks of float32 samples at their own rate.

What cannot be heard whole (but for 0.1 s) is an error or a warning, never a shorter result without a word. Knows
nothing of resampling, spectrograms or models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from .audio_bytes import AudioError, FileSource, open_bytes
from .container import find_parts, most_bytes
from .pcm import scale_integers
from .recording import Blocks, Part, block_frames

_MOST_ARRAY_CHANNELS = 64  # more means a transposed array

Source = str | os.PathLike | bytes | BinaryIO | np.ndarray


@dataclass(frozen=True)
class Track:
    """Opened audio: a name for messages, its recordings in order, and what to warn of. cut: a pipe was not read on."""

    name: str
    parts: list[Part]
    note: str | None = None
    cut: bool = False


def array_track(array: np.ndarray, sample_rate: float) -> Track:
    """An array [n] or [n, n_channels] as a track. Raises AudioError for another shape or a type without full scale."""
    name = f"array {array.dtype} {list(array.shape)}"
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: audio is [n_samples] or [n_samples, n_channels]; give one clip in that shape")
    n_channels = array.shape[1] if array.ndim == 2 else 1
    if not 1 <= n_channels <= _MOST_ARRAY_CHANNELS:
        raise AudioError(
            f"{name}: {n_channels} channels, not 1 to {_MOST_ARRAY_CHANNELS}; give [n_samples, n_channels]"
        )
    if array.dtype.kind not in "fiu" or (array.dtype.kind != "f" and array.dtype.itemsize > 4):
        raise AudioError(f"{name}: {array.dtype} samples have no full scale; give float32 from -1 to 1, or int16")
    samples = array.reshape(len(array), n_channels)
    return Track(name, [Part(sample_rate, n_channels, lambda: _array_blocks(samples), len(array), 0)])


@contextmanager
def file_track(source: FileSource, max_seconds: float | None = None) -> Iterator[Track]:
    """A path, the bytes of a file or a binary file object as a track, for as long as the context lasts.

    max_seconds: of a stream without end no more is read. Raises AudioError for what is missing, unreadable, empty,
    foreign or cut off; the last also while blocks are read.
    """
    with open_bytes(source, lambda name, head: most_bytes(name, head, max_seconds)) as data:
        parts, note = find_parts(data, max_seconds)
        yield Track(data.name, parts, note, data.cut)


def _array_blocks(array: np.ndarray) -> Blocks:
    step = block_frames(array.shape[1])
    for start in range(0, len(array), step):
        block = array[start : start + step]
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):  # becomes inf, which is reported with its position
                yield block.astype(np.float32)
        else:
            yield scale_integers(block)
