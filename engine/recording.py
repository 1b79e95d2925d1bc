"""One recording within a file: what its header says, and its samples as blocks. Knows no container.

A file may hold several, one after another; what is told of each is what a listener must know: whether something is
missing, and what was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .audio_bytes import AudioBytes, AudioError
from .pcm import SampleType

MOST_CHANNELS = 1024
_BLOCK = 1 << 20  # samples of all channels decoded at a time
CONVERT = "convert it first: ffmpeg -i INPUT -ac 1 -ar 16000 out.wav"
RESCUE = "copy it again, or keep what is there: ffmpeg -i INPUT -ac 1 -ar 16000 out.wav"

Blocks = Iterator[np.ndarray]  # float32 [n, n_channels]
Span = tuple[int, int]  # [start, stop) in bytes


@dataclass(frozen=True)
class Part:
    """A recording. `blocks()` decodes it from its beginning.

    rate: Hz. n_frames: samples a channel that must come, None where nothing states it. missing: times as long as what
    is there the recording is by its header, 1.0 where all is there. end: the position behind it. note: what to warn of.
    bytes_per_second: at most, of a file without end.
    """

    rate: float
    n_channels: int
    blocks: Callable[[], Blocks]
    n_frames: int | None
    end: int
    missing: float = 1.0
    note: str | None = None
    bytes_per_second: float = 1e6


def block_frames(n_channels: int) -> int:
    """Samples a channel to decode at a time."""
    return min(1 << 16, max(1, _BLOCK // n_channels))


def check_channels(name: str, n_channels: int, rate: float) -> None:
    if not 1 <= n_channels <= MOST_CHANNELS:
        raise AudioError(f"{name}: is damaged, its header states {n_channels} channels; {RESCUE}")
    if not 0 <= rate < 1e9:
        raise AudioError(f"{name}: is damaged, its header states a sample rate of {rate:g} Hz; {RESCUE}")


def pcm_part(
    data: AudioBytes,
    sample: SampleType,
    rate: float,
    n_channels: int,
    spans: Sequence[Span],
    end: int,
    missing: float = 1.0,
    note: str | None = None,
) -> Part:
    """Uncompressed samples that lie in `spans`, each of whole frames but for what its end cuts off."""
    check_channels(data.name, n_channels, rate)
    assert sample.known, f"{sample=}"
    frame = sample.n_bytes * n_channels

    def blocks() -> Blocks:
        step = block_frames(n_channels) * frame
        for start, stop in spans:
            for at in range(start, stop - frame + 1, step):
                content = data.read(at, min(step, (stop - at) // frame * frame))
                if len(content) < frame:  # the file has become shorter
                    return
                yield sample.decode(content[: len(content) // frame * frame]).reshape(-1, n_channels)

    n_frames = sum((stop - start) // frame for start, stop in spans)
    return Part(rate, n_channels, blocks, n_frames, end, missing, note, rate * frame)
