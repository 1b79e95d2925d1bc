"""MPEG Layer III framing: finds the frames of an mp3 and puts their true number in front of them.

A decoder believes the Xing/Info header of a file, or guesses the length from the file's size where there is none. Both
are wrong for files that were cut, joined, recorded from a stream or given large tags, and audio is lost without a word.
Layout of a frame header: ISO/IEC 11172-3 and 13818-3; of the length headers: as LAME (Xing, Info) and Fraunhofer (VBRI)
write them. Knows nothing of decoding or of errors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

# kbit/s by bitrate index, for MPEG-1 and for MPEG-2 and 2.5; index 0 states no length and 15 is forbidden
_BITRATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_SAMPLE_RATES = (44_100, 48_000, 32_000)  # of MPEG-1
_RATE_DIVISORS = {3: 1, 2: 2, 0: 4}  # by version bits: MPEG-1, 2, 2.5
_INFO_BITRATE = 8  # index of a bit rate whose frames can hold an Info header in every version
_HAS_FRAMES, _HAS_BYTES = 1, 2  # flags of an Info header


@dataclass(frozen=True)
class Frame:
    """What one frame header says. `n_bytes` counts the header too; `info_at` is where a length header would begin."""

    n_bytes: int
    n_samples: int
    sample_rate: int
    n_channels: int
    info_at: int

    @property
    def kind(self) -> tuple[int, int, int]:
        """What stays the same within one stream."""
        return self.sample_rate, self.n_channels, self.n_samples


@dataclass(frozen=True)
class Mp3:
    """The framing of one file.

    `stream` holds the audio frames alone, behind one Info header that states their number; `n_promised` is the number
    that the file's own length headers state, None without one; `cut` says that the file ends inside a frame; `changed`
    is the first frame of another sample rate or channel count, before which the stream ends.
    """

    stream: bytes
    frame: Frame
    n_frames: int
    n_promised: int | None
    cut: bool
    changed: Frame | None

    def seconds(self, n_frames: int) -> float:
        """The duration of a number of frames."""
        return n_frames * self.frame.n_samples / self.frame.sample_rate


def is_mp3(head: bytes) -> bool:
    """Whether a file that begins with `head` may be an mp3: an ID3v2 tag or a Layer III frame."""
    return head.startswith(b"ID3") or _frame_at(head, 0) is not None


def frame_mp3(data: bytes) -> Mp3 | None:
    """Walks over the Layer III frames of a file, past tags, foreign bytes and length headers. None without a frame."""
    first = info = changed = None
    spans: list[slice] = []
    n_promised, cut = 0, False
    start = _skip_tags(data)
    for pos, frame in _walk(data, start):
        first = first or frame
        end = pos + frame.n_bytes
        cut = end > len(data)
        changed = frame if frame.kind != first.kind else None
        if cut or changed:
            break
        stated = _stated_frames(data, pos, frame)
        if stated is None:
            spans.append(slice(pos, end))
        else:
            n_promised += stated
            info = info or data[pos:end]
    first = first or _frame_at(data, start)  # the only frame may be cut
    if not first:
        return None
    frames = b"".join(data[span] for span in spans)
    stream = _info_frame(frames[:4], info, len(spans), len(frames)) + frames if spans else b""
    return Mp3(stream, first, len(spans), n_promised or None, cut or not spans, changed)


@cache  # at most 2 ** 15 different keys: the sync bits are always set
def _parse(top: int) -> Frame | None:
    """The frame that the upper 26 bits of a header describe; None where it is not Layer III or states no length."""
    version, layer, has_crc = top >> 13 & 3, top >> 11 & 3, not top >> 10 & 1
    bitrate, rate, padding, mono = top >> 6 & 15, top >> 4 & 3, top >> 3 & 1, top & 3 == 3
    if layer != 1 or version == 1 or rate == 3 or bitrate in (0, 15):
        return None
    first_version = version == 3
    sample_rate = _SAMPLE_RATES[rate] // _RATE_DIVISORS[version]
    n_samples = 1152 if first_version else 576
    n_bytes = n_samples // 8 * _BITRATES[not first_version][bitrate] * 1000 // sample_rate + padding
    side_info = (17 if mono else 32) if first_version else (9 if mono else 17)
    return Frame(n_bytes, n_samples, sample_rate, 1 if mono else 2, 4 + 2 * has_crc + side_info)


def _frame_at(data: bytes, pos: int) -> Frame | None:
    header = int.from_bytes(data[pos : pos + 4], "big")
    return _parse(header >> 6) if header >> 21 == 0x7FF else None


def _walk(data: bytes, pos: int) -> Iterator[tuple[int, Frame]]:
    """Every frame from `pos` on, with its position; only the last may reach over the end of the data."""
    kind = None
    while True:
        frame = _frame_at(data, pos)
        if frame is None or frame.kind != kind:
            found = _resync(data, pos)
            if found is None:
                return
            pos, frame = found
            kind = frame.kind
        yield pos, frame
        pos += frame.n_bytes


def _resync(data: bytes, pos: int) -> tuple[int, Frame] | None:
    """The next frame that is followed by one of its kind or by the end; eleven set bits alone are common in noise."""
    while (pos := data.find(b"\xff", pos)) >= 0:
        frame = _frame_at(data, pos)
        if frame is not None:
            follower = _frame_at(data, pos + frame.n_bytes)
            if pos + frame.n_bytes == len(data) or (follower is not None and follower.kind == frame.kind):
                return pos, frame
        pos += 1
    return None


def _skip_tags(data: bytes) -> int:
    """The position behind the ID3v2 tags at the beginning."""
    pos = 0
    while data.startswith(b"ID3", pos) and len(data) >= pos + 10:
        high, mid, low, last = (byte & 0x7F for byte in data[pos + 6 : pos + 10])
        footer = 10 if data[pos + 5] & 0x10 else 0
        pos += 10 + (high << 21 | mid << 14 | low << 7 | last) + footer
    return pos


def _stated_frames(data: bytes, pos: int, frame: Frame) -> int | None:
    """The number of frames that a length header states, 0 where it leaves it out; None where `frame` holds audio."""
    if data.startswith((b"Xing", b"Info"), pos + frame.info_at):
        flags, n_frames = struct.unpack_from(">II", data, pos + frame.info_at + 4)
        return n_frames if flags & _HAS_FRAMES else 0
    if data.startswith(b"VBRI", pos + 36):
        return struct.unpack_from(">I", data, pos + 36 + 14)[0]
    return None


def _info_frame(header: bytes, info: bytes | None, n_frames: int, n_bytes: int) -> bytes:
    """An Info frame with true numbers: the file's own, which also says what to trim at the ends, or a plain one."""
    template = bytearray(info) if info and _states_both(info) else _plain_info_frame(header)
    at = _frame_at(template, 0).info_at
    struct.pack_into(">II", template, at + 8, n_frames, n_bytes + len(template))
    return bytes(template)


def _states_both(info: bytes) -> bool:
    at = _frame_at(info, 0).info_at
    return info.startswith((b"Xing", b"Info"), at) and info[at + 7] & 3 == _HAS_FRAMES | _HAS_BYTES


def _plain_info_frame(header: bytes) -> bytearray:
    top = int.from_bytes(header, "big")
    top = top & ~(0xF << 12) & ~(1 << 9) | _INFO_BITRATE << 12 | 1 << 16  # that bit rate, no padding, no checksum
    frame = _parse(top >> 6)
    template = bytearray(frame.n_bytes)
    template[:4] = top.to_bytes(4, "big")
    struct.pack_into(">4sI", template, frame.info_at, b"Info", _HAS_FRAMES | _HAS_BYTES)
    return template
