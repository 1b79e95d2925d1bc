"""The data of the demo model: splits without leaks, labels that agree with the sound, bounded augmentation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from auricle.engine.prompts import TASKS
from auricle.engine.segments import parse_segments
from auricle.tools.conversations import read_conversations
from auricle.tools.finetune.digits import PROMPTS, WORDS, Digits, DigitsError, talks
from auricle.tools.finetune.digits.augment import Channel, Voicing, good_length, impulse_response
from auricle.tools.finetune.digits.compose import draw_pauses, string_together
from auricle.tools.finetune.digits.noise import NoiseBank
from auricle.tools.finetune.digits.recordings import load_recordings, load_split, trim
from auricle.tools.finetune.digits.vocoder import resample, warp_voice
from auricle.tools.finetune.digits.voices import VoiceError, choose_voices, write_voices
from support import SHARED

FSDD = SHARED / "data" / "fsdd"
needs_fsdd = pytest.mark.skipif(not FSDD.is_dir(), reason="needs the Free Spoken Digit Dataset beside the checkout")
RATE = 16_000


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def pitch_of(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 17))
    return spectrum.argmax() * RATE / (1 << 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit d is a tone of 200 + 100 d Hz that lasts 0.2 + 0.02 d s between silences; speakers differ in level."""
    path = tmp_path_factory.mktemp("digits")
    for speaker, level in (("anna", 0.5), ("bert", 0.25), ("yweweler", 0.1)):
        for digit in range(10):
            for index in (0, 4, 5, 9, 10, 49):
                quiet = np.zeros(800, np.float32)
                sound = np.concatenate([quiet, level * tone(200 + 100 * digit, 0.2 + 0.02 * digit, 8000), quiet])
                soundfile.write(path / f"{digit}_{speaker}_{index}.wav", sound, 8000)
    return path


@pytest.fixture(scope="module")
def digits(folder: Path) -> Digits:
    return Digits(folder, "train", folder)


@pytest.mark.parametrize(
    ("split", "speakers", "indices"),
    [
        ("train", {"anna", "bert"}, {10, 49}),
        ("validation", {"anna", "bert"}, {5, 9}),
        ("test", {"anna", "bert"}, {0, 4}),
        ("unheard", {"yweweler"}, {0, 4, 5, 9, 10, 49}),
    ],
)
def test_splits(folder: Path, split: str, speakers: set[str], indices: set[int]) -> None:
    recordings = load_split(folder, split)
    assert {recording.speaker for recording in recordings} == speakers
    assert {recording.index for recording in recordings} == indices
    assert len(recordings) == 10 * len(speakers) * len(indices)


