"""MPEG audio framing, layers I to III: finds the frames of a stream and counts them.

A decoder believes the Xing/Info header of a file, or guesses the length from the file's size where there is none. Both
are wrong for files that were cut, joined, recorded from a stream or given large tags, and audio is lost without a word.
Layout of a frame header: ISO/IEC 11172-3 and 13818-3; of the length headers: as LAME (Xing, Info) and Fraunhofer (VBRI)
write them. Knows nothing of decoding or of errors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice

# kbit/s by bitrate index for MPEG-1 and by layer, then for MPEG-2 and 2.5; index 0 leaves the length open ("free")
_BITRATES = {
    (True, 1): tuple(range(0, 449, 32)),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SAMPLE_RATES = (44_100, 48_000, 32_000)  # of MPEG-1
_RATE_DIVISORS = {3: 1, 2: 2, 0: 4}  # by version bits: MPEG-1, 2, 2.5
_HAS_FRAMES, _HAS_BYTES = 1, 2  # flags of an Info header
_CANDIDATE = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]", re.DOTALL)  # what may be a header, but for some of its bits
_SMALLEST_FREE, _LARGEST_FREE = 24, 1 << 13  # bytes of a frame of free bit rate
_MOST_MARKS = 64  # headers looked at for its end
_SURE = 3  # frames of another kind in a row that are no accident within MPEG audio
_MANY = 12  # frames that are none where nothing else says that it is MPEG audio: tables of numbers may hold fewer


@dataclass(frozen=True)
class Frame:
    """What one frame header says. `n_bytes` counts the header too; `n_side` is of the side information behind it."""

    layer: int
    n_bytes: int
    n_samples: int
    sample_rate: int
    n_channels: int
    n_side: int

    @property
    def kind(self) -> tuple[int, int, int, int]:
        """What stays the same within one stream."""
        return self.layer, self.sample_rate, self.n_channels, self.n_samples


@dataclass
class Stream:
    """Frames of one kind in a row, each a slice of the file.

    n_promised: frames that the file's own length headers state, 0 without one. info: the first of those headers. cut:
    the file ends inside a frame. gaps: bytes between and around the frames that belong to none.
    """

    frame: Frame
    spans: list[slice] = field(default_factory=list)
    gaps: list[slice] = field(default_factory=list)
    n_promised: int = 0
    info: bytes | None = None
    cut: bool = False

    @property
    def n_frames(self) -> int:
        return len(self.spans)

    @property
    def n_bytes(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def seconds(self, n_frames: float) -> float:
        """The duration of a number of frames."""
        return n_frames * self.frame.n_samples / self.frame.sample_rate

    def audio(self, data: bytes) -> bytes:
        """The audio frames alone, behind the file's own Info header if it has one, which states their true number."""
        frames = b"".join(data[span] for span in self.spans)
        return _info_frame(self.info, self.n_frames, len(frames)) + frames if self.states_length else frames

    @property
    def states_length(self) -> bool:
        """Whether `audio` tells a decoder its length; if not, decoders guess it from the size."""
        return self.info is not None and _states_both(self.info)


def frame_mpeg(data: bytes, start: int = 0) -> list[Stream]:
    """Walks over the frames of a file, past tags, foreign bytes and length headers: one stream a kind, in order."""
    streams: list[Stream] = []
    end = start
    for pos, frame in _walk(data, start):
        if not streams or streams[-1].frame.kind != frame.kind:
            streams.append(Stream(frame))
        stream = streams[-1]
        if pos > end:
            stream.gaps.append(slice(end, pos))
        end = pos + frame.n_bytes
        if end > len(data):
            stream.cut = True
            end = len(data)
            break
        stated = _stated_frames(data, pos, frame)
        if stated is None:
            stream.spans.append(slice(pos, end))
        else:
            stream.n_promised += stated
            stream.info = stream.info or data[pos:end]
    if streams and end < len(data):
        streams[-1].gaps.append(slice(end, len(data)))
    if not streams and (frame := _frame_at(data, start)):  # the only frame may be cut
        streams.append(Stream(frame, cut=True))
    return streams


def looks_like_mpeg(data: bytes, start: int, whole: bool) -> bool:
    """Whether bytes that begin a file, or are all of it, are MPEG audio: frames cover most of what follows the first.

    Eleven set bits alone are common in noise.
    """
    first = _frame_at(data, start)
    if first and start + first.n_bytes >= len(data):
        return whole
    streams = frame_mpeg(data, start)
    if not streams or not streams[0].spans:
        return bool(streams and streams[0].info)
    n_frames, n_bytes = sum(s.n_frames for s in streams), sum(s.n_bytes for s in streams)
    begin = streams[0].spans[0].start
    if begin == start or streams[0].info:
        return n_frames >= 2 or whole
    return n_frames >= _MANY and n_bytes >= (len(data) - begin) * 3 // 4


