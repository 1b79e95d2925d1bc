"""The log-mel spectrogram. Oracles: transformers' WhisperFeatureExtractor and filter bank, the golden files."""

from __future__ import annotations

import numpy as np
import pytest

from auricle.engine.audio import (
    AudioError,
    hann_window,
    load_audio,
    log_mel,
    mel_filters,
    normalize_log_mel,
    raw_log_mel,
)
from auricle.engine.mel import _SLAB
from sounds import JFK, SAMPLE_RATE, synthetic
from support import SHARED, needs_shared

TOLERANCE = 2e-5


@pytest.fixture(scope="session")
def whisper():
    """transformers' extractor, called as the official processor of MOSS-Audio calls it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the oracle extra)")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, sampling_rate=16_000, hop_length=160, n_fft=400)
    return lambda samples: np.asarray(extractor._np_extract_fbank_features(samples[None, :], device="cpu"))[0]


def test_mel_agrees_with_whisper_on_speech(whisper):
    samples = load_audio(JFK)
    assert samples.shape == (176_000,)
    for n in (176_000, 100_001, 47_039, 16_123):
        assert np.abs(log_mel(samples[:n]) - whisper(samples[:n])).max() < TOLERANCE


@needs_shared
@pytest.mark.parametrize("name", ["jfk.wav", "jfk_3s.wav", "late_loud.wav", "test_en.mp3", "test_zh.mp3"])
def test_mel_agrees_with_whisper_on_recordings(whisper, name):
    samples = load_audio(SHARED / "data" / "audio" / name)
    for odd in (0, 77):
        assert np.abs(log_mel(samples[odd:]) - whisper(samples[odd:])).max() < TOLERANCE


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 44_099])
def test_mel_agrees_with_whisper_after_resampling(whisper, rate):
    samples = load_audio(synthetic(1.2345, rate, 2), sample_rate=rate)
    assert abs(len(samples) - 1.2345 * SAMPLE_RATE) <= 1
    assert np.abs(log_mel(samples) - whisper(samples)).max() < TOLERANCE


@pytest.mark.parametrize("n", [160, 161, 199, 200, 201, 202, 319, 320, 399, 400, 401, 640])
def test_mel_of_very_short_audio(whisper, n):
    samples = synthetic(0.05, SAMPLE_RATE)[:n] * 20
    mel = log_mel(samples)
    assert mel.shape == (128, n // 160)
    assert mel.dtype == np.float32
    assert np.abs(mel - whisper(samples)).max() < TOLERANCE


def test_mel_of_silence_and_of_huge_samples(whisper):
    assert np.array_equal(log_mel(np.zeros(800, np.float32)), np.full((128, 5), -1.5, np.float32))
    loud = synthetic(0.2, SAMPLE_RATE) * np.float32(1e30)
    assert np.abs(log_mel(loud) - whisper(loud)).max() < TOLERANCE


@needs_shared
@pytest.mark.parametrize("name", ["jfk", "jfk_3s", "late_loud"])
def test_mel_agrees_with_the_golden_files(name):
    from safetensors.numpy import load_file

    golden = load_file(SHARED / "golden" / "a" / f"{name}.safetensors")["mel"]
    mel = log_mel(load_audio(SHARED / "data" / "audio" / f"{name}.wav"))
    assert mel.shape == golden.shape
    assert np.abs(mel - golden).max() < TOLERANCE


@pytest.mark.parametrize("n_mels", [80, 128])
def test_mel_filters_agree_with_transformers(n_mels):
    audio_utils = pytest.importorskip("transformers.audio_utils", reason="needs transformers (the oracle extra)")
    theirs = audio_utils.mel_filter_bank(201, n_mels, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    ours = mel_filters(n_mels)
    assert ours.dtype == np.float32
    assert ours.shape == (201, n_mels)
    assert np.abs(ours - theirs).max() < 1e-8
    window = audio_utils.window_function(400, "hann")
    assert np.abs(hann_window() - window).max() < 1e-7
    assert hann_window().dtype == np.float32


@pytest.mark.parametrize("n_frames", [_SLAB - 1, _SLAB, _SLAB + 1, 2 * _SLAB, 2 * _SLAB + 1])
def test_mel_does_not_depend_on_slabs(monkeypatch, n_frames):
    samples = synthetic(11.0, SAMPLE_RATE)[: n_frames * 160 + 7]
    mel = log_mel(samples)
    assert mel.shape == (128, n_frames)
    monkeypatch.setattr("auricle.engine.mel._SLAB", 1 << 20)
    assert np.abs(mel - log_mel(samples)).max() <= 1e-6


def test_raw_mel_in_pieces_is_that_of_the_clip():
    samples = synthetic(3.0, SAMPLE_RATE)
    whole = raw_log_mel(samples)
    pieces = [raw_log_mel(samples, start=a, stop=b) for a, b in ((0, 1), (1, 120), (120, 299), (299, 300))]
    assert np.abs(np.concatenate(pieces, axis=1) - whole).max() <= 1e-6
    early = raw_log_mel(samples[:16_000])  # the two last frames still see the end of what has arrived
    assert np.abs(early[:, :-2] - whole[:, :98]).max() <= 1e-6
    assert np.array_equal(normalize_log_mel(whole), log_mel(samples))
    part = normalize_log_mel(whole[:, :100], maximum=whole.max())
    assert np.array_equal(part, log_mel(samples)[:, :100])
    assert whole[:, :100].max() < whole.max() - 1  # else the line above proves nothing


def test_mel_takes_the_filters_and_window_of_a_file():
    samples = synthetic(0.5, SAMPLE_RATE) + 0.1 * np.random.default_rng(1).standard_normal(8000).astype(np.float32)
    assert np.array_equal(log_mel(samples, mel_filters(), hann_window()), log_mel(samples))
    assert log_mel(samples, mel_filters(80)).shape == (80, 50)
    louder = raw_log_mel(samples, 100 * mel_filters()) - raw_log_mel(samples)
    assert np.abs(louder - 2).max() < 1e-5
    assert not np.allclose(raw_log_mel(samples, window=np.ones(400, np.float32)), raw_log_mel(samples))


def test_mel_of_less_than_a_frame_is_an_error():
    with pytest.raises(AudioError, match=r"159 samples are too short.*10 ms"):
        log_mel(np.zeros(159, np.float32))
