"""The audio readers: bytes to samples, one target a kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from auricle.engine.audio import AudioError, load_audio
from sounds import CONTAINERS, LOSSY, encode, in_wave, silent_mpeg, synthetic

LONGEST = 60.0  # seconds
_MORE_TYPES = {  # beside the usual one of each kind
    "wav": ("PCM_24", "FLOAT", "ULAW", "MS_ADPCM", "IMA_ADPCM", "GSM610"),
    "aiff": ("PCM_24", "FLOAT", "ALAW", "IMA_ADPCM", "DWVW_16"),
    "au": ("PCM_24", "DOUBLE", "ULAW", "G721_32", "G723_24"),
    "caf": ("PCM_24", "FLOAT", "ALAW", "ALAC_16"),
    "w64": ("PCM_24", "FLOAT", "MS_ADPCM", "GSM610"),
    "sph": ("PCM_24", "ULAW"),
    "voc": ("PCM_U8", "ALAW"),
    "flac": ("PCM_24",),
}


def check(data: bytes) -> None:
    message, samples = "", np.zeros(0, np.float32)
    try:
        samples = load_audio(bytes(data), max_seconds=LONGEST)
    except AudioError as error:
        message = str(error)
    assert "\n" not in message, message
    assert samples.dtype == np.float32, samples.dtype
    assert np.isfinite(samples).all(), samples


def _encoded(kind: str) -> Iterator[bytes]:
    stereo = encode(synthetic(0.1, 48_000, 2), 48_000, kind)
    mono = encode(synthetic(0.1, 8_000), 8_000, kind)
    yield from (stereo, mono, mono + stereo)
    for subtype in _MORE_TYPES.get(kind, ()):
        yield encode(synthetic(0.1, 8_000), 8_000, kind, subtype)


def _layers() -> Iterator[bytes]:
    for layer in (1, 2):
        yield silent_mpeg(layer, [2, 3, 4, 3, 2, 1])
        yield silent_mpeg(layer, [0] * 6)
    yield in_wave(encode(synthetic(0.1, 16_000), 16_000, "mp3"), 0x55, 16_000)


TARGETS: dict[str, tuple[Callable[[], Iterator[bytes]], Callable[[bytes], None]]] = {
    **{kind: (partial(_encoded, kind), check) for kind in (*CONTAINERS, *LOSSY)},
    "layers": (_layers, check),
}
