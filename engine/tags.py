"""Tags that music programs put before and behind a recording: ID3, APE, Lyrics3, text. Passed over, never read."""

from __future__ import annotations

from .audio_bytes import AudioBytes

_APE_HEADER = 32
_LONGEST_LYRICS = 1 << 20


def skip_tags(data: AudioBytes, at: int) -> int:
    """The position behind all tags that begin at `at`; `at` itself where there is none."""
    while n_bytes := _tag_bytes(data.read(at, _APE_HEADER), data, at):
        at = min(at + n_bytes, data.size)
    return at


def _tag_bytes(head: bytes, data: AudioBytes, at: int) -> int:
    if head.startswith((b"ID3", b"3DI")) and len(head) >= 10 and max(head[6:10]) < 0x80 and head[3] != 0xFF:
        high, mid, low, last = head[6:10]
        footer = 10 if head[5] & 0x10 else 0
        return 10 if head.startswith(b"3DI") else 10 + (high << 21 | mid << 14 | low << 7 | last) + footer
    if head.startswith(b"TAG+"):
        return 227
    if head.startswith(b"TAG") and at >= data.size - 512:
        return 128
    if head.startswith(b"APETAGEX") and len(head) == _APE_HEADER:
        size, flags = (int.from_bytes(head[n : n + 4], "little") for n in (12, 20))
        return _APE_HEADER + (size if flags & 1 << 29 else 0)  # a footer alone follows what it counts
    if head.startswith(b"LYRICSBEGIN"):
        content = data.read(at, _LONGEST_LYRICS)
        ends = [content.find(mark) for mark in (b"LYRICS200", b"LYRICSEND")]
        return min((end + 9 for end in ends if end >= 0), default=0)
    return 0


def is_text(head: bytes) -> bool:
    """Whether bytes, of which the last character may be cut, can be read as text."""
    try:
        text = head[:-3].decode() if len(head) > 3 else head.decode()
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text)
