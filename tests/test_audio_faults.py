"""Files that programs get wrong: sizes, joins, tags, names. All is heard, or a line says what is missing."""

from __future__ import annotations

import io
import logging
import struct

import numpy as np
import pytest
import soundfile

from auricle.engine import load
from auricle.engine.audio import AudioError, count_samples, load_audio
from sounds import CONTAINERS, LOSSY, SAMPLE_RATE, SIZED, encode, size_of_sound, synthetic, with_size
from support import ROOT, SHARED, needs_shared

ID3 = b"ID3\x04\x00\x00\x00\x00\x10\x00" + bytes(range(256)) * 8
WINDOWS = (0x7F000000, 0x7F000008, 0x7FFFF000, 0x80000000, 0xFFFFFFFF)
CLIP = synthetic(1.0, SAMPLE_RATE)


@pytest.fixture
def warnings(caplog):
    """The lines that were logged, without the name of the source."""
    caplog.set_level(logging.WARNING, "auricle")
    return lambda: [record.getMessage().partition(": ")[2] for record in caplog.records]


def fails(source, *parts: str, **options) -> None:
    with pytest.raises(AudioError) as caught:
        load_audio(source, **options)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


FAULTS = {
    "vbr_in.wav": ("seven three nine one four", None),
    "headless_vbr.mp3": ("one six three two eight five zero six", "its decoder complains"),
    "two_rates.mp2": ("one six three two eight five zero six", None),
    "joined.flac": ("one six three seven three nine one four", None),
    "size_half.wav": ("seven three nine one four", "states 32918 bytes of sound, all 65836 are heard"),
    "sox_pipe_24bit.wav": ("two eight five zero six", None),
    "crashed_recorder.wav": ("seven three nine one four", "states no sound"),
    "size_0.au": ("seven three nine one four", "states no sound"),
    "id3_first.wav": ("seven three nine one four", None),
    "inverted_sides.wav": ("seven three nine one four", "channel 1 alone is heard"),
}


@pytest.fixture(scope="module")
def digits():
    with load(ROOT / "tools" / "demo" / "digits.gguf", backend="cpu") as model:
        yield model


@needs_shared
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_said_in_faulty_files(digits, name, warnings, capfd):
    said, warning = FAULTS[name]
    assert digits.generate(audio=SHARED / "data" / "audio_faults" / name, temperature=0.0).text.strip() == said
    lines = warnings()
    assert any(warning in line for line in lines) if warning else not lines, lines
    assert "mpg123" not in capfd.readouterr().err


@needs_shared
def test_what_is_refused_of_faulty_files():
    fails(SHARED / "data" / "audio_faults" / "cut.sph", "is cut off", "only 1.19 s of 4.11 s")
    fails(SHARED / "data" / "audio_faults" / "m4a_named.gsm", "is an MP4/M4A/MOV file", "ffmpeg")


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_container(kind, channels, warnings):
    if kind == "voc" and channels > 2:
        pytest.skip("holds two channels at most")
    samples = synthetic(1.0, 22_050, channels)
    heard = load_audio(encode(samples, 22_050, kind))
    assert np.abs(heard - load_audio(samples, 22_050)).max() < 1e-4
    assert warnings() == []


