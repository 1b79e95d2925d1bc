"""FLAC, Ogg and MPEG streams as recordings: where each begins and ends, whether it is whole, and how it is decoded.

libsndfile hears only the first of joined streams, guesses the length of MPEG audio, and takes a shortened file for
whole. Layout of Ogg pages: RFC 3533; of FLAC: RFC 9639.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from .audio_bytes import AudioBytes, AudioError, SpanFile
from .codec import Complaints, coded_part, hushed, open_sound, sound_blocks
from .mpeg import Stream, frame_mpeg, looks_like_mpeg
from .recording import RESCUE, Blocks, Part
from .tags import is_text, skip_tags

log = logging.getLogger("auricle.audio")

TOLERANCE = 0.1  # seconds that may be missing: encoders count a frame more or less
_SAMPLED = 1 << 20  # bytes by which MPEG audio is recognised
_MPEG_RATE = 100_000  # bytes a second at most
_MPEG_MARK = re.compile(r"libmpg123|^(?:Note|Warning|Error): ")  # what its decoder writes to stderr
_FLAC_STARTS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
_OGG_HEADER = 27
_OGG_FIRST, _OGG_LAST = 2, 4  # flags of the first and the last page of a recording


def flac_parts(data: AudioBytes, at: int) -> list[Part]:
    """One FLAC stream, up to another one or a tag. Its stated length is checked, and not believed."""
    head = data.read(at, 42)
    if len(head) < 42 or head[4] & 0x7F or head[7] != 34:
        raise AudioError(f"{data.name}: is cut off or damaged inside its FLAC header; {RESCUE}")
    found = (data.find(magic, at + 42, data.size) for magic in _FLAC_STARTS)
    stop = min((n for n in found if n >= 0), default=data.size)
    n_stated = int.from_bytes(head[21:26], "big") & (1 << 36) - 1
    open_length = head[:21] + bytes([head[21] & 0xF0]) + bytes(4) + head[26:]
    part = coded_part(data, at + 42, stop, open_length, stop)

    def blocks() -> Blocks:
        return sound_blocks(data.name, lambda: SpanFile(data, at + 42, stop, open_length), part.rate, n_stated or None)

    return [replace(part, blocks=blocks, n_frames=n_stated or None)]


@dataclass(frozen=True)
class _Page:
    start: int
    stop: int
    flags: int
    serial: bytes
    number: int


def ogg_parts(data: AudioBytes, at: int) -> list[Part]:
    """The recording that begins here; others may follow it in the chain."""
    start, end, in_audio, note = at, at, False, None
    numbers: dict[bytes, int] = {}
    last: _Page | None = None
    for page in _pages(data, at):
        if page.start > end:
            note = f"{page.start - end} bytes between its Ogg pages are none"
        if page.flags & _OGG_FIRST and in_audio:
            break
        in_audio = not page.flags & _OGG_FIRST
        if numbers.get(page.serial, page.number - 1) + 1 != page.number:
            note = f"Ogg pages are missing before number {page.number}"
        numbers[page.serial] = page.number
        last, end = page, page.stop
    if last is None or (end > data.size and not data.cut):
        raise AudioError(f"{data.name}: is cut off inside an Ogg page; {RESCUE}")
    if not last.flags & _OGG_LAST:
        note = note or "its last Ogg page is missing, so it may be cut off"
    return [coded_part(data, start, min(end, data.size), b"", end, note=note)]


def _pages(data: AudioBytes, at: int) -> Iterator[_Page]:
    """Every page from `at` on; the last may reach over the end."""
    while at < data.size:
        head = data.read(at, _OGG_HEADER + 255)
        if not head.startswith(b"OggS"):
            at = data.find(b"OggS\x00", at, data.size)
            if at < 0:
                return
            continue
        table = head[_OGG_HEADER : _OGG_HEADER + head[26]] if len(head) >= _OGG_HEADER else b""
        whole = len(head) >= _OGG_HEADER and len(table) == head[26]
        stop = at + _OGG_HEADER + len(table) + sum(table) if whole else data.size + 1
        flags = head[5] if len(head) > 5 else 0
        yield _Page(at, stop, flags, head[14:18], int.from_bytes(head[18:22], "little"))
        at = stop


def is_mpeg(data: AudioBytes, at: int) -> bool:
    return looks_like_mpeg(data.read(at, _SAMPLED), 0, whole=data.size - at <= _SAMPLED)


def mpeg_parts(
    data: AudioBytes, start: int, stop: int | None = None, end: int | None = None, max_seconds: float | None = None
) -> list[Part]:
    """All MPEG audio within [start, stop): a recording for each change of its rate or channels.

    end: the position behind the container that holds it. Raises AudioError where it is cut off or its own length header
    promises more.
    """
    stop = data.size if stop is None else stop
    if max_seconds is not None:
        stop = min(stop, start + int(max_seconds * _MPEG_RATE) + _SAMPLED)
    content = data.read(start, stop - start)
    streams = frame_mpeg(content)
    if not streams:
        raise AudioError(f"{data.name}: holds no MPEG audio; record or export it again")
    if not data.cut and (end is not None or stop == data.size):
        for stream in streams:
            _check_whole(data.name, stream)
    parts = [_mpeg_part(data, content, stream, end or data.size) for stream in streams if stream.n_frames]
    if not parts:
        raise AudioError(f"{data.name}: holds no audio samples; record or export it again")
    return parts


def _check_whole(name: str, stream: Stream) -> None:
    seconds, promised = (stream.seconds(n) for n in (stream.n_frames, stream.n_promised))
    if promised - seconds > TOLERANCE:
        raise AudioError(cut_off(name, seconds, promised))
    if stream.cut and not stream.n_promised:
        raise AudioError(f"{name}: is cut off inside an mp3 frame after {seconds:.2f} s; {RESCUE}")


def cut_off(name: str, seconds: float, promised: float) -> str:
    return f"{name}: is cut off or damaged, only {seconds:.2f} s of {promised:.2f} s can be decoded; {RESCUE}"


def _mpeg_part(data: AudioBytes, content: bytes, stream: Stream, end: int) -> Part:
    rate, n_frames = stream.frame.sample_rate, stream.n_frames * stream.frame.n_samples
    audio = AudioBytes.of(data.name, stream.audio(content))
    first = stream.spans[0].stop - stream.spans[0].start
    claim = 0 if stream.states_length else 2 * stream.n_frames * first + 128

    def opener() -> BinaryIO:
        return _Claiming(audio, 0, audio.size, claim=claim)

    if stream.states_length:  # less what its length header says to trim at the ends
        with hushed(Complaints(), _MPEG_MARK), open_sound(data.name, opener) as sound:
            n_frames = min(n_frames, sound.frames)

    def blocks() -> Blocks:
        complaints, n_read = Complaints(), 0
        decoded = sound_blocks(data.name, opener, rate, n_frames)
        while True:
            with hushed(complaints, _MPEG_MARK):
                block = next(decoded, None)
            if block is None:
                break
            n_read += len(block)
            yield block
        if complaints.lines:
            log.warning("%s: is damaged, its decoder complains %d times", data.name, len(complaints.lines))

    n_skipped = sum(_n_foreign(data, content, gap) for gap in stream.gaps)
    if (
        stream.gaps
        and stream.gaps[0].start == 0
        and n_skipped < 2 * max(span.stop - span.start for span in stream.spans)
    ):
        n_skipped = 0  # the end of a frame whose beginning is not there
    lost = stream.seconds(n_skipped / max(1.0, stream.n_bytes / stream.n_frames))
    note = f"{n_skipped} bytes between its frames are no MPEG audio, about {lost:.1f} s" if lost > TOLERANCE else None
    return Part(rate, stream.frame.n_channels, blocks, n_frames, end, note=note, bytes_per_second=_MPEG_RATE)


def _n_foreign(data: AudioBytes, content: bytes, gap: slice) -> int:
    """Bytes of a gap that are neither tags, nor text, nor zeros."""
    piece = AudioBytes.of(data.name, content[gap])
    at = skip_tags(piece, 0)
    rest = content[gap][at:].strip(b"\0")
    return 0 if is_text(rest) else len(rest)


class _Claiming(SpanFile):
    """A file that the MPEG decoder takes for longer than it is.

    Without a length header it guesses from the size and the first frame, and hears no more. Where it looks for a tag,
    at the end that is none, there are zeros.
    """

    def readinto(self, buffer) -> int:
        if self._claim and self._at >= self._size + self._claim - 128:
            buffer[:] = bytes(len(buffer))
            self._at += len(buffer)
            return len(buffer)
        return super().readinto(buffer)
