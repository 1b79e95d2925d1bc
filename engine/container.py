"""What the bytes of an audio file tell without decoding: a kind that libsndfile cannot read, and a missing part.

libsndfile reads a shortened file as if it were whole, and of a chained Ogg stream only the first recording.
Layout of Ogg pages: RFC 3533. Knows nothing of samples.
"""

from __future__ import annotations

import re

# (offset, magic, what it is): kinds that people hand over and libsndfile does not read
_FOREIGN_KINDS = (
    (4, b"ftyp", "an MP4/M4A/MOV file"),
    (0, b"\x1a\x45\xdf\xa3", "a WebM/Matroska file"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a WMA/ASF file"),
    (0, b"\xff\xf1", "a raw AAC (ADTS) file"),
    (0, b"\xff\xf9", "a raw AAC (ADTS) file"),
    (0, b"#!AMR", "an AMR file"),
    (0, b"FLV\x01", "a Flash video file"),
    (0, b"MAC ", "a Monkey's Audio file"),
    (0, b"wvpk", "a WavPack file"),
)
_STATED_SIZE = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_OGG_HEADER_BYTES = 27
_OGG_FIRST = 2  # flag of the first page of a recording


def foreign_kind(head: bytes) -> str | None:
    """What a file that begins with `head` is, where it is a known kind that needs conversion; else None."""
    if _is_text(head):
        return "text, not audio"
    return next((kind for at, magic, kind in _FOREIGN_KINDS if head.startswith(magic, at)), None)


def stated_ratio(log: str) -> float:
    """Bytes that a header states over bytes that are there, from libsndfile's log; 1.0 where none is missing.

    A program that writes into a pipe cannot know the size and states about the largest one: nothing is missing then.
    """
    found = _STATED_SIZE.search(log)
    if not found:
        return 1.0
    stated, present = int(found[1]), int(found[2])
    unknown = any(limit - 0x1000 <= stated <= limit for limit in (1 << 31, 1 << 32, 1 << 63, 1 << 64))
    return 1.0 if unknown or present == 0 else max(1.0, stated / present)


def ogg_fault(data: bytes) -> str | None:
    """Why an Ogg file would not be heard to its end, else None."""
    pos, in_audio = 0, False
    while data.startswith(b"OggS", pos):
        body = pos + _OGG_HEADER_BYTES
        if body > len(data) or body + data[body - 1] > len(data):
            return "is cut off"
        first = bool(data[pos + 5] & _OGG_FIRST)
        if first and in_audio:
            return "holds several recordings one after another, of which only the first can be read"
        in_audio = not first
        segments = data[body : body + data[body - 1]]
        pos = body + len(segments) + sum(segments)
    return "is cut off" if pos > len(data) else None


def _is_text(head: bytes) -> bool:
    try:
        text = head[:-3].decode() if len(head) > 3 else head.decode()  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text)
