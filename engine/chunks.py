"""The chunks of WAV, RF64, W64, AIFF and CAF files, and where the sound among them truly ends.

Headers are written before the length is known, by programs that crash, write into pipes, or count in 32 bits. A stated
size is believed only where something that can follow does follow. Knows nothing of samples.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from .audio_bytes import AudioBytes
from .recording import Span
from .tags import is_text, skip_tags

_MOST_CHUNKS = 10_000
SLIGHT = 128  # bytes that are not worth a word
_ROUNDING = 0x2000  # bytes by which programs miss a round size: their header, or down to whole frames
_WAVE_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # how Wave64 names go on after the four letters of WAV
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _()-")
# A file begins so: a magic number, and another one at an offset
_STARTS = (
    (b"RIFF", 8, b"WAVE"),
    (b"RIFX", 8, b"WAVE"),
    (b"RF64", 8, b"WAVE"),
    (b"BW64", 8, b"WAVE"),
    (b"FORM", 8, b"AIF"),
    (_W64_RIFF, 24, b"wave" + _WAVE_GUID),
    (b"caff\x00\x01", 8, b"desc"),
    (b".snd\x00\x00", 12, b"\x00\x00\x00"),
    (b"dns.", 14, b"\x00\x00"),
    (b"NIST_1A\n", 8, b""),
    (b"Creative Voice File\x1a", 20, b""),
    (b"fLaC", 4, b""),
    (b"OggS\x00", 5, b""),
)
_MAGIC = re.compile(b"|".join(re.escape(magic) for magic, _, more in _STARTS if more))
_LONGEST_MAGIC = max(len(magic) for magic, _, _ in _STARTS)
_PIECE = 1 << 20  # bytes searched at a time


@dataclass(frozen=True)
class Form:
    """How a family of files lays its chunks: the length of a name, how a size is packed, whether it counts the chunk's
    own header, to what positions are rounded up, and the name of the chunk that holds the sound."""

    n_name: int
    size: struct.Struct
    inclusive: bool
    align: int
    sound: bytes

    @property
    def n_header(self) -> int:
        return self.n_name + self.size.size


WAVE = Form(4, struct.Struct("<I"), False, 2, b"data")
WAVE_BIG = Form(4, struct.Struct(">I"), False, 2, b"data")
WAVE_64 = Form(16, struct.Struct("<Q"), True, 8, b"data" + _WAVE_GUID)
AIFF = Form(4, struct.Struct(">I"), False, 2, b"SSND")
CAF = Form(4, struct.Struct(">Q"), False, 1, b"data")


@dataclass(frozen=True)
class Extent:
    """Where sound lies. missing: as in `Part`."""

    start: int
    stop: int
    missing: float = 1.0
    note: str | None = None


@dataclass
class Chunks:
    """All chunks of one file: content of the small ones by name, extents of the sound, and the position behind."""

    content: dict[bytes, bytes]
    sound: list[Extent]
    end: int

    @property
    def spans(self) -> list[Span]:
        return [(extent.start, extent.stop) for extent in self.sound]

    @property
    def missing(self) -> float:
        there = sum(extent.stop - extent.start for extent in self.sound)
        stated = sum((extent.stop - extent.start) * extent.missing for extent in self.sound)
        return stated / there if there else 1.0

    @property
    def note(self) -> str | None:
        return next((extent.note for extent in self.sound if extent.note), None)


def read_chunks(data: AudioBytes, at: int, form: Form, n_skip: int = 0, n_wide: int | None = None) -> Chunks:
    """The chunks from `at` on, up to the end or to another file.

    n_skip: bytes before the samples in the sound's chunk. n_wide: the size of the sound, stated elsewhere.
    """
    found, base = Chunks({}, [], at), at
    for _ in range(_MOST_CHUNKS):
        name = _chunk_at(data, at, form, must_fit=False)
        if name is None:
            break
        size = _size_at(data, at, form)
        start = at + form.n_header
        if name == form.sound:
            wide = n_wide is not None and size == 0xFFFFFFFF
            n_skip = max(0, min(n_skip, data.size - start))
            extent = settle(data, start, n_wide if wide else size, form, n_skip, base)
            found.sound.append(extent)
            at = _place_behind(data, extent.stop, form, base)
        elif start + size > data.size:
            break
        else:
            found.content.setdefault(name, data.read(start, min(size, 1 << 16)))
            at = _place_behind(data, start + size, form, base)
        found.end = min(at, data.size)
    return found


def settle(
    data: AudioBytes, start: int, stated: int, form: Form | None = None, n_skip: int = 0, base: int = 0
) -> Extent:
    """The true extent of sound that begins `n_skip` bytes behind `start` and is stated to have `stated` bytes in all.

    form: of the chunks that may follow, in a file that begins at `base`.
    """
    first, there, what = start + n_skip, data.size - start, max(0, stated - n_skip)
    if stated > there:
        if not states_no_size(stated):
            return Extent(first, data.size, what / max(1, data.size - first))
        return Extent(first, _next_file(data, first))
    if stated > n_skip and _ends_at(data, start + stated, form, base):
        return Extent(first, start + stated)
    if stated <= n_skip and _ends_at(data, first, form, base):
        return Extent(first, first)
    stop = _next_file(data, first)
    if stop - first - what < SLIGHT:
        return Extent(first, stop)
    if stated <= n_skip:
        return Extent(first, stop, note=f"its header states no sound, all {stop - first} bytes that follow are heard")
    return Extent(first, stop, note=f"its header states {what} bytes of sound, all {stop - first} are heard")


def states_no_size(stated: int) -> bool:
    """Whether a size beyond the end only says that it was not known, as of programs that write into a pipe."""
    limits = (0x7F000000, 0x7FFFF000, 0x80000000, 0xFFFFFFFF)
    return stated >= 1 << 62 or any(abs(stated - limit) <= _ROUNDING for limit in limits)


def file_starts(data: AudioBytes, at: int) -> bool:
    """Whether another audio file begins here."""
    head = data.read(at, 64)
    return any(head.startswith(magic) and head.startswith(more, place) for magic, place, more in _STARTS)


def file_or_tag_starts(data: AudioBytes, at: int) -> bool:
    return file_starts(data, at) or skip_tags(data, at) > at


def _next_file(data: AudioBytes, start: int) -> int:
    """Where another file of uncompressed sound begins within sound of unknown length; else the end of all."""
    for at in range(start, data.size, _PIECE):
        piece = data.read(at, _PIECE + _LONGEST_MAGIC)
        for match in _MAGIC.finditer(piece):
            if file_starts(data, at + match.start()):
                return at + match.start()
    return data.size


def _ends_at(data: AudioBytes, at: int, form: Form | None, base: int) -> bool:
    """Whether sound can end here: at the end of all, before a chunk, a tag, another file, text, or mere zeros."""
    places = [at] if form is None else [at, _round_up(at, form, base)]
    return (
        any(_follows(data, place, form) for place in places)
        or is_text(data.read(at, 4096))
        or data.is_blank(at, data.size)
    )


def _follows(data: AudioBytes, at: int, form: Form | None) -> bool:
    if data.size - at < 8 or file_or_tag_starts(data, at):
        return True
    return form is not None and _chunk_at(data, at, form, must_fit=True) is not None


def _place_behind(data: AudioBytes, stop: int, form: Form, base: int) -> int:
    """Where the next chunk begins; some programs leave the padding out."""
    padded = _round_up(stop, form, base)
    return stop if padded != stop and not _follows(data, padded, form) and _follows(data, stop, form) else padded


def _chunk_at(data: AudioBytes, at: int, form: Form, must_fit: bool) -> bytes | None:
    """The name of the chunk that begins here, None for what is none."""
    header = data.read(at, form.n_header)
    name = header[: form.n_name]
    plausible = name[4:] == _WAVE_GUID if form.n_name == 16 else set(name) <= _LETTERS
    if len(header) < form.n_header or not plausible or file_starts(data, at):
        return None
    if must_fit and name != form.sound and at + form.n_header + _size_at(data, at, form) > data.size:
        return None
    return name


def _size_at(data: AudioBytes, at: int, form: Form) -> int:
    (size,) = form.size.unpack(data.read(at + form.n_name, form.size.size))
    return max(0, size - form.n_header) if form.inclusive and size < 1 << 62 else size


def _round_up(stop: int, form: Form, base: int) -> int:
    return stop + (base - stop) % form.align