SAMPLES = [
    *((kind, sub) for kind in ("wav", "au", "caf") for sub in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
    *(("aiff", sub) for sub in ("PCM_S8", "PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
    *(("w64", sub) for sub in ("PCM_U8", "PCM_24", "FLOAT", "ALAW", "MS_ADPCM", "GSM610")),
    *(("wav", sub) for sub in ("MS_ADPCM", "GSM610", "NMS_ADPCM_32")),
    *(("sph", sub) for sub in ("PCM_S8", "PCM_24", "PCM_32", "ULAW", "ALAW")),
    *(("voc", sub) for sub in ("PCM_U8", "ULAW", "ALAW")),
    *(("au", sub) for sub in ("PCM_S8", "G721_32", "G723_24")),
    ("caf", "ALAC_16"),
    ("aiff", "IMA_ADPCM"),
]


@pytest.mark.parametrize(("kind", "subtype"), SAMPLES)
def test_every_sample_type_as_libsndfile_reads_it(kind, subtype):
    data = encode(synthetic(0.5, 8_000), 8_000, kind, subtype)
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    heard = load_audio(data)
    reference = load_audio(samples, rate)[:8_000]  # what fills up a last block is no sound
    assert subtype == "IMA_ADPCM" or 8_000 <= len(heard) <= 8_320
    assert np.abs(heard[:7_700] - reference[:7_700]).max() < 1e-6


@pytest.mark.parametrize("endian", ["BIG", "LITTLE"])
@pytest.mark.parametrize("kind", ["wav", "au", "aiff", "caf", "sph"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_either_byte_order(kind, subtype, endian):
    if subtype == "FLOAT" and kind in ("sph", "aiff"):
        pytest.skip("no such files")
    heard = load_audio(encode(CLIP, SAMPLE_RATE, kind, subtype, endian=endian))
    assert np.abs(heard - CLIP).max() < 4e-5


@pytest.mark.parametrize("kind", SIZED)
def test_a_size_that_was_never_written(kind, warnings):
    data = encode(CLIP, SAMPLE_RATE, kind)
    assert np.array_equal(load_audio(with_size(data, kind, 0)), load_audio(data))
    assert len(warnings()) == 1
    assert f"states no sound, all {2 * len(CLIP)} bytes that follow are heard" in warnings()[0]


@pytest.mark.parametrize("kind", SIZED)
def test_a_size_that_is_too_small(kind, warnings):
    data = encode(CLIP, SAMPLE_RATE, kind)
    small = with_size(data, kind, size_of_sound(data, kind) // 2)
    assert np.array_equal(load_audio(small), load_audio(data))
    assert len(warnings()) == 1
    assert f"all {2 * len(CLIP)} are heard" in warnings()[0]


@pytest.mark.parametrize("kind", SIZED)
@pytest.mark.parametrize("channels", [1, 3, 5, 6])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_a_size_that_a_pipe_leaves_unknown(kind, subtype, channels, warnings):
    """Programs write a round number, or that number rounded down to whole frames, or less a header."""
    data = encode(synthetic(0.2, SAMPLE_RATE, channels), SAMPLE_RATE, kind, subtype)
    frame = channels * (2 if subtype == "PCM_16" else 3)
    sizes = [n for window in WINDOWS for n in (window, window - window % frame, window - 44)]
    for size in sizes + [(1 << 64) - 1] * (kind in ("caf", "w64")):
        assert np.array_equal(load_audio(with_size(data, kind, size)), load_audio(data)), hex(size)
    assert warnings() == []


@pytest.mark.parametrize("kind", SIZED)
def test_a_size_that_is_too_large_means_cut_off(kind):
    data = encode(CLIP, SAMPLE_RATE, kind)
    fails(with_size(data, kind, 2 * size_of_sound(data, kind)), "is cut off", "only 1.00 s of 2.0")


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("fraction", [0.9, 0.5])
def test_every_container_that_is_cut_off(kind, fraction):
    data = encode(CLIP, SAMPLE_RATE, kind)
    fails(data[: int(len(data) * fraction)], "is cut off or damaged, only 0.")


@pytest.mark.parametrize("kind", [*CONTAINERS, *LOSSY])
def test_joined_files_are_heard_one_after_the_other(kind, warnings):
    rate = 48_000
    one, two = (encode(synthetic(1.0, rate, channels, seed=channels), rate, kind) for channels in (1, 2))
    joined = load_audio(one + two)
    apart = np.concatenate([load_audio(one), load_audio(two)])
    assert abs(len(joined) - len(apart)) <= 2
    n = min(len(joined), len(apart))
    assert np.corrcoef(joined[:n], apart[:n])[0, 1] > 0.999
    assert warnings() == []


@pytest.mark.parametrize("kind", ["wav", "aiff", "au", "caf"])
def test_joined_files_of_unknown_size(kind):
    data = with_size(encode(CLIP, SAMPLE_RATE, kind), kind, 0xFFFFFFFF)
    assert np.array_equal(load_audio(data + data), np.concatenate([load_audio(data)] * 2))


def test_joined_files_of_different_rates():
    one, two = (encode(synthetic(1.0, rate), rate, kind) for rate, kind in ((8_000, "wav"), (44_100, "flac")))
    assert np.array_equal(load_audio(one + two), np.concatenate([load_audio(one), load_audio(two)]))


@pytest.mark.parametrize("kind", [*CONTAINERS, *LOSSY])
def test_tags_before_and_behind(kind, warnings):
    data = encode(synthetic(1.0, 48_000), 48_000, kind)
    whole = load_audio(data)
    tag = b"TAG" + bytes(125)
    ape = b"APETAGEX" + struct.pack("<4I", 2000, 2000, 1, 1 << 29 | 1 << 31) + bytes(8) + b"x" * 1968 + bytes(32)
    for variant in (ID3 + data, ID3 + ID3 + data, data + tag, data + ape + tag):
        assert np.array_equal(load_audio(variant), whole)
    assert warnings() == []


def test_what_stands_behind_is_told(warnings):
    data = encode(CLIP, SAMPLE_RATE, "sph")
    rest = np.random.default_rng(0).bytes(5_000)
    assert np.array_equal(load_audio(encode(CLIP, SAMPLE_RATE, "voc")[:-1] + b"\0" + bytes(900)), load_audio(data))
    assert warnings() == []
    ogg = encode(CLIP, SAMPLE_RATE, "ogg")
    assert np.array_equal(load_audio(ogg + rest), load_audio(ogg))
    assert warnings() == ["5000 bytes behind its sound are of no known kind and left out"]


@pytest.mark.parametrize("suffix", ["au", "snd", "vox", "gsm", "raw", "wav", "mp3", "ul", "al", "flac"])
def test_a_name_makes_no_sound_of_bytes(tmp_path, suffix):
    path = tmp_path / f"noise.{suffix}"
    for content in (np.random.default_rng(0).bytes(30_000), bytes(30_000), b"\0\0\0\x20ftypM4A " + b"\x21" * 9_000):
        path.write_bytes(content)
        fails(path, f"noise.{suffix}: is ", "ffmpeg")


def test_a_name_hides_no_sound(tmp_path):
    for kind in CONTAINERS:
        data = encode(CLIP, SAMPLE_RATE, kind)
        (tmp_path / "sound.raw").write_bytes(data)
        assert np.array_equal(load_audio(tmp_path / "sound.raw"), load_audio(data))


def test_kinds_that_cannot_be_checked_are_refused():
    for kind, name in (("SVX", "8SVX"), ("AVR", "AVR"), ("PAF", "PARIS"), ("IRCAM", "IRCAM"), ("PVF", "PVF")):
        buffer = io.BytesIO()
        soundfile.write(buffer, CLIP, SAMPLE_RATE, format=kind, subtype="PCM_S8" if kind == "SVX" else "PCM_16")
        fails(buffer.getvalue(), name, "convert it first")
    wav = bytearray(encode(CLIP, SAMPLE_RATE, "wav"))
    wav[20:22] = b"\xff\x00"
    fails(bytes(wav), "WAV file of format 0x00ff", "convert it first")


def test_flac_that_states_less_than_there_is(warnings):
    data = bytearray(encode(CLIP, SAMPLE_RATE, "flac"))
    whole = load_audio(bytes(data))
    data[22:26] = struct.pack(">I", len(CLIP) // 2)
    assert np.array_equal(load_audio(bytes(data)), whole)
    assert warnings() == ["its header states 0.50 s, all 1.00 s are heard"]


def test_ogg_without_its_end_and_with_a_hole(warnings):
    data = encode(synthetic(20.0, 44_100), 44_100, "ogg")
    pages = [at for at in range(len(data)) if data.startswith(b"OggS\0", at)]
    load_audio(data[: pages[-1]])
    assert warnings() == ["its last Ogg page is missing, so it may be cut off"]
    middle = len(pages) // 2
    with pytest.raises(AudioError, match="cut off or damaged, only"):
        load_audio(data[: pages[middle]] + data[pages[middle + 1] :])


def test_voc_of_several_blocks(warnings):
    sound = synthetic(0.4, 8_000)
    raw = np.round(sound * 127 + 128).astype(np.uint8).tobytes()
    head = b"Creative Voice File\x1a\x1a\0\x0a\x01\x29\x11"
    block = lambda kind, content: bytes([kind]) + len(content).to_bytes(3, "little") + content  # noqa: E731
    data = head + block(5, b"made by hand\0") + block(1, b"\x83\0" + raw[:1000]) + block(2, raw[1000:2000])
    data += block(4, b"\1\0") + block(1, b"\x83\0" + raw[2000:]) + b"\0"
    assert np.abs(load_audio(data) - load_audio(sound, 8_000)).max() < 0.02
    assert warnings() == []
    fails(data[:2300], "cut off or damaged, only 0.2")
    fails(head + block(1, b"\x83\3" + raw), "codec 3", "convert it first")


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_length_by_the_headers_alone(kind):
    data = encode(synthetic(1.5, 8_000), 8_000, kind)
    assert count_samples(data) == len(load_audio(data)) == 24_000
    assert count_samples(data + data) == 48_000
    assert count_samples(encode(CLIP, SAMPLE_RATE, "mp3")) == len(load_audio(encode(CLIP, SAMPLE_RATE, "mp3")))


def test_text_behind_the_sound_is_no_sound(warnings):
    data = encode(CLIP, SAMPLE_RATE, "wav")
    assert np.array_equal(load_audio(data + b"<xml>made by hand</xml>\n" * 100), load_audio(data))
    assert warnings() == ["2400 bytes behind its sound are of no known kind and left out"]
