"""WAV, RF64, Wave64, AIFF, CAF, AU, NIST Sphere and Creative Voice: from their headers to recordings.

Layouts: Microsoft's RIFF and Sony's Wave64 documents, EBU Tech 3306 (RF64), Apple's AIFF-C and CAF, Sun's audio file
format, NIST's SPHERE. Uncompressed samples are read here, compressed ones by the decoders of codec.py and streams.py.
"""

from __future__ import annotations

import struct

from . import chunks
from .audio_bytes import AudioBytes, AudioError
from .chunks import SLIGHT, Chunks, file_or_tag_starts, read_chunks, settle
from .codec import coded_part
from .pcm import SampleType
from .recording import CONVERT, RESCUE, Part, Span, pcm_part
from .streams import cut_off, mpeg_parts
from .tags import skip_tags

_INTEGER, _FLOAT, _A_LAW, _MU_LAW, _MPEG, _MPEG_3, _EXTENSIBLE = 1, 3, 6, 7, 0x50, 0x55, 0xFFFE  # WAVE format tags
_WAVE_CODECS = {2: "MS ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x38: "NMS ADPCM", 0x40: "G.721"}
_FILLED = 1 << 12  # samples that fill up a last block at most
_AIFC = {  # compression types; None: the bits state the width
    b"NONE": ("i", None, ">"),
    b"twos": ("i", None, ">"),
    b"sowt": ("i", None, "<"),
    b"raw ": ("u", 1, ">"),
    b"in24": ("i", 3, ">"),
    b"in32": ("i", 4, ">"),
    b"42ni": ("i", 3, "<"),
    b"23ni": ("i", 4, "<"),
    b"fl32": ("f", 4, ">"),
    b"FL32": ("f", 4, ">"),
    b"fl64": ("f", 8, ">"),
    b"FL64": ("f", 8, ">"),
    b"ulaw": ("U", 1, ">"),
    b"ULAW": ("U", 1, ">"),
    b"alaw": ("A", 1, ">"),
    b"ALAW": ("A", 1, ">"),
}
_AU = {1: ("U", 1), 2: ("i", 1), 3: ("i", 2), 4: ("i", 3), 5: ("i", 4), 6: ("f", 4), 7: ("f", 8), 27: ("A", 1)}
_VOC = {0: SampleType("u", 1), 4: SampleType("i", 2), 6: SampleType("A", 1), 7: SampleType("U", 1)}
_AU_CODECS = (23, 24, 25, 26)  # G.721 and G.723


def wave_parts(data: AudioBytes, at: int) -> list[Part]:
    """RIFF, RIFX, RF64, BW64 and Wave64."""
    magic = data.read(at, 4)
    form = {b"RIFX": chunks.WAVE_BIG, b"riff": chunks.WAVE_64}.get(magic, chunks.WAVE)
    n_wide = None
    if magic in (b"RF64", b"BW64"):
        ds64 = data.read(at + 12, 8 + 24)
        n_wide = int.from_bytes(ds64[16:24], "little") if ds64.startswith(b"ds64") else None
    found = read_chunks(data, at + (40 if form is chunks.WAVE_64 else 12), form, n_wide=n_wide)
    name = next((name for name in found.content if name[:4] == b"fmt "), None)
    fmt = found.content.get(name, b"")
    if len(fmt) < 14 or not found.sound:
        raise _damaged(data, "it has no format or no sound")
    return _wave_sound(data, found, fmt, ">" if form is chunks.WAVE_BIG else "<")


def _wave_sound(data: AudioBytes, found: Chunks, fmt: bytes, order: str) -> list[Part]:
    tag, n_channels, rate, _, align = struct.unpack_from(f"{order}HHIIH", fmt)
    bits = struct.unpack_from(f"{order}H", fmt, 14)[0] if len(fmt) >= 16 else 8
    if tag == _EXTENSIBLE and len(fmt) >= 26:
        (tag,) = struct.unpack_from(f"{order}H", fmt, 24)
    if tag in (_MPEG, _MPEG_3):
        return _mpeg_inside(data, found)
    if tag in (_INTEGER, _FLOAT, _A_LAW, _MU_LAW):
        sample = _wave_sample(tag, n_channels, align, bits, order)
        if sample is None:
            raise _damaged(data, f"it states {bits}-bit samples of format {tag} in frames of {align} bytes")
        return [pcm_part(data, sample, rate, n_channels, found.spans, found.end, found.missing, found.note)]
    if tag not in _WAVE_CODECS:
        raise AudioError(f"{data.name}: is a WAV file of format 0x{tag:04x}, which cannot be read here; {CONVERT}")
    start, stop = _only_span(data, found)
    n_bytes = min(stop - start, 0x7FFFFF00 - len(fmt))
    riff, u32 = (b"RIFX", ">I") if order == ">" else (b"RIFF", "<I")
    head = b"WAVEfmt " + struct.pack(u32, len(fmt)) + fmt + b"data" + struct.pack(u32, n_bytes)
    prefix = riff + struct.pack(u32, len(head) + n_bytes) + head
    part = coded_part(data, start, start + n_bytes, prefix, found.end, found.missing, found.note)
    fact = next((content for name, content in found.content.items() if name[:4] == b"fact"), b"")
    n_real = int.from_bytes(fact[:4], "big" if order == ">" else "little")
    if n_real and 0 < (part.n_frames or 0) - n_real <= _FILLED:  # the last blocks are filled up
        return [coded_part(data, start, start + n_bytes, prefix, found.end, found.missing, found.note, n_real)]
    return [part]


def _wave_sample(tag: int, n_channels: int, align: int, bits: int, order: str) -> SampleType | None:
    width = align // n_channels if n_channels and align and align % n_channels == 0 else -(-bits // 8)
    if tag == _INTEGER and not 0 < bits <= 8 * width:
        return None
    kind = {_INTEGER: "u" if width == 1 else "i", _FLOAT: "f", _A_LAW: "A", _MU_LAW: "U"}[tag]
    sample = SampleType(kind, width, order)
    return sample if sample.known else None


def _mpeg_inside(data: AudioBytes, found: Chunks) -> list[Part]:
    start, stop = _only_span(data, found)
    parts = mpeg_parts(data, start, stop, found.end)
    if found.missing > 1:
        seconds = sum((part.n_frames or 0) / part.rate for part in parts)
        raise AudioError(cut_off(data.name, seconds, seconds * found.missing))
    return parts


def _only_span(data: AudioBytes, found: Chunks) -> Span:
    """Where compressed sound lies, which no decoder takes in pieces."""
    if len(found.sound) > 1:
        raise AudioError(f"{data.name}: holds its compressed sound in {len(found.sound)} pieces; {CONVERT}")
    return found.spans[0]


def aiff_parts(data: AudioBytes, at: int) -> list[Part]:
    """AIFF and AIFF-C."""
    found = read_chunks(data, at + 12, chunks.AIFF, n_skip=8)
    comm = found.content.get(b"COMM", b"")
    if len(comm) < 18 or not found.sound:
        raise _damaged(data, "it has no format or no sound")
    n_channels, _, bits = struct.unpack_from(">HIH", comm)
    rate = _extended(comm[8:18])
    compression = comm[18:22] if data.read(at + 8, 4) == b"AIFC" and len(comm) >= 22 else b"NONE"
    if compression == b".mp3":
        return _mpeg_inside(data, found)
    if compression not in _AIFC:
        _only_span(data, found)
        return [coded_part(data, at, found.end, b"", found.end, found.missing, found.note)]
    offset = int.from_bytes(data.read(found.spans[0][0] - 8, 4), "big")
    spans = [(min(start + offset, stop), stop) for start, stop in found.spans]
    kind, width, order = _AIFC[compression]
    sample = SampleType(kind, width or -(-bits // 8), order)
    if not sample.known:
        raise _damaged(data, f"it states samples of {bits} bits")
    return [pcm_part(data, sample, rate, n_channels, spans, found.end, found.missing, found.note)]


def _extended(number: bytes) -> float:
    """An 80-bit float, of which only plausible rates matter."""
    exponent, mantissa = struct.unpack(">HQ", number)
    return float(mantissa) * 2.0 ** (exponent - 16383 - 63) if exponent < 16383 + 63 else 0.0


def caf_parts(data: AudioBytes, at: int) -> list[Part]:
    """Core Audio Format."""
    found = read_chunks(data, at + 8, chunks.CAF, n_skip=4)
    desc = found.content.get(b"desc", b"")
    if len(desc) < 32 or not found.sound:
        raise _damaged(data, "it has no format or no sound")
    rate, codec, flags, per_packet, _, n_channels, bits = struct.unpack_from(">d4sIIIII", desc)
    if codec in (b".mp1", b".mp2", b".mp3"):
        return _mpeg_inside(data, found)
    if codec == b"alac":
        _only_span(data, found)
        return [coded_part(data, at, found.end, b"", found.end, found.missing, found.note)]
    kind = {b"lpcm": "f" if flags & 1 else "i", b"ulaw": "U", b"alaw": "A"}.get(codec)
    if kind is None:
        shown = codec.decode("ascii", "replace").strip()
        raise AudioError(f"{data.name}: is a CAF file of {shown!r}, which cannot be read here; {CONVERT}")
    width = per_packet // n_channels if n_channels and per_packet % n_channels == 0 else 0
    sample = SampleType(kind, width, "<" if flags & 2 else ">")
    if not sample.known or not 0 < bits <= 8 * width:
        raise _damaged(data, f"it states {bits}-bit samples in packets of {per_packet} bytes")
    return [pcm_part(data, sample, rate, n_channels, found.spans, found.end, found.missing, found.note)]


def au_parts(data: AudioBytes, at: int) -> list[Part]:
    """Sun's and NeXT's AU, of either byte order."""
    order = ">" if data.read(at, 4) == b".snd" else "<"
    head = data.read(at + 4, 20)
    if len(head) < 20:
        raise _damaged(data, "its header is not whole")
    offset, size, encoding, rate, n_channels = struct.unpack(f"{order}5I", head)
    if offset < 24 or at + offset > data.size:
        raise _damaged(data, f"its sound is stated to begin at byte {offset}")
    extent = settle(data, at + offset, size)
    if encoding in _AU_CODECS:
        n_bytes = min(extent.stop - extent.start, 0x7FFFFFFF)
        prefix = b".snd" + struct.pack(">5I", 24, n_bytes, encoding, rate, n_channels)
        return [coded_part(data, extent.start, extent.stop, prefix, extent.stop, extent.missing, extent.note)]
    if encoding not in _AU:
        raise AudioError(f"{data.name}: is an AU file of encoding {encoding}, which cannot be read here; {CONVERT}")
    sample = SampleType(*_AU[encoding], order)
    spans = [(extent.start, extent.stop)]
    return [pcm_part(data, sample, rate, n_channels, spans, extent.stop, extent.missing, extent.note)]


def sphere_parts(data: AudioBytes, at: int) -> list[Part]:
    """NIST Sphere."""
    try:
        n_head = int(data.read(at + 8, 8))
        lines = data.read(at, min(max(n_head, 0), 1 << 16)).decode("ascii").partition("end_head")[0].split("\n")
        fields = {words[0]: words[2] for words in (line.split(maxsplit=2) for line in lines[2:]) if len(words) == 3}
        numbers = ("sample_rate", "channel_count", "sample_n_bytes")
        rate, n_channels, width = (int(fields.get(key, 1)) for key in numbers)
        count = int(fields["sample_count"]) if "sample_count" in fields else None
    except ValueError:
        raise _damaged(data, "its header cannot be understood") from None
    coding = fields.get("sample_coding", "pcm")
    kind = {"pcm": "i", "ulaw": "U", "mu-law": "U", "alaw": "A"}.get(coding)
    if kind is None:
        shown = coding[:40] if coding.isprintable() else repr(coding[:40])
        raise AudioError(f"{data.name}: is a Sphere file of {shown}, which cannot be read here; {CONVERT}")
    sample = SampleType(kind, width, ">" if fields.get("sample_byte_format") == "10" else "<")
    if not sample.known or not 1 <= n_channels <= 1 << 16 or not 16 <= n_head <= data.size - at:
        raise _damaged(data, f"it states samples of {width} bytes, {n_channels} channels, a header of {n_head} bytes")
    stated = (1 << 64) - 1 if count is None else max(0, count) * width * n_channels
    extent = settle(data, at + n_head, stated)
    spans = [(extent.start, extent.stop)]
    return [pcm_part(data, sample, rate, n_channels, spans, extent.stop, extent.missing, extent.note)]


def _damaged(data: AudioBytes, why: str) -> AudioError:
    return AudioError(f"{data.name}: is cut off or damaged, {why}; {RESCUE}")


def voc_parts(data: AudioBytes, at: int) -> list[Part]:
    """Creative Voice: blocks of sound, which may go on in others; pauses between them are left out."""
    at += int.from_bytes(data.read(at + 20, 2), "little") or 26
    found = _Voc(data)
    while at < data.size:
        head = data.read(at, 4)
        if head[0] == 0 or len(head) < 4:
            at += 1
            break
        size = int.from_bytes(head[1:], "little")
        at = found.take(head[0], at + 4, size)
    return found.parts(min(at, data.size))


class _Voc:
    """What the blocks of a Creative Voice file have said so far."""

    def __init__(self, data: AudioBytes) -> None:
        self._data = data
        self._kind: tuple[float, int, int] | None = None  # rate, channels, codec
        self._extra: tuple[float, int, int] | None = None
        self._spans: list[Span] = []
        self._n_missing = 0
        self._note: str | None = None

    def take(self, block: int, at: int, size: int) -> int:
        """Reads the block whose content begins at `at`; gives the position behind it."""
        head = self._data.read(at, 12)
        if block == 9 and len(head) == 12:
            rate, bits, n_channels, codec = struct.unpack_from("<IBBH", head)
            if bits > 16 or (codec == 4) != (bits == 16):
                raise _damaged(self._data, f"it states samples of {bits} bits in codec {codec}")
            return self._sound((float(rate), n_channels, codec), at, 12, size)
        if block == 1 and len(head) >= 2:
            plain = (1e6 / (256 - head[0]), 1, head[1])
            kind, self._extra = self._extra or plain, None
            return self._sound(kind, at, 2, size)
        if block == 2 and self._kind:
            return self._sound(self._kind, at, 0, size)
        if block == 8 and len(head) >= 4:
            constant, codec, more = struct.unpack_from("<HBB", head)
            self._extra = (256e6 / (65536 - constant) / (more + 1), more + 1, codec)
        elif block not in (3, 4, 5, 6, 7):
            raise _damaged(self._data, f"a block of unknown kind {block} stands at byte {at - 4}")
        elif block == 3:
            self._note = "the pauses that it states in numbers are left out"
        return at + size

    def _sound(self, kind: tuple[float, int, int], at: int, n_skip: int, size: int) -> int:
        if self._kind not in (None, kind):
            raise AudioError(f"{self._data.name}: changes its rate, channels or codec within; {CONVERT}")
        self._kind = kind
        start, stop = at + n_skip, at + max(size, n_skip)
        if not self._is_block(stop):
            stated, stop = stop - start, self._data.size
            if stop - start - stated >= SLIGHT:
                self._note = f"its header states {stated} bytes of sound, all {stop - start} are heard"
        self._spans.append((start, min(stop, self._data.size)))
        self._n_missing += max(0, stop - self._data.size)
        return stop

    def _is_block(self, at: int) -> bool:
        """Whether a block can begin here, or the file can end."""
        head = self._data.read(at, 4)
        if len(head) == 4 and head[0]:
            return head[0] <= 9 or skip_tags(self._data, at) > at
        return self._data.is_blank(at, self._data.size) or file_or_tag_starts(self._data, at + 1)

    def parts(self, end: int) -> list[Part]:
        data = self._data
        if self._kind is None:
            raise _damaged(data, "it has no sound")
        rate, n_channels, codec = self._kind
        if codec not in _VOC:
            raise AudioError(f"{data.name}: is a Creative Voice file of codec {codec}, not read here; {CONVERT}")
        n_bytes = sum(stop - start for start, stop in self._spans)
        missing = 1 + self._n_missing / max(1, n_bytes)
        return [pcm_part(data, _VOC[codec], rate, n_channels, self._spans, end, missing, self._note)]
