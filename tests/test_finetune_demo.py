"""The demo model's shape and words, its batches of spoken digits, and a run of two steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from auricle.convert.hf import plan_conversion
from auricle.engine.mel import log_mel, mel_filters
from auricle.engine.prompts import default_prompt
from auricle.tools.finetune import demo, spectra
from auricle.tools.finetune.batches import IGNORED
from auricle.tools.finetune.curves import draw_curves, read_curves
from auricle.tools.finetune.digits import PROMPTS, WORDS, tasks
from auricle.tools.finetune.digits.grid import N_PLACES, N_SOUNDS, aims_of, on_grid, places_of, sounds_of
from auricle.tools.finetune.folder import read_codec, write_weights
from auricle.tools.finetune.shape import demo_config, demo_merges, split_words, write_demo_files
from auricle.tools.oracle.model import MossAudio
from auricle.tools.sample import learn_merges
from sounds import synthetic
from support import SHARED, needs_shared

FSDD = SHARED / "data" / "fsdd"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    write_demo_files(folder)
    return folder


def test_words_of_prompts_and_answers_are_single_tokens(files: Path) -> None:
    encode = read_codec(files).tokenizer.encode
    decode = read_codec(files).tokenizer.decode
    for word in WORDS:
        assert len(encode(word)) == len(encode(f" {word}")) == 1
    assert len(encode("[0.12]four[0.55][0.60]two[1.07]")) == 6 + 1 + 6 + 6 + 1 + 6
    assert [len(encode(digit)) for digit in "0123456789"] == [1] * 10
    assert len(encode(default_prompt(PROMPTS["transcribe"]))) < 24
    for text in (PROMPTS["timestamps"], "Grüße, 世界!\n"):
        assert decode(encode(text)) == text


def test_merges_stop_when_nothing_is_left_to_join() -> None:
    assert learn_merges(["aab", "aab", "b"], 10) == [("a", "a"), ("aa", "b")]
    assert split_words(["four two [1.5]"]) == ["four", " two", " [", "1", ".", "5", "]"]


def test_every_width_takes_every_quantised_type(files: Path) -> None:
    model = MossAudio(demo_config(len(demo_merges())))
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert 5e6 < sum(sizes.values()) < 12e6
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2]
    assert all(value.shape[1] % 256 == 0 for value in matrices)
    demo.initialise(model)
    write_weights(files, model)
    assert plan_conversion(files, "f16").total_bytes < 25e6
    audio = json.loads((files / "config.json").read_text())["audio_config"]
    assert len(audio["deepstack_encoder_layer_indexes"]) == len(model.deepstack_audio_merger_list) == 3
    # What is added after the last layer of the decoder reaches no other token.
    assert len(model.language_model.layers) > 3


def test_the_stem_is_heard_beside_the_positions() -> None:
    torch.manual_seed(0)
    model = MossAudio(demo_config(len(demo_merges())))
    demo.initialise(model)
    mel = torch.from_numpy(log_mel(synthetic(2.0, 16_000)))[None]
    with torch.no_grad():
        spread = model.audio_encoder._stem(mel).std((0, 1)).mean()
    assert 0.2 < float(spread) < 2


def test_the_quick_mel_is_the_engines() -> None:
    for seconds in (0.013, 0.7, 5.3):
        samples = synthetic(seconds, 16_000)
        np.testing.assert_allclose(spectra.LogMel()(samples), log_mel(samples), rtol=0, atol=2e-4)


def test_a_warp_moves_resonances_and_masks_hide_little() -> None:
    rng = np.random.default_rng(0)
    hertz = (mel_filters() * np.linspace(0, 8000, 201)[:, None]).sum(0) / mel_filters().sum(0)
    mel = np.exp(-(((hertz[:, None] - 1500) / 150) ** 2)).repeat(300, axis=1).astype(np.float32)
    np.testing.assert_allclose(spectra.warp_frequency(mel, 1.0), mel, atol=1e-6)
    warped = spectra.warp_frequency(mel, 1.2)
    assert hertz[warped[:, 0].argmax()] == pytest.approx(1800, rel=0.03)
    shares = [float((spectra.mask(mel, rng) != mel).mean()) for _ in range(50)]
    assert 0 < np.mean(shares) < 0.25
    assert max(shares) < 0.5


def test_dynamics_change_between_the_loudest_frame_and_the_floor() -> None:
    samples = synthetic(1.0, 16_000)
    samples[8000:12_000] *= np.float32(0.01)
    samples[12_000:] = 0
    mel = log_mel(samples)
    for factor in (0.8, 1.5):
        changed = spectra.expand(mel, factor)
        weaker = (mel - changed).max(axis=0)
        assert weaker[mel.max(axis=0).argmax()] == pytest.approx(0, abs=1e-6)
        assert np.sign(factor - 1) * weaker[55:70].mean() > 0.1, "frames 40 dB down"
        assert changed.min() >= mel.max() - 2 - 1e-6
        assert changed.dtype == np.float32
    np.testing.assert_array_equal(spectra.expand(mel, 1.0), mel)


def test_a_row_of_several_questions(files: Path) -> None:
    codec = read_codec(files)
    example = tasks.ask("transcribe", np.zeros(16_000, np.float32), ["four", "two"], [(0.1, 0.4), (0.5, 0.9)])
    row = demo.make_row(codec, np.zeros((128, 100), np.float32), [example, example.asked("count")])
    # A token every 80 ms: silence, the start of a four and the rest of it, a gap, a two, silence.
    assert row.sounds == [0, 9, 10, 10, 10, 0, 5, 6, 6, 6, 6, 0, 0]
    assert row.places[0] == (0, 0, 0, 0)
    assert row.places[7] == (0, 5, 3, 2)  # at 0.56 s, in the second word
    assert sorted(set(row.branches)) == [0, 1, 2]
    second = [label for label, at in zip(row.labels, row.branches, strict=True) if at == 2 and label != IGNORED]
    assert second == [*codec.tokenizer.encode("2"), codec.end_id]
    assert row.positions[row.branches.index(2)] == row.positions[row.branches.index(1)]


def test_places_and_times_go_by_audio_tokens() -> None:
    example = tasks.ask("timestamps", np.zeros(192_000, np.float32), ["one"] * 2, [(0.31, 0.33), (10.5, 11.97)])
    assert on_grid(example).asked("timestamps").answer == "[0.32]one[0.40][10.48]one[12.00]"
    places = np.array(places_of(sounds_of(example, 150)))
    assert places.min() == 0
    assert (places.max(axis=0) < N_PLACES).all()
    starts = places[:, :3] @ [1000, 100, 20]  # ms
    np.testing.assert_array_equal(starts, np.arange(150) * 80)
    assert np.flatnonzero(np.diff(places[:, 3])).tolist() == [3, 130]


def test_answers_are_aimed_at_the_words(files: Path) -> None:
    encode = read_codec(files).tokenizer.encode
    example = tasks.ask("timestamps", np.zeros(192_000, np.float32), ["one"] * 2, [(0.31, 0.33), (10.5, 11.97)])

    def aims(task: str) -> list[int]:
        asked = on_grid(example).asked(task)
        return aims_of(asked, [token_id == encode("[")[0] for token_id in encode(asked.answer)], 150)

    # [0.32] and the word, [0.40], [10.48] and the word, and the end of the clip, where no token is.
    assert aims("timestamps") == [4] * 7 + [5] * 6 + [131] * 8 + [-1] * 7
    assert aims("transcribe") == [4, 131]
    assert (aims("count"), aims("last")) == ([131], [131])
    assert aims_of(tasks.ask("last", example.samples), [False], 150) == [-1]


@needs_shared
def test_two_steps_a_stop_and_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_little(*folders: Path | None) -> demo.Validator:
        validator = open_validator(*folders)
        return demo.Validator(validator.codec, validator.known[:3], [])

    open_validator = demo.open_validator
    monkeypatch.setattr(demo, "open_validator", measure_little)
    arguments = ["--fsdd", str(FSDD), "--out", str(tmp_path), "--batch", "2", "--workers", "0", "--threads", "1"]
    assert demo.main([*arguments, "--steps", "2", "--validate-steps", "9"]) == 0
    assert demo.main([*arguments, "--steps", "3", "--validate-steps", "9", "--resume"]) == 0
    rows = read_curves(tmp_path / "curves.csv")
    assert [row["step"] for row in rows if row["loss"]] == ["2", "3"]
    rows = [row for row in rows if row["validation_wer"]]
    assert [row["step"] for row in rows] == ["2", "3"]
    assert all(float(row["validation_wer"]) >= 0 and float(row["validation_loss"]) > 0 for row in rows)
    plan_conversion(tmp_path / "model", "f16")


@needs_shared
def test_batches_depend_on_seed_and_number_alone(files: Path) -> None:
    first, second = (demo.open_source(files.parent, FSDD, None, seed, 3) for seed in (0, 0))
    first(7)
    np.testing.assert_array_equal(first(3000).windows, second(3000).windows)
    other = demo.open_source(files.parent, FSDD, None, 1, 3)
    assert not np.array_equal(other(3000).ids, first(3000).ids)
    starts = np.isin(first(0).sounds, np.arange(1, N_SOUNDS, 2)).sum()
    assert 0 < starts <= 2 * 3  # short ones come first


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.csv"
    path.write_text("step,loss,validation_wer\n1,2.5,\n2,1.5,80\n")
    picture = draw_curves(path)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
