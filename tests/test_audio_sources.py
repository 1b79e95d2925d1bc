"""Where sound comes from: pipes, odd file objects, arrays of a wrong scale, and how much of it is read at most."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from auricle.engine import load
from auricle.engine.audio import AudioError, LengthError, load_audio
from sounds import SAMPLE_RATE, encode, silent_mpeg, synthetic, with_size
from support import ROOT

DEMO = ROOT / "tools" / "demo" / "digits.gguf"
CLIP = synthetic(1.0, SAMPLE_RATE)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "auricle")
    return lambda: [record.getMessage().partition(": ")[2] for record in caplog.records]


def fails(source, *parts: str, kind: type[AudioError] = AudioError, **options) -> None:
    with pytest.raises(kind) as caught:
        load_audio(source, **options)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


class Pieces:
    """A file object that gives what a socket might: never as much as it was asked for."""

    def __init__(self, data: bytes, n_bytes: int) -> None:
        self._file, self._n_bytes = io.BytesIO(data), n_bytes

    def read(self, n: int = -1) -> bytes:
        return self._file.read(self._n_bytes if n < 0 else min(n, self._n_bytes))


class Endless:
    """A head, and then the same bytes for ever."""

    def __init__(self, head: bytes, more: bytes) -> None:
        self._pending, self._more, self.n_read = head, more, 0

    def read(self, n: int) -> bytes:
        while len(self._pending) < n:
            self._pending += self._more * max(1, n // len(self._more))
        piece, self._pending = self._pending[:n], self._pending[n:]
        self.n_read += n
        return piece


@pytest.mark.parametrize("n_bytes", [1, 777, 65_537])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
def test_short_pieces(kind, n_bytes):
    data = encode(CLIP, SAMPLE_RATE, kind)
    assert np.array_equal(load_audio(Pieces(data, n_bytes)), load_audio(data))


def test_file_objects_that_do_not_read(tmp_path):
    class Nothing:
        def read(self, n: int = -1) -> None:
            return None

    class Broken:
        def read(self, n: int = -1) -> bytes:
            raise OSError("the line is dead")

    class Odd:
        def read(self) -> bytes:
            return b""

    fails(Nothing(), "nothing to read yet", "blocking")
    fails(Broken(), "the line is dead")
    fails(Odd(), "file object: cannot be read")
    closed = io.BytesIO(b"RIFF")
    closed.close()
    fails(closed, "closed file")
    fails("", "the name of the audio file is empty")
    fails(type("Path", (), {"__fspath__": lambda self: ""})(), "the name of the audio file is empty")


@pytest.mark.parametrize("options", [{}, {"sample_rate": 16_000}])
def test_arrays_of_other_libraries_and_lists(options):
    import torch

    fails(torch.zeros(16_000), "Tensor is no audio; give x.detach().cpu().numpy()", **options)
    fails([0.0] * 16_000, "list is no audio; give numpy.asarray(", **options)
    fails((0.0,) * 16_000, "tuple is no audio", **options)
    fails(7, "int is no audio", **options)
    fails(None, "NoneType is no audio", **options)


def test_a_rate_with_a_file():
    data = encode(CLIP, SAMPLE_RATE, "wav")
    for source in (data, bytearray(data), io.BytesIO(data), "a.wav", ROOT):
        fails(source, "sample_rate=16000 goes with an array", sample_rate=16_000)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_at_integer_scale(dtype):
    samples = (CLIP * 32_767).astype(dtype)
    fails(samples, "where full scale is 1; divide by", "32768")
    fails(np.stack([samples, -samples], 1), "where full scale is 1")
    assert len(load_audio((CLIP * 15 / np.abs(CLIP).max()).astype(dtype))) == len(CLIP)  # loud, and no mistake


@pytest.mark.parametrize("kind", ["wav", "au", "caf", "aiff"])
def test_float_files_at_integer_scale(kind):
    fails(encode(CLIP * 32_767, SAMPLE_RATE, kind, "FLOAT"), "the sample at 0.", "where full scale is 1")
    spike = CLIP.copy()
    spike[8_000] = -16.5
    fails(encode(spike, SAMPLE_RATE, kind, "FLOAT"), "the sample at 0.5000 s is -16.5")
    spike[8_000] = -15.5
    assert load_audio(encode(spike, SAMPLE_RATE, kind, "FLOAT"))[8_000] == -15.5


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_channels_that_cancel_are_heard_by_the_loudest(channels, warnings):
    sides = np.stack([CLIP, -CLIP] * (channels // 2), 1) * np.float32(0.5)
    sides[:, 1] *= 1.01
    sides[:, -1] *= 1.0 + 0.05 * (channels == 2)
    loudest = int(np.argmax((sides**2).sum(0)))
    for source in (sides, encode(sides, SAMPLE_RATE, "wav", "FLOAT")):
        assert np.array_equal(load_audio(source), sides[:, loudest])
    assert warnings() == [f"its channels cancel each other out; channel {loudest + 1} alone is heard"] * 2


def test_channels_that_cancel_for_a_while(warnings):
    clip = synthetic(20.0, SAMPLE_RATE)
    sides = np.stack([clip, clip], 1)
    sides[200_000:, 1] *= -1
    assert np.array_equal(load_audio(sides), clip)
    assert len(warnings()) == 1


def test_channels_that_do_not_cancel(warnings):
    rng = np.random.default_rng(0)
    unlike = rng.standard_normal((SAMPLE_RATE, 6)).astype(np.float32) * 0.1
    one_side = np.stack([CLIP, 0 * CLIP], 1)
    silent = np.zeros((SAMPLE_RATE, 2), np.float32)
    for sides in (unlike, one_side, silent, np.stack([CLIP, -0.5 * CLIP], 1)):
        assert np.abs(load_audio(sides) - sides.mean(1)).max() < 1e-6
    assert warnings() == []


def hours_of_silence(hours: float, rate: int = 16_000) -> bytes:
    return encode(np.zeros(round(hours * 3600 * rate), np.int16), rate, "flac")


@pytest.fixture(scope="module")
def silence() -> bytes:
    return hours_of_silence(1.0)


def test_what_is_too_long_by_its_header_is_not_decoded(silence, monkeypatch):
    monkeypatch.setattr("auricle.engine.audio._Listener", None)  # nobody listens
    fails(silence, "is longer than the limit of 600 s", kind=LengthError, max_seconds=600)
    wav = encode(np.zeros(80_000, np.int16), 8_000, "wav")
    fails(wav, "limit of 9 s", kind=LengthError, max_seconds=9)
    fails(silent_mpeg(2, [3] * 500), "limit of 9 s", kind=LengthError, max_seconds=9)


def test_what_is_too_long_is_decoded_no_further(silence):
    """Without a stated length; a 60th of an hour is decoded."""
    unstated = silence[:21] + bytes([silence[21] & 0xF0]) + bytes(4) + silence[26:]
    tracemalloc.start()
    fails(unstated, "is longer than the limit of 60 s", kind=LengthError, max_seconds=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 60 * 4 * SAMPLE_RATE


@pytest.mark.parametrize("kind", ["wav", "au", "caf", "mp3"])
def test_an_endless_stream_is_read_no_further(kind):
    rate = 16_000
    data = encode(synthetic(4.0, rate), rate, kind)
    if kind == "mp3":
        source = Endless(data, data)
    else:
        source = Endless(with_size(data, kind, 0xFFFFFFFF), np.random.default_rng(0).bytes(1 << 16))
    fails(source, "is longer than the limit of 60 s", kind=LengthError, max_seconds=60)
    assert source.n_read < 16 << 20


@pytest.mark.parametrize("more", [b"\0", b"\xff", b"\xff\xfb", b"RIFF", b"noise \x80\x81\x82"])
def test_an_endless_stream_of_nothing_is_refused_at_once(more):
    source = Endless(b"", more)
    fails(source, "file object: is ")
    assert source.n_read <= 2 << 20


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_devices():
    fails("/dev/zero", "/dev/zero: is damaged or of an unknown kind")
    fails("/dev/null", "is empty")


def test_a_model_reads_no_more_than_its_context_holds(silence):
    with load(DEMO, backend="cpu", n_ctx=256) as model, pytest.raises(LengthError, match="longer than the limit of"):
        model.listen(silence)


def test_the_program_reads_stdin_no_further_than_it_can_hear(silence):
    command = [sys.executable, "-m", "auricle.tools", "transcribe", "-", "-m", str(DEMO), "--ctx", "256"]
    done = subprocess.run(command, input=silence, capture_output=True, timeout=120, check=False)
    assert done.returncode == 5, done.stderr
    assert b"<stdin>: is longer than the limit of" in done.stderr
