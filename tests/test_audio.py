"""Decoding and resampling: every source and format, every bad input. Oracles: soundfile and soxr in one call each."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile

from auricle.engine.audio import AudioError, load_audio
from auricle.engine.mpeg import frame_mpeg
from sounds import JFK, LOSSLESS, LOSSY, RATES, SAMPLE_RATE, encode, expected, synthetic
from support import SHARED, needs_shared


def fails(source, *parts: str, **options) -> str:
    """Asserts that loading raises one AudioError of one line that has all the parts, and returns its text."""
    with pytest.raises(AudioError) as caught:
        load_audio(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def attempt(source) -> np.ndarray | str:
    """The samples, or the text of the AudioError; anything else that is raised goes on."""
    try:
        return load_audio(source, max_seconds=60)
    except AudioError as error:
        return str(error)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("kind", "rate"),
    [(kind, rate) for kind in (*LOSSLESS, *LOSSY) for rate in RATES if kind != "opus" or rate in (8_000, 48_000)],
)
def test_every_source_gives_the_same(tmp_path, kind, rate, channels):
    samples = synthetic(4.321, rate, channels)  # more than one block
    data = encode(samples, rate, kind)
    path = tmp_path / f"clip.{kind}"
    path.write_bytes(data)
    heard = load_audio(path)
    assert heard.dtype == np.float32
    assert heard.flags.writeable
    assert np.array_equal(load_audio(str(path)), heard)
    assert np.array_equal(load_audio(data), heard)
    assert np.array_equal(load_audio(bytearray(data)), heard)
    assert np.array_equal(load_audio(io.BytesIO(data)), heard)
    with open(path, "rb") as file:
        assert np.array_equal(load_audio(file), heard)

    reference = expected(samples, rate)
    if kind in LOSSLESS:
        assert heard.shape == reference.shape
        assert np.abs(heard - reference).max() < 2e-4  # 16 bits, and the overshoot of a filter
    else:
        n = min(len(heard), len(reference))
        assert abs(len(heard) - len(reference)) < 0.03 * SAMPLE_RATE
        assert np.corrcoef(heard[:n], reference[:n])[0, 1] > 0.97


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("rate", [*RATES, SAMPLE_RATE])
def test_blocks_leave_no_trace(rate, channels):
    """Float files and arrays, through the whole path at once by numpy and soxr, and block by block by us."""
    samples = synthetic(70_001 / rate * 2, rate, channels)
    reference = expected(samples, rate)
    for heard in (load_audio(encode(samples, rate, "wav", "FLOAT")), load_audio(samples, sample_rate=rate)):
        assert heard.shape == reference.shape
        assert np.abs(heard - reference).max() < 1e-6


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM"])
def test_wav_subtypes(subtype):
    samples = synthetic(1.0, SAMPLE_RATE)
    heard = load_audio(encode(samples, SAMPLE_RATE, "wav", subtype))
    close = {"PCM_U8": 1e-2, "ULAW": 3e-2, "IMA_ADPCM": 0.3, "FLOAT": 0, "DOUBLE": 0}.get(subtype, 4e-5)
    assert np.abs(heard[: len(samples)] - samples).max() <= close


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "float16", "float64", ">f4", ">i2"])
def test_array_types(dtype):
    samples = synthetic(1.0, SAMPLE_RATE, 2)
    kind, bits = np.dtype(dtype).kind, 8 * np.dtype(dtype).itemsize
    full = 2.0 ** (bits - 1)
    array = samples if kind == "f" else np.round(samples * full) + (full if kind == "u" else 0)
    heard = load_audio(array.astype(dtype))
    assert np.abs(heard - samples.mean(axis=1)).max() < (
        max(1.0 / full, 1e-7) if kind != "f" else 2e-3 if bits == 16 else 1e-7
    )


def test_integer_array_is_the_file_of_the_same_integers():
    array = (synthetic(1.0, 44_100, 2) * 32_767).astype(np.int16)
    assert np.array_equal(load_audio(array, sample_rate=44_100), load_audio(encode(array, 44_100, "flac")))


def test_array_is_copied_and_may_be_strided():
    samples = synthetic(0.5, SAMPLE_RATE)
    heard = load_audio(samples)
    assert np.array_equal(heard, samples)
    assert not np.shares_memory(heard, samples)
    assert np.array_equal(load_audio(np.repeat(samples, 3)[::3]), samples)
    assert np.array_equal(load_audio(np.asfortranarray(np.stack([samples, samples], 1))), samples)


def test_file_object_is_read_from_where_it_stands():
    data = encode(synthetic(0.5, SAMPLE_RATE), SAMPLE_RATE, "wav")
    file = io.BytesIO(b"prefix" + data)
    file.seek(6)
    assert np.array_equal(load_audio(file), load_audio(data))
    fails(file, "empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe(tmp_path):
    data = encode(synthetic(2.0, 22_050), 22_050, "wav")
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(data))
    writer.start()
    heard = load_audio(pipe)
    writer.join()
    assert np.array_equal(heard, load_audio(data))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 0x80000000])
def test_wav_of_a_pipe_states_no_size(size):
    """ffmpeg, sox and arecord write these where they cannot go back to fill in the size."""
    samples = synthetic(1.0, SAMPLE_RATE)
    data = bytearray(encode(samples, SAMPLE_RATE, "wav"))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    data[4:8] = struct.pack("<I", min(size + at - 4, 0xFFFFFFFF))
    assert len(load_audio(bytes(data))) == len(samples)


def test_flac_of_a_pipe_and_with_tags():
    samples = synthetic(5.0, SAMPLE_RATE)
    data = bytearray(encode(samples, SAMPLE_RATE, "flac"))
    whole = load_audio(bytes(data))
    assert np.array_equal(load_audio(bytes(data) + b"TAG" + bytes(125)), whole)
    data[21] &= 0xF0  # the 36 bits of the total number of samples
    data[22:26] = bytes(4)
    assert np.array_equal(load_audio(bytes(data)), whole)
    assert "cut off or damaged after" in fails(bytes(data[: len(data) // 2]))


def test_max_seconds():
    samples = synthetic(2.0, 8_000)
    assert len(load_audio(samples, 8_000, max_seconds=2.0)) == 32_000
    fails(samples, "longer than the limit of 1.5 s", sample_rate=8_000, max_seconds=1.5)
    fails(encode(samples, 8_000, "mp3"), "longer than the limit of 1.5 s", max_seconds=1.5)


def vbr(rate: int, quiet_first: bool) -> np.ndarray:
    loud = 0.2 * np.random.default_rng(0).standard_normal(5 * rate).astype(np.float32)
    tone = 0.01 * np.sin(np.arange(5 * rate, dtype=np.float32))
    return np.concatenate([tone, loud] if quiet_first else [loud, tone])


def without_info(data: bytes) -> bytes:
    """An mp3 without its Info frame, as a recorder of a stream writes it."""
    at = data.index(b"Xing") if b"Xing" in data[:1000] else data.index(b"Info")
    return data[data.index(data[:2], at) :]


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("quiet_first", [True, False])
def test_mp3_of_variable_rate_without_length_is_heard_whole(rate, quiet_first, capfd):
    """libsndfile alone guesses the length from the first frame: it loses a half, or promises twice as much."""
    data = encode(vbr(rate, quiet_first), rate, "mp3", bitrate_mode="VARIABLE")
    whole, stripped = load_audio(data), load_audio(without_info(data))
    assert abs(len(whole) - 10 * SAMPLE_RATE) <= 1
    assert 0 <= len(stripped) - len(whole) < 0.1 * SAMPLE_RATE
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000])
def test_mp3_is_decoded_without_seeking(rate, capfd):
    """A seek after each block, soundfile's habit, costs the decoder borrowed bits: noise in the audio and on stderr."""
    samples = vbr(rate, quiet_first=False)
    data = encode(samples, rate, "mp3", bitrate_mode="VARIABLE")
    decoder_input = io.BytesIO(frame_mpeg(data)[0].audio(data))
    assert decoder_input.getvalue() == data  # a file in order is passed on as it is
    with soundfile.SoundFile(decoder_input) as file:
        once = file.read(10 * rate, dtype="float32")
    capfd.readouterr()
    assert np.abs(load_audio(data) - expected(once, rate)).max() < 1e-6
    assert capfd.readouterr().err == ""


