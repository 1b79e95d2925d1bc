"""MPEG audio: every frame of every layer is counted, wherever the stream begins and whatever its headers promise."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import threading

import numpy as np
import pytest

from auricle.engine.audio import AudioError, load_audio
from auricle.engine.codec import Complaints, hushed
from auricle.engine.mpeg import frame_mpeg
from sounds import SAMPLE_RATE, encode, in_wave, silent_mpeg, synthetic

ICY = b"ICY 200 OK\r\nicy-name: Radio \xc3\x84\r\nContent-Type: audio/mpeg\r\nicy-br: 64\r\n\r\n"


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "auricle")
    return lambda: [record.getMessage().partition(": ")[2] for record in caplog.records]


def vbr(rate: int = 22_050, seconds: float = 6.0) -> bytes:
    """Quiet, then loud: the first frames are small. Without a length header, as a stream is recorded."""
    n = round(seconds / 2 * rate)
    loud = 0.2 * np.random.default_rng(0).standard_normal(n).astype(np.float32)
    quiet = 0.01 * np.sin(np.arange(n, dtype=np.float32))
    data = encode(np.concatenate([quiet, loud]), rate, "mp3", bitrate_mode="VARIABLE")
    return data[data.index(data[:2], data.index(b"Xing")) :]


def seconds(data: bytes) -> float:
    return len(load_audio(data)) / SAMPLE_RATE


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(("mono", "rate"), [(True, 0), (False, 1), (True, 2)])
def test_layers_of_several_bit_rates(layer, mono, rate):
    bitrates = [3] * 20 + [14] * 300 + [9, 4] * 50
    frame = (384 if layer == 1 else 1152) / (44_100, 48_000, 32_000)[rate]
    data = silent_mpeg(layer, bitrates, rate, mono)
    assert seconds(data) == pytest.approx(len(bitrates) * frame, abs=1e-3)
    assert seconds(silent_mpeg(layer, bitrates[::-1], rate, mono, padding=True)) == pytest.approx(
        len(bitrates) * frame, abs=1e-3
    )
    with pytest.raises(AudioError, match="is cut off inside an mp3 frame"):
        load_audio(data[:-9])


@pytest.mark.parametrize("layer", [1, 2])
def test_free_bit_rate(layer):
    frame = (384 if layer == 1 else 1152) / 48_000
    streams = frame_mpeg(silent_mpeg(layer, [0] * 40))
    assert [(stream.n_frames, stream.frame.n_bytes) for stream in streams] == [(40, 500)]
    assert seconds(silent_mpeg(layer, [0] * 40)) == pytest.approx(40 * frame, abs=1e-3)


@pytest.mark.parametrize("tag", [0x50, 0x55])
def test_inside_a_wave_file(tag, capfd):
    data = vbr()
    assert np.array_equal(load_audio(in_wave(data, tag, 22_050)), load_audio(data))
    layer_2 = silent_mpeg(2, [3] * 20 + [14] * 100)
    assert seconds(in_wave(layer_2, tag, 48_000)) == pytest.approx(seconds(layer_2))
    with pytest.raises(AudioError, match="is cut off"):
        load_audio(in_wave(data, tag, 22_050)[: -len(data) // 4])
    assert capfd.readouterr().err == ""


def test_a_stream_that_begins_anywhere(warnings, capfd):
    data = vbr()
    whole = load_audio(data)
    first = frame_mpeg(data)[0].spans
    for skipped in (first[0].start + 10, first[1].start + 1, first[2].stop - 3):
        heard = load_audio(data[skipped:])
        assert 0 < len(whole) - len(heard) < 0.1 * SAMPLE_RATE
    for before in (ICY, b"HTTP/1.0 200 OK\r\n\r\n" + ICY, bytes(5_000)):
        assert np.array_equal(load_audio(before + data), whole)
    assert np.array_equal(load_audio(ICY + silent_mpeg(2, [3] * 50)), load_audio(silent_mpeg(2, [3] * 50)))
    assert not any("no MPEG audio" in line for line in warnings())
    assert capfd.readouterr().err == ""


def test_bytes_that_are_no_audio_are_told(warnings):
    data = vbr()
    middle = frame_mpeg(data)[0].spans[100].start
    junk = np.random.default_rng(1).bytes(20_000)
    heard = load_audio(data[:middle] + junk + data[middle:])
    assert abs(len(heard) - len(load_audio(data))) <= 0.1 * SAMPLE_RATE
    assert any("bytes between its frames are no MPEG audio, about" in line for line in warnings())


def test_a_length_header_that_lies(warnings):
    data = encode(synthetic(3.0, 44_100), 44_100, "mp3")
    at = (data.index(b"Xing") if b"Xing" in data[:100] else data.index(b"Info")) + 8
    for n_frames in (0, 7):
        lie = data[:at] + struct.pack(">I", n_frames) + data[at + 4 :]
        assert np.array_equal(load_audio(lie), load_audio(data))
    with pytest.raises(AudioError, match=r"is cut off or damaged, only 3\.0"):
        load_audio(data[:at] + struct.pack(">I", 10_000) + data[at + 4 :])


def test_a_length_header_of_a_frame_with_a_checksum(capfd):
    """LAME protects the frame and leaves no room for the checksum before the header."""
    data = bytearray(encode(synthetic(3.0, 44_100), 44_100, "mp3"))
    data[1] &= 0xFE
    frame = frame_mpeg(bytes(data))[0]
    assert (frame.n_promised, frame.states_length) == (frame.n_frames, True)
    assert frame_mpeg(bytes(data) * 2)[0].n_promised == 2 * frame.n_frames
    assert len(load_audio(bytes(data) * 2)) > 5.9 * SAMPLE_RATE
    assert capfd.readouterr().err == ""


def test_noise_with_sync_words_is_no_mpeg():
    noise = bytearray(np.random.default_rng(2).bytes(200_000))
    for at in range(0, len(noise), 997):
        noise[at : at + 4] = b"\xff\xfb\x90\xc4"
    with pytest.raises(AudioError, match="unknown kind"):
        load_audio(b"\x01" + bytes(noise))


def test_damage_is_told_in_the_log_and_not_by_the_decoder(warnings, capfd):
    data = bytearray(vbr())
    for span in frame_mpeg(bytes(data))[0].spans[50:60]:
        data[span.start + 4 : span.stop] = b"\xa5" * (span.stop - span.start - 4)
    assert len(load_audio(bytes(data))) > 5 * SAMPLE_RATE
    assert any("is damaged, its decoder complains" in line for line in warnings())
    assert capfd.readouterr().err == ""


def test_what_others_write_to_stderr_meanwhile_arrives(capfd):
    complaints = Complaints()
    with hushed(complaints, re.compile("libmpg123")):
        os.write(2, b"[src/libmpg123/layer3.c] error: big_values\nauricle: a line\n")
        writer = threading.Thread(target=os.write, args=(2, b"another\n"))
        writer.start()
        writer.join()
    assert capfd.readouterr().err == "auricle: a line\nanother\n"
    assert complaints.lines == ["[src/libmpg123/layer3.c] error: big_values\n"]
    assert len(load_audio(io.BytesIO(vbr()))) > 0


def test_a_table_of_numbers_is_no_mpeg():
    """Its rows are as long as frames of layer I, and some begin with set bits."""
    row = silent_mpeg(1, [1])
    for n_rows in (2, 5, 11):
        with pytest.raises(AudioError, match="unknown kind"):
            load_audio(b"TZif2" + bytes(39) + row * n_rows)
