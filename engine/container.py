"""Which kind of file bytes are, by what they hold; a name says nothing. Kinds that cannot be read are told by name.

A file whose completeness cannot be checked is not read.
"""

from __future__ import annotations

from collections.abc import Callable

from .audio_bytes import AudioBytes, AudioError
from .chunks import file_starts
from .containers import aiff_parts, au_parts, caf_parts, sphere_parts, voc_parts, wave_parts
from .recording import CONVERT, Part
from .streams import flac_parts, is_mpeg, mpeg_parts, ogg_parts
from .tags import is_text, skip_tags

_HEAD_BYTES = 4096
_MOST_PARTS = 10_000

Reader = Callable[[AudioBytes, int], list[Part]]

# magic, its reader: `file_starts` has looked at more of it
_READERS: tuple[tuple[bytes, Reader], ...] = (
    (b"RIFF", wave_parts),
    (b"RIFX", wave_parts),
    (b"RF64", wave_parts),
    (b"BW64", wave_parts),
    (b"riff", wave_parts),
    (b"FORM", aiff_parts),
    (b"caff", caf_parts),
    (b".snd", au_parts),
    (b"dns.", au_parts),
    (b"NIST", sphere_parts),
    (b"Crea", voc_parts),
    (b"fLaC", flac_parts),
    (b"OggS", ogg_parts),
)
# (offset, magic, what it is): kinds that people hand over
_FOREIGN_KINDS = (
    (4, b"ftyp", "an MP4/M4A/MOV file"),
    (4, b"moov", "an MP4/M4A/MOV file"),
    (4, b"mdat", "an MP4/M4A/MOV file"),
    (0, b"\x1a\x45\xdf\xa3", "a WebM/Matroska file"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a WMA/ASF file"),
    (0, b"\xff\xf1", "a raw AAC (ADTS) file"),
    (0, b"\xff\xf9", "a raw AAC (ADTS) file"),
    (0, b"ADIF", "a raw AAC (ADIF) file"),
    (0, b"#!AMR", "an AMR file"),
    (0, b"FLV\x01", "a Flash video file"),
    (0, b"MAC ", "a Monkey's Audio file"),
    (0, b"wvpk", "a WavPack file"),
    (0, b"TTA1", "a True Audio file"),
    (0, b"MPCK", "a Musepack file"),
    (0, b"MP+", "a Musepack file"),
    (0, b".RMF", "a RealMedia file"),
    (0, b".ra\xfd", "a RealAudio file"),
    (0, b"\x0b\x77", "an AC-3 file"),
    (0, b"\x7f\xfe\x80\x01", "a DTS file"),
    (0, b"DSD ", "a DSD file"),
    (0, b"FRM8", "a DSD file"),
    (0, b"MThd", "a MIDI file"),
    (0, b"\x00\x00\x01\xba", "an MPEG program stream"),
    (0, b"\x00\x00\x01\xb3", "an MPEG video stream"),
    (0, b"nut/multimedia", "a NUT file"),
    (0, b".SoX", "a SoX file"),
    (0, b"XoS.", "a SoX file"),
    (8, b"AVI ", "an AVI file"),
    (8, b"8SVX", "an Amiga 8SVX file"),
    (8, b"16SV", "an Amiga 16SV file"),
    (0, b"2BIT", "an AVR file"),
    (0, b"PVF1", "a PVF file"),
    (0, b" paf", "a PARIS file"),
    (0, b"fap ", "a PARIS file"),
    (0, b"Extended Instrument:", "a FastTracker instrument"),
    (0, b"MATLAB 5.0", "a MATLAB file"),
    (0, b"\x64\xa3", "an IRCAM file"),
    (0, b"ALawSoundFile**", "a Psion file"),
    (0, b"\xf0\x7e", "a MIDI sample dump"),
)

_NOT_AUDIO = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"%PDF", "a PDF file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"GGUF", "a GGUF file"),
)


def find_parts(data: AudioBytes, max_seconds: float | None = None) -> tuple[list[Part], str | None]:
    """All recordings of a file, one after another, and what to warn of when something stands behind them.

    Raises AudioError for what is foreign, damaged or cut off within a header.
    """
    at, parts = skip_tags(data, 0), []
    while not parts or file_starts(data, at):
        found = _parts_at(data, at, max_seconds)
        if len(parts) + len(found) > _MOST_PARTS:
            raise AudioError(f"{data.name}: holds over {_MOST_PARTS} recordings; {CONVERT}")
        parts += found
        at = skip_tags(data, max(at + 1, found[-1].end))
    n_left = data.size - at
    if n_left < 128 or data.cut or data.is_blank(at, data.size):
        return parts, None
    return parts, f"{n_left} bytes behind its sound are of no known kind and left out"


def _parts_at(data: AudioBytes, at: int, max_seconds: float | None) -> list[Part]:
    head = data.read(at, _HEAD_BYTES)
    if file_starts(data, at):
        reader = next(reader for magic, reader in _READERS if head.startswith(magic))
        return reader(data, at)
    if kind := next((kind for place, magic, kind in _FOREIGN_KINDS if head.startswith(magic, place)), None):
        raise AudioError(f"{data.name}: is {kind}, which cannot be read here; {CONVERT}")
    if kind := next((kind for magic, kind in _NOT_AUDIO if head.startswith(magic)), None):
        raise AudioError(f"{data.name}: is {kind}, not audio; give a wav, flac, ogg or mp3 file")
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        raise AudioError(f"{data.name}: is an MPEG transport stream, which cannot be read here; {CONVERT}")
    if is_mpeg(data, at):
        return mpeg_parts(data, at, max_seconds=max_seconds)
    if is_text(head):
        raise AudioError(f"{data.name}: is text, not audio; give a wav, flac, ogg or mp3 file")
    raise AudioError(
        f"{data.name}: is damaged or of an unknown kind; give a wav, flac, ogg or mp3, or raw samples as an array "
        f"with their sample_rate, or {CONVERT}"
    )


def most_bytes(name: str, head: bytes, max_seconds: float | None) -> int | None:
    """How many bytes of a stream that begins with `head` hold `max_seconds` of sound. Raises AudioError as above."""
    parts, _ = find_parts(AudioBytes.of(name, head, cut=True), None)
    return None if max_seconds is None else len(head) + int(1.02 * max_seconds * parts[0].bytes_per_second)
