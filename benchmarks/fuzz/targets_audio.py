"""The audio readers: bytes to samples, one target a kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from auricle.engine.audio import AudioError, load_audio
from sounds import LOSSLESS, LOSSY, encode, synthetic

LONGEST = 60.0  # seconds


def check(data: bytes) -> None:
    try:
        samples = load_audio(bytes(data), max_seconds=LONGEST)
    except AudioError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from None
        return
    assert samples.dtype == np.float32, samples.dtype
    assert np.isfinite(samples).all(), samples


def _encoded(kind: str) -> Iterator[bytes]:
    for rate, channels in ((16_000, 1), (48_000, 2)):
        yield encode(synthetic(0.1, rate, channels), rate, kind)


TARGETS: dict[str, tuple[Callable[[], Iterator[bytes]], Callable[[bytes], None]]] = {
    kind: (partial(_encoded, kind), check) for kind in (*LOSSLESS, *LOSSY)
}
