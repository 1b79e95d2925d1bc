"""Sounds made for the tests, and the files that hold them."""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile
import soxr

from support import ROOT

JFK = ROOT / "tests" / "data" / "jfk.flac"
SAMPLE_RATE = 16_000
LOSSLESS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "aiff": ("AIFF", "PCM_16"), "w64": ("W64", "PCM_16")}
CONTAINERS = LOSSLESS | {
    "rf64": ("RF64", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
    "voc": ("VOC", "PCM_16"),
}
LOSSY = {"ogg": ("OGG", "VORBIS"), "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS")}
RATES = (8_000, 22_050, 44_100, 48_000)


def synthetic(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Tones that come and go, noise bursts, a quiet beginning and a loud end: float32 [n] or [n, channels], |x| < 1."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (180 * t + 90 * t**2)) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t))
    noise = rng.standard_normal(len(t)) * (np.sin(2 * np.pi * 1.3 * t) > 0.6)
    mono = (0.35 * tone + 0.05 * noise) * np.where(t < seconds / 2, 0.02, 1.0)
    if channels == 1:
        return mono.astype(np.float32)
    return np.stack([mono * (1 - 0.3 * c) for c in range(channels)], axis=1).astype(np.float32)


def encode(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None, **options) -> bytes:
    """The bytes of an audio file."""
    container, default = (CONTAINERS | LOSSY)[kind]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype or default, **options)
    return buffer.getvalue()


def expected(samples: np.ndarray, rate: int) -> np.ndarray:
    """16 kHz mono in one call each of numpy and soxr."""
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ")


# Where the size of the sound stands in a file of `encode`: what comes before it, and how it is packed.
_SIZES = {
    "wav": (b"data", "<I"),
    "aiff": (b"SSND", ">I"),
    "au": (b".snd\x00\x00\x00\x18", ">I"),
    "caf": (b"data", ">Q"),
    "w64": (b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a", "<Q"),
}
SIZED = tuple(_SIZES)


def size_of_sound(data: bytes, kind: str) -> int:
    """What the header of an encoded file states, in bytes."""
    mark, form = _SIZES[kind]
    return struct.unpack_from(form, data, data.index(mark) + len(mark))[0]


def with_size(data: bytes, kind: str, size: int) -> bytes:
    """An encoded file whose header states another size of the sound, wherever it states one."""
    mark, form = _SIZES[kind]
    changed = bytearray(data)
    struct.pack_into(form, changed, data.index(mark) + len(mark), size)
    if kind in ("wav", "aiff"):
        struct.pack_into("<I" if kind == "wav" else ">I", changed, 4, min(size, (1 << 32) - 1))
    return bytes(changed)


def in_wave(stream: bytes, tag: int, rate: int) -> bytes:
    """A mono MPEG stream in a WAV file of a format tag."""
    fmt = struct.pack("<HHIIHHH", tag, 1, rate, 4_000, 1, 0, 12)
    chunks = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(stream)) + stream
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def silent_mpeg(layer: int, bitrates: list[int], rate: int = 1, mono: bool = True, padding: bool = False) -> bytes:
    """Frames of MPEG-1 layer I or II in which no subband has a bit: silence. bitrates, rate: indices of the header.

    For bit rate 0 (free) frames are 500 bytes long.
    """
    frames = []
    for index in bitrates:
        kbits = 32 * index if layer == 1 else (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)[index]
        hertz = (44_100, 48_000, 32_000)[rate]
        n_bytes = (12 * kbits * 1000 // hertz + padding) * 4 if layer == 1 else 144 * kbits * 1000 // hertz + padding
        head = (
            0x7FF << 21
            | 3 << 19
            | (4 - layer) << 17
            | 1 << 16
            | index << 12
            | rate << 10
            | padding << 9
            | mono * 3 << 6
        )
        frames.append(head.to_bytes(4, "big").ljust(n_bytes if index else 500, b"\0"))
    return b"".join(frames)