def test_mp3_joined_tagged_and_interrupted(capfd):
    data = encode(synthetic(3.0, 44_100, 2), 44_100, "mp3")
    whole = load_audio(data)
    id3 = b"ID3\x04\x00\x00\x00\x00\x10\x00" + bytes(range(256)) * 8
    for variant in (id3 + data, data + b"TAG" + bytes(125), id3 + id3 + data + bytes(50_000)):
        assert np.array_equal(load_audio(variant), whole)
    assert len(load_audio(data + id3 + data)) > 1.99 * len(whole)
    frame_bytes = [len(data) // 3, len(data) // 2]
    at = data.index(data[:2], frame_bytes[0])
    assert len(load_audio(data[:at] + id3 + data[at:])) == len(whole)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("other", [(22_050, 1), (44_100, 2), (8_000, 2)])
def test_mp3_that_changes_its_rate_or_channels_is_heard_whole(other, capfd):
    parts = [encode(synthetic(1.0, rate, channels), rate, "mp3") for rate, channels in ((44_100, 1), other)]
    one, two = map(load_audio, parts)
    joined = load_audio(b"".join(parts))
    assert len(joined) == len(one) + len(two)
    different = np.flatnonzero(np.abs(joined - np.concatenate([one, two])) > 1e-4)
    assert np.abs(different - len(one)).max(initial=0) < 200  # where one resampler goes on
    assert capfd.readouterr().err == ""


def test_no_such_file_directory_empty_file(tmp_path):
    fails(tmp_path / "none.wav", f"{tmp_path}/none.wav: no such file")
    fails(str(tmp_path), "is a directory")
    (tmp_path / "empty.wav").touch()
    fails(tmp_path / "empty.wav", "empty.wav: is empty (0 bytes)")
    fails(b"", "is empty")
    fails(io.BytesIO(), "is empty")
    fails("two\nlines\x00.wav", "no such file")
    fails("x" * 5000, "cannot be read")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "locked.wav"
    path.write_bytes(b"RIFF")
    path.chmod(0)
    fails(path, "Permission denied")


def test_text_and_foreign_kinds(tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("Dear diary,\nтак и так — audio it is not.\n" * 300)
    fails(path, "notes.wav: is text, not audio")
    fails(b"name,value\n1,2\n", "is text, not audio")
    fails(b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(3000), "MP4/M4A", "ffmpeg")
    fails(b"\0\0\0\x18ftypmp42" + bytes(3000), "MP4", "ffmpeg")
    fails(b"\x1a\x45\xdf\xa3" + bytes(3000), "WebM", "ffmpeg")
    fails(b"\xff\xf1\x50\x80" + os.urandom(3000), "AAC", "ffmpeg")
    fails(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(3000), "WMA", "ffmpeg")
    fails(bytes(3000), "unknown kind", "ffmpeg")
    fails(b"\x89PNG\r\n\x1a\n" + bytes(3000), "is a picture")
    fails(b"RIFF\x24\0\0\0WAVE", "damaged")
    (tmp_path / "pcm.raw").write_bytes(bytes(4000))
    fails(tmp_path / "pcm.raw", "sample_rate")


@pytest.mark.parametrize("kind", ["wav", "aiff", "w64", "flac", "mp3"])
@pytest.mark.parametrize("fraction", [0.95, 0.5, 0.2])
def test_cut_off_files(tmp_path, kind, fraction, capfd):
    data = encode(synthetic(6.0, 44_100, 2), 44_100, kind)
    cut = data[: int(len(data) * fraction)]
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(cut)
    message = fails(path, f"cut.{kind}: is cut off or damaged, only ", " can be decoded", "ffmpeg")
    have, _, promised = message.split("only ")[1].split(" can")[0].replace(" s", "").partition(" of ")
    assert abs(float(promised) - 6.0) < 0.06
    slack = 1.6 if kind == "flac" else 0.5  # FLAC loses the block that fails
    assert -slack < float(have) - 6.0 * fraction < 0.5
    assert "cut off or damaged" in fails(cut)
    assert capfd.readouterr().err == ""


@needs_shared
@pytest.mark.parametrize("name", ["test_en.mp3", "test_zh.mp3"])
def test_cut_off_recordings(name, capfd):
    data = (SHARED / "data" / "audio" / name).read_bytes()
    for n in (50, 300, 700, 2_000, len(data) // 2, len(data) - 8_000):
        fails(data[:n])
    assert capfd.readouterr().err == ""


def test_cut_off_without_a_stated_length(capfd):
    data = without_info(encode(synthetic(3.0, 44_100), 44_100, "mp3"))
    fails(data[: len(data) // 2 + 5], "is cut off inside an mp3 frame after 1.")
    ogg = encode(synthetic(6.0, 44_100), 44_100, "ogg")
    fails(ogg[: len(ogg) // 2], "is cut off inside an Ogg page", "ffmpeg")
    fails(ogg[: len(ogg) - 3], "is cut off inside an Ogg page")
    assert capfd.readouterr().err == ""


def test_every_truncation_is_an_error_or_whole():
    """Never a crash, never noise, never less than 95 % of the audio without an error."""
    for kind in ("wav", "flac", "ogg", "mp3", "opus"):
        rate = 48_000 if kind == "opus" else 22_050
        data = encode(synthetic(0.6, rate), rate, kind)
        for n in [*range(0, 300, 7), *range(300, len(data), len(data) // 40)]:
            heard = attempt(data[:n])
            if isinstance(heard, str):
                assert "\n" not in heard
            else:
                assert len(heard) > 0.8 * 0.6 * SAMPLE_RATE, (kind, n, len(data))


def test_random_damage_never_crashes():
    rng = np.random.default_rng(7)
    for kind in ("wav", "flac", "ogg"):
        data = encode(synthetic(0.6, 22_050), 22_050, kind)
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, min(len(data), 2000), 4):
                damaged[at] = rng.integers(256)
            heard = attempt(bytes(damaged))
            assert "\n" not in heard if isinstance(heard, str) else np.isfinite(heard).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(bad):
    samples = synthetic(10.0, 44_100, 2)
    samples[352_800, 1] = bad
    fails(encode(samples, 44_100, "wav", "FLOAT"), "sample at 8.0000 s is NaN or infinite")
    fails(samples, "sample at 8.0000 s is NaN or infinite", sample_rate=44_100)
    fails(np.full(1000, 1e300), "sample at 0.0000 s is NaN or infinite")


@pytest.mark.parametrize("n", [1, 159, 160])
def test_too_short(n):
    fails(np.zeros(n, np.float32), "too short", f"{n} samples", "more than one frame of 10 ms")
    fails(encode(np.zeros(n), SAMPLE_RATE, "wav"), "too short", "10 ms")
    fails(np.zeros(3 * n - 2, np.float32), "too short", sample_rate=48_000)


@pytest.mark.parametrize("n", [161, 200, 399])
def test_shortest(n):
    assert len(load_audio(np.zeros(n, np.float32))) == n
    assert len(load_audio(encode(np.zeros(n), SAMPLE_RATE, "wav"))) == n


def test_no_samples():
    fails(np.zeros(0, np.float32), "holds no audio samples")
    fails(np.zeros((0, 2), np.int16), "holds no audio samples")
    fails(encode(np.zeros(0), SAMPLE_RATE, "wav"), "holds no audio samples")


@pytest.mark.parametrize("rate", [0, -16_000, 999, 10**9, float("nan"), float("inf"), "16000", 16_000j])
def test_absurd_rates(rate):
    fails(np.zeros(16_000, np.float32), repr(rate), "Hz", sample_rate=rate)


def test_absurd_rate_of_a_file():
    data = bytearray(encode(np.zeros(16_000), SAMPLE_RATE, "wav"))
    data[24:28] = struct.pack("<I", 3)
    fails(bytes(data), "sample rate 3 ", "Hz")
    fails(encode(np.zeros(16_000), SAMPLE_RATE, "wav"), "leave it out", sample_rate=16_000)


def test_arrays_of_wrong_shape_or_type():
    fails(np.array(1.0, np.float32), "[n_samples]")
    fails(np.zeros((2, 3, 4), np.float32), "[2, 3, 4]", "[n_samples, n_channels]")
    fails(np.zeros((2, 16_000), np.float32), "16000 channels", "[n_samples, n_channels]")
    fails(np.zeros((16_000, 0), np.float32), "0 channels")
    for dtype in ("complex64", "int64", "uint64", "bool", "object", "U1"):
        fails(np.zeros(16_000, dtype), str(np.dtype(dtype)), "full scale")


@pytest.mark.parametrize("source", [None, 3, [0.0] * 16_000, object()])
def test_no_audio_at_all(source):
    fails(source, type(source).__name__, "numpy array")


def test_text_mode_file_object():
    fails(io.StringIO("RIFF"), "binary mode")


def test_import_loads_no_decoder_and_no_torch():
    code = (
        "import sys; before = set(sys.modules); import auricle.engine.audio; "
        "sys.exit(', '.join({'torch', 'soundfile', 'soxr', 'scipy', 'transformers'} & set(sys.modules) - before) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_shared
def test_data_is_the_shared_recording():
    ours, rate = soundfile.read(JFK, dtype="int16")
    theirs, their_rate = soundfile.read(SHARED / "data" / "audio" / "jfk.wav", dtype="int16")
    assert rate == their_rate == SAMPLE_RATE
    assert np.array_equal(ours, theirs)
    assert np.array_equal(load_audio(JFK), load_audio(SHARED / "data" / "audio" / "jfk.wav"))