@cache  # at most 2 ** 15 different keys: the sync bits are always set
def _parse(top: int) -> Frame | None:
    """The frame that the upper 26 bits of a header describe; None where it is none or states no length."""
    version, layer_bits = top >> 13 & 3, top >> 11 & 3
    bitrate, rate, padding, mono = top >> 6 & 15, top >> 4 & 3, top >> 3 & 1, top & 3 == 3
    if layer_bits == 0 or version == 1 or rate == 3 or bitrate == 15:
        return None
    layer, first_version = 4 - layer_bits, version == 3
    sample_rate = _SAMPLE_RATES[rate] // _RATE_DIVISORS[version]
    n_samples = 384 if layer == 1 else 576 if layer == 3 and not first_version else 1152
    slot = 4 if layer == 1 else 1  # bytes that a length is counted in
    kbits = _BITRATES[first_version, layer][bitrate]
    n_bytes = (n_samples // 8 // slot * kbits * 1000 // sample_rate + padding) * slot if kbits else 0
    side_info = (17 if mono else 32) if first_version else (9 if mono else 17)
    return Frame(layer, n_bytes, n_samples, sample_rate, 1 if mono else 2, side_info)


def _parse_free(header: bytes) -> Frame | None:
    """The frame of a header of free bit rate, without its length; None for any other."""
    frame = _parse(int.from_bytes(header, "big") >> 6) if header[:1] == b"\xff" and header[1] >= 0xE0 else None
    return frame if frame and not frame.n_bytes else None


def _frame_at(data: bytes, pos: int) -> Frame | None:
    header = int.from_bytes(data[pos : pos + 4], "big")
    frame = _parse(header >> 6) if header >> 21 == 0x7FF else None
    return frame if frame and frame.n_bytes else None


def _free_frame(data: bytes, pos: int, n_bytes: int = 0) -> Frame | None:
    """The frame of free bit rate at `pos`, of a length that is known without its padding, or found by the next two."""
    header = data[pos : pos + 4]
    frame = _parse_free(header) if len(header) == 4 else None
    n_bytes = n_bytes or (_free_length(data, pos, frame) if frame else 0)
    return replace(frame, n_bytes=n_bytes + _free_padding(frame, header)) if frame and n_bytes else None


def _free_padding(frame: Frame, header: bytes) -> int:
    return (4 if frame.layer == 1 else 1) * (header[2] >> 1 & 1)


def _free_length(data: bytes, pos: int, frame: Frame) -> int:
    """Bytes without padding after which another frame of the kind begins, and then a third or the end; 0 if none."""
    padding = _free_padding(frame, data[pos : pos + 4])
    marks = re.finditer(re.escape(data[pos : pos + 2]), data[pos + _SMALLEST_FREE : pos + _LARGEST_FREE])
    for mark in islice(marks, _MOST_MARKS):
        second = pos + _SMALLEST_FREE + mark.start()
        header = data[second : second + 4]
        n_bytes = second - pos - padding
        if len(header) == 4 and _parse_free(header) == frame:
            third = second + n_bytes + _free_padding(frame, header)
            if third == len(data) or (len(data) - third >= 4 and _parse_free(data[third : third + 4]) == frame):
                return n_bytes
    return 0


def _walk(data: bytes, pos: int) -> Iterator[tuple[int, Frame]]:
    """Every frame from `pos` on, with its position; only the last may reach over the end of the data."""
    kind, n_free = None, 0
    free = _free_frame(data, pos)
    if free:
        kind, n_free = free.kind, free.n_bytes - _free_padding(free, data[pos : pos + 4])
    while True:
        frame = _free_frame(data, pos, n_free) if n_free else _frame_at(data, pos)
        if frame is None or frame.kind != kind:
            n_free = 0
            found = _resync(data, pos, kind)
            if found is None:
                return
            pos, frame = found
            kind = frame.kind
        yield pos, frame
        pos += frame.n_bytes


def _resync(data: bytes, pos: int, kind: tuple | None) -> tuple[int, Frame] | None:
    """The next frame that is followed by one of its kind or by the end; of a new kind, by two."""
    for match in _CANDIDATE.finditer(data, pos):
        frame = _frame_at(data, match.start())
        if frame is not None and _goes_on(data, match.start(), frame, 2 if kind in (None, frame.kind) else _SURE):
            return match.start(), frame
    return None


def _goes_on(data: bytes, pos: int, frame: Frame, n_frames: int) -> bool:
    follower: Frame | None = frame
    for _ in range(n_frames - 1):
        pos += follower.n_bytes
        if pos == len(data):
            return True
        follower = _frame_at(data, pos)
        if follower is None or follower.kind != frame.kind:
            return False
    return True


def _stated_frames(data: bytes, pos: int, frame: Frame) -> int | None:
    """The number of frames that a length header states, 0 where it leaves it out; None where `frame` holds audio."""
    if frame.layer != 3:
        return None
    at = _info_at(data, pos, frame)
    if at is not None:
        flags, n_frames = struct.unpack_from(">II", data, at + 4)
        return n_frames if flags & _HAS_FRAMES else 0
    if data.startswith(b"VBRI", pos + 36) and len(data) >= pos + 36 + 18:
        return struct.unpack_from(">I", data, pos + 36 + 14)[0]
    return None


def _info_at(data: bytes, pos: int, frame: Frame) -> int | None:
    """Where the length header of a frame begins: behind its side information. Few programs count the checksum."""
    for at in (pos + 4 + frame.n_side, pos + 6 + frame.n_side):
        if data.startswith((b"Xing", b"Info"), at) and len(data) >= at + 16:
            return at
    return None


def _info_frame(info: bytes, n_frames: int, n_bytes: int) -> bytes:
    """A file's own Info frame, which also says what to trim at the ends, with true numbers."""
    template = bytearray(info)
    at = _info_at(info, 0, _frame_at(info, 0))
    struct.pack_into(">II", template, at + 8, n_frames, n_bytes + len(template))
    return bytes(template)


def _states_both(info: bytes) -> bool:
    frame = _frame_at(info, 0)
    at = _info_at(info, 0, frame) if frame else None
    return at is not None and info[at + 7] & 3 == _HAS_FRAMES | _HAS_BYTES
