"""Compressed sound through libsndfile: opened without a name, read forward only, its complaints kept from the terminal.

Knows no container.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import BinaryIO

from .audio_bytes import AudioBytes, AudioError, SpanFile
from .recording import CONVERT, RESCUE, Blocks, Part, block_frames, check_channels

UNKNOWN_LENGTH = 1 << 62  # frames; libsndfile gives the largest int64 where a header leaves the length out

Opener = Callable[[], BinaryIO]


def coded_part(
    data: AudioBytes,
    start: int,
    stop: int,
    prefix: bytes,
    end: int,
    missing: float = 1.0,
    note: str | None = None,
    n_real: int | None = None,
) -> Part:
    """What libsndfile reads from `prefix` and the bytes [start, stop).

    n_real: samples a channel that are sound, where the last block is filled up. Raises AudioError for what it cannot
    read.
    """

    def opener() -> BinaryIO:
        return SpanFile(data, start, stop, prefix)

    with open_sound(data.name, opener) as sound:
        rate, n_channels, n_frames = sound.samplerate, sound.channels, sound.frames
    check_channels(data.name, n_channels, rate)
    n_real = n_frames if n_real is None else min(n_real, n_frames)
    stated = n_real if n_real < UNKNOWN_LENGTH else None

    def blocks() -> Blocks:
        n_read = 0
        for block in sound_blocks(data.name, opener, rate, stated):
            yield block[: n_real - n_read]
            n_read += len(block)
            if n_read >= n_real:
                return

    return Part(rate, n_channels, blocks, stated, end, missing, note, 8.0 * rate * n_channels)


def open_sound(name: str, opener: Opener):
    """The file opened by soundfile. Raises AudioError for what it cannot read."""
    import soundfile

    try:
        return _forward_reader()(opener())
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise AudioError(
            f"{name}: is damaged or of an unknown kind ({reason}); give a wav, flac, ogg or mp3, or {CONVERT}"
        ) from error


def sound_blocks(name: str, opener: Opener, rate: float, n_stated: int | None) -> Blocks:
    """All blocks [n, n_channels] of a sound file, also beyond the length that it states.

    Where it breaks off without one, AudioError; whoever counts says what is missing of a stated one. No block reaches
    over the stated end, since tags may stand behind it.
    """
    import soundfile

    n_read = 0
    with open_sound(name, opener) as sound:
        most = block_frames(sound.channels)
        while True:
            try:
                left = n_stated - n_read if n_stated and n_stated > n_read else most
                block = sound.read(min(most, left), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                if n_stated is not None:
                    return
                raise AudioError(f"{name}: is cut off or damaged after {n_read / rate:.2f} s; {RESCUE}") from error
            if len(block) == 0:
                return
            n_read += len(block)
            yield block


@cache
def _forward_reader() -> type:
    """soundfile.SoundFile without its seek after every read: a seek costs an mp3 decoder the bits of earlier frames."""
    import soundfile

    class ForwardReader(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return ForwardReader


@dataclass
class Complaints:
    """What a decoder has written to stderr while it was hushed."""

    lines: list[str] = field(default_factory=list)


_stderr_lock = threading.Lock()


@contextmanager
def hushed(complaints: Complaints, mark: re.Pattern) -> Iterator[None]:
    """Keeps lines in which `mark` is found from the process's stderr; all others go on to it a little later.

    The MPEG decoder within libsndfile writes there, and nothing can tell it not to.
    """
    with _stderr_lock:
        try:
            kept = os.dup(2)
        except OSError:  # there is no stderr to keep clean
            yield
            return
        with tempfile.TemporaryFile() as written:
            os.dup2(written.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                _pass_on(written, complaints, mark)


def _pass_on(written: BinaryIO, complaints: Complaints, mark: re.Pattern) -> None:
    written.seek(0)
    for line in written.read().decode(errors="replace").splitlines(keepends=True):
        if mark.search(line):
            complaints.lines.append(line)
        elif line.strip():
            with suppress(OSError):
                os.write(2, line.encode())