def test_unusable_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DigitsError, match="split 'dev' is unknown; take one of train"):
        Digits(folder, "dev")
    with pytest.raises(DigitsError, match="no recordings of the split 'train'"):
        Digits(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_split_of_one_speaker_goes_by_the_index(folder: Path, split: str) -> None:
    recordings = load_split(folder, split, "yweweler")
    assert {recording.speaker for recording in recordings} == {"yweweler"}
    assert {r.index for r in recordings} == {r.index for r in load_split(folder, split)}


def test_talks_of_one_speaker(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(folder),
        str(tmp_path / "talks"),
        "--speaker",
        "bert",
        "--sequences",
        "6",
        "--test-sequences",
        "20",
    ]
    assert talks.main(arguments) == 0
    for split, n in (("train", 6), ("validation", 20), ("test", 20)):
        found = read_conversations(tmp_path / "talks" / f"{split}.jsonl")
        assert len(found) == n
        for conversation in found:
            (clip,) = conversation.clips
            ((turns, answer),) = conversation.exchanges()
            seconds = soundfile.info(clip).duration
            segments = parse_segments(answer, seconds)
            assert turns[-1].content == PROMPTS["timestamps" if segments else "transcribe"]
            words = [segment.text for segment in segments] or answer.split()
            assert set(words) <= set(WORDS)
            assert 0.2 * len(words) < seconds <= 12.01
    assert talks.main([str(folder), str(tmp_path / "none"), "--speaker", "carl"]) == 1
    assert not (tmp_path / "none").exists()
    assert "no recordings of the split 'train' by carl" in capsys.readouterr().err


def test_trim_finds_the_word() -> None:
    noise = np.random.default_rng(1).standard_normal(RATE).astype(np.float32)
    for floor_db in (-100, -60, -38):
        samples = noise * np.float32(10 ** (floor_db / 20) / np.sqrt(2))
        samples[4800:11200] += tone(440, 0.4)
        assert 0.39 <= len(trim(samples)) / RATE <= 0.45, f"{floor_db=}"
    cut = tone(440, 0.3)
    assert len(trim(cut)) == len(cut), "what begins and ends with speech stays whole"


def test_trim_keeps_weak_fricatives() -> None:
    noise = np.random.default_rng(2).standard_normal(RATE).astype(np.float32)
    samples = noise * np.float32(1e-4)
    samples[4800:8000] += tone(200, 0.2)
    for start in (3200, 9600):  # a hiss of 100 ms before and, after a closure as long, behind the vowel, 40 dB weaker
        samples[start : start + 1600] += np.diff(noise[start : start + 1601]) * np.float32(0.0035)
    assert 0.49 <= len(trim(samples)) / RATE <= 0.55


def test_clean_sequences_say_what_they_claim(folder: Path) -> None:
    test = Digits(folder, "test")
    rng = np.random.default_rng(2)
    for _ in range(20):
        example = test.draw(rng, augment=False, task="timestamps")
        silent = np.ones(len(example.samples), bool)
        for word, (start, end) in zip(example.words, example.times, strict=True):
            part = example.samples[int(start * RATE) : int(end * RATE)]
            silent[max(int(start * RATE) - 1, 0) : int(end * RATE) + 1] = False
            digit = WORDS.index(word)
            assert abs(pitch_of(part) - (200 + 100 * digit)) < 8
            assert abs((end - start) - (0.22 + 0.02 * digit)) < 0.03
        assert not example.samples[silent].any()
        assert len(example.samples) <= 12 * RATE
        found = re.findall(r"\[(\d+\.\d\d)\]([a-z]+)\[(\d+\.\d\d)\]", example.answer)
        assert "".join(f"[{a}]{w}[{b}]" for a, w, b in found) == example.answer
        assert [w for _, w, _ in found] == list(example.words)
        assert np.allclose([(float(a), float(b)) for a, _, b in found], np.reshape(example.times, (-1, 2)), atol=0.0051)


def test_tasks(digits: Digits) -> None:
    rng = np.random.default_rng(3)
    example = digits.draw(rng, task="transcribe", n_words=3)
    assert example.prompt == "Transcribe the audio."
    assert example.answer.split(" ") == list(example.words)
    assert example.asked("timestamps").prompt == TASKS["timestamps"]
    assert (example.asked("count").prompt, example.asked("count").answer) == ("How many digits are spoken?", "3")
    assert (example.asked("last").prompt, example.asked("last").answer) == ("What is the last digit?", example.words[2])
    nothing = digits.draw(rng, n_words=0)
    assert (nothing.words, nothing.times) == ((), ())
    assert [nothing.asked(task).answer for task in ("transcribe", "timestamps", "count", "last")] == [
        "",
        "",
        "0",
        "none",
    ]


def test_draws_keep_to_the_weights_and_bounds(digits: Digits) -> None:
    rng = np.random.default_rng(4)
    examples = [digits.draw(rng) for _ in range(400)]
    for example in examples:
        assert example.samples.dtype == np.float32
        assert np.isfinite(example.samples).all()
        assert np.abs(example.samples).max() <= 1
        assert 0.1 * RATE < len(example.samples) <= 12 * RATE
        flat = [second for pair in example.times for second in pair]
        assert flat == sorted(flat)
        assert not flat or flat[-1] <= len(example.samples) / RATE
    asked = [example.prompt for example in examples]
    assert 0.42 < asked.count(TASKS["transcribe"]) / 400 < 0.58
    assert 0.22 < asked.count(TASKS["timestamps"]) / 400 < 0.38
    assert 0.01 < sum(not example.words for example in examples) / 400 < 0.09
    assert {len(example.words) for example in examples} == set(range(11))
    assert any(start < border < end for e in examples for start, end in e.times for border in (4, 8))


def test_draws_repeat_with_the_seed(digits: Digits) -> None:
    first, second, other = (digits.draw(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first.samples, second.samples)
    assert first.answer == second.answer
    assert not np.array_equal(first.samples, other.samples)


def test_augmented_speech_is_louder_inside_its_times(digits: Digits) -> None:
    rng = np.random.default_rng(7)
    inside, outside = [], []
    for _ in range(40):
        example = digits.draw(rng, n_words=4)
        speech = np.zeros(len(example.samples), bool)
        for start, end in example.times:
            speech[int(start * RATE) : int(end * RATE)] = True
        inside.append(np.mean(example.samples[speech] ** 2))
        outside.append(np.mean(example.samples[~speech] ** 2))
    ratio = 10 * np.log10(np.array(inside) / np.maximum(outside, 1e-12))
    assert np.median(ratio) > 10
    assert (ratio > 0).all()


def test_fixed_holds_every_recording_and_repeats(folder: Path) -> None:
    test = Digits(folder, "test")
    examples = test.fixed(20, seed=1)
    again = test.fixed(20, seed=1)
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(examples, again, strict=True))
    spoken = (
        np.concatenate([[example.words.count(word) for word in WORDS] for example in examples]).reshape(20, 10).sum(0)
    )
    assert (spoken >= 4).all(), "2 speakers x 2 indices of each digit"
    with pytest.raises(DigitsError, match="3 sequences do not hold all of 40 recordings"):
        test.fixed(3, seed=1)


def test_pauses_shrink_and_words_drop_to_fit() -> None:
    words = [tone(300, 1.0)] * 10
    samples, times = string_together(words, np.full(11, 2.0))
    assert len(times) == 10
    assert len(samples) <= 12 * RATE
    samples, times = string_together([tone(300, 1.0)] * 20, np.zeros(21))
    assert len(times) == 11
    pauses = np.concatenate([draw_pauses(np.random.default_rng(seed), 10)[1:-1] for seed in range(300)])
    assert 0.5 < np.mean((pauses >= 0.05) & (pauses <= 0.6)) < 0.95
    assert pauses.min() >= 0
    assert 2 < pauses.max() <= 2.5


def test_resample_moves_pitch_and_length() -> None:
    for speed in (0.8, 1.25):
        fast = resample(tone(500, 0.5), speed)
        assert len(fast) == int(8000 / speed)
        expected = tone(500 * speed, 1.0)[: len(fast)]
        assert np.abs(fast[10:-10] - expected[10:-10]).max() < 0.01


def test_stretch_keeps_the_pitch() -> None:
    for stretch in (0.8, 1.25):
        slow = warp_voice(tone(500, 0.5), stretch, 1.0)
        assert len(slow) == int(8000 * stretch)
        assert abs(pitch_of(slow) - 500) < 5
        assert 0.6 < slow[2000:-2000].std() / tone(500, 0.5).std() < 1.2


def test_an_idle_warp_is_the_identity() -> None:
    word = np.random.default_rng(8).standard_normal(5000).astype(np.float32)
    assert np.abs(warp_voice(word, 1.0, 1.0) - word).max() < 1e-4


def test_formants_move_and_the_pitch_stays() -> None:
    pulses = np.zeros(8000)
    pulses[::128] = 1  # 125 Hz
    turns = np.arange(400) / RATE
    vowel = np.convolve(pulses, np.exp(-600 * turns) * np.sin(2 * np.pi * 1000 * turns))[:8000].astype(np.float32)
    moved = warp_voice(vowel, 1.0, 1.15)
    hertz = np.fft.rfftfreq(8000, 1 / RATE)

    def centre(samples: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(samples)) ** 2 * ((hertz > 500) & (hertz < 2000))
        return float((power * hertz).sum() / power.sum())

    assert 60 < centre(moved) - centre(vowel) < 250
    spectrum = np.abs(np.fft.rfft(moved[1000:7400]))  # 50 periods: the harmonics lie on every 50th bin
    assert spectrum[::50].sum() > 5 * np.delete(spectrum, np.s_[::50]).mean() * len(spectrum[::50])


@pytest.mark.parametrize("snr", [5.0, 20.0, 40.0])
@pytest.mark.parametrize("filtered", [False, True])
def test_noise_has_its_ratio(snr: float, filtered: bool) -> None:
    speech = np.concatenate([np.zeros(RATE, np.float32), 0.1 * tone(440, 1.0), np.zeros(RATE, np.float32)])
    times = [(1.0, 2.0)]
    rng = np.random.default_rng(9)
    measured = []
    for _ in range(10):
        noisy = Channel(NoiseBank(), ((snr, filtered),)).apply(speech, times, rng)
        noise = noisy - speech
        measured.append(10 * np.log10(np.mean(speech[RATE : 2 * RATE] ** 2) / np.mean(noise**2)))
    assert abs(np.mean(measured) - snr) < 1.5
    assert np.ptp(measured) < 8


def test_gain_never_clips_and_bands_cut() -> None:
    bank, rng = NoiseBank(), np.random.default_rng(10)
    loud = Channel(bank, (), gain_db=6.0, offset=0.01).apply(0.9 * tone(300, 1.0), [(0, 1)], rng)
    assert np.abs(loud).max() == pytest.approx(0.99)
    both = 0.2 * tone(1000, 1.0) + 0.2 * tone(6000, 1.0)
    narrow = np.abs(np.fft.rfft(Channel(bank, (), band=(300.0, 3400.0)).apply(both, [(0, 1)], rng)))
    assert narrow[6000] < 0.01 * narrow[1000]
    assert narrow[1000] == pytest.approx(0.1 * RATE, rel=0.1)


def test_reverberation_decays_as_stated() -> None:
    response = impulse_response(np.random.default_rng(11), 0.4, 0.5)
    early, late = (np.mean(response[at : at + 640] ** 2) for at in (640, 640 + 3200))
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=3), "0.2 s are half of the 60 dB"
    assert np.sum(response**2) == pytest.approx(1, abs=0.01)
    assert all(good_length(n) >= n and good_length(n) < 1.3 * n for n in range(1000, 200_000, 777))


def test_speechless_sound_is_bounded() -> None:
    bank, rng = NoiseBank(), np.random.default_rng(12)
    sounds = [bank.speechless(rng, 32_000) for _ in range(60)]
    assert all(sound.shape == (32_000,) and sound.dtype == np.float32 for sound in sounds)
    assert all(np.isfinite(sound).all() and np.abs(sound).max() <= 1 for sound in sounds)
    assert 0 < sum(not sound.any() for sound in sounds) < 20


def test_voices_need_their_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(VoiceError, match="install it"):
        write_voices(tmp_path, 1, 1)
    assert len(set(choose_voices(52, 0))) == 52


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_voices_speak(tmp_path: Path) -> None:
    assert write_voices(tmp_path / "a", 1, 1, seed=3) == 10
    assert write_voices(tmp_path / "b", 1, 1, seed=3) == 10
    recordings = load_recordings(tmp_path / "a")
    assert [recording.digit for recording in recordings] == list(range(10))
    assert all(0.15 < len(recording.samples) / RATE < 1.2 for recording in recordings)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_voicing_changes_length_as_stated() -> None:
    word = tone(400, 0.4)
    for speed, stretch in ((0.8, 1.0), (1.0, 1.2), (1.25, 0.9)):
        length = len(Voicing(speed, stretch, 1.1, 0.0).apply(word, np.random.default_rng(13)))
        assert length / len(word) == pytest.approx(stretch / speed, rel=0.08)


@needs_fsdd
def test_the_real_recordings() -> None:
    unheard = load_split(FSDD, "unheard")
    assert len(unheard) == 500
    test = Digits(FSDD, "test")
    assert len(test.recordings) == 200
    seconds = np.array([len(recording.samples) for recording in unheard + test.recordings]) / RATE
    assert seconds.min() >= 0.1
    assert seconds.max() <= 1.1
    examples = test.fixed(60, seed=0)
    assert sum(len(example.words) for example in examples) >= 200
    assert all(np.isfinite(example.samples).all() for example in examples)
