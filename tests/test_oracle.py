"""The PyTorch oracle against the goldens and against arithmetic by hand; its shapes, paddings and refusals."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from transformers.models.whisper.modeling_whisper import sinusoids

from auricle.convert.source import ConversionError
from auricle.tools.oracle import lazy, model
from auricle.tools.oracle.model import OracleError, _sinusoids, load_oracle, open_world, read_tensor
from auricle.tools.sample import SampleShape, write_checkpoint
from support import SHARED, needs_shared

GOLDEN = SHARED / "golden" / "a"
GOLDEN_AUDIO_ID = 449
AUDIO_ID = 323  # with the default number of merges

SHAPES = {
    "default": SampleShape(),
    "projected": SampleShape(enc_d_out=80, taps=(3, 0, 2), n_inject=2, n_window=20, n_head=8, n_kv_head=1, d_head=16),
    "tied": SampleShape(enc_d_model=64, enc_d_out=64, taps=(1,), n_window=100, d_model=96, n_kv_head=4, tied=True),
}


def token_count(n_frames: int) -> int:
    """Audio tokens of one window by the published rule: a third halving, each rounded up."""
    return -(-n_frames // 8)


def window_lengths(frames: list[int], n_window: int) -> list[int]:
    width = 2 * n_window
    return [min(width, n - start) for n in frames for start in range(0, n, width)]


def random_mels(*frames: int) -> list[np.ndarray]:
    """Clips that depend on their place and length only, so that two requests can share one."""
    return [np.random.default_rng([i, n]).normal(0, 0.45, (128, n)).astype(np.float32) for i, n in enumerate(frames)]


def prompt(n_audio: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and audio mask of a prompt whose audio tokens are interrupted once, as by a time marker."""
    head = n_audio // 3
    ids = np.array([5, 6, 7] + [AUDIO_ID] * head + [17] + [AUDIO_ID] * (n_audio - head) + [8, 9], dtype=np.int32)
    return ids, ids == AUDIO_ID


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(name: str) -> Path:
        return write_checkpoint(folder / name, SHAPES[name], seed=7)

    return make


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return cache(lambda name: load_oracle(checkpoint(name)))


@pytest.fixture(scope="module")
def golden_oracle():
    return load_oracle(GOLDEN / "checkpoint")


def run_oracle(oracle, name: str, mels: list[np.ndarray], n_new: int = 0) -> dict[str, np.ndarray]:
    n_audio = sum(map(token_count, window_lengths([mel.shape[1] for mel in mels], SHAPES[name].n_window)))
    return oracle(name).run(mels, *prompt(n_audio), n_new)


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor in float64, for arithmetic by hand."""
    shards = [load_tensors(shard) for shard in directory.glob("*.safetensors")]
    return {name: value.double().numpy() for shard in shards for name, value in shard.items()}


# The goldens


@needs_shared
@pytest.mark.parametrize("recording", ["jfk", "jfk_3s", "late_loud"])
def test_every_stage_agrees_with_the_official_code(golden_oracle, recording):
    golden = load_file(GOLDEN / f"{recording}.safetensors")
    ids, mel = golden["input_ids"], golden["mel"]
    stages = golden_oracle.run([mel], ids, ids == GOLDEN_AUDIO_ID, n_new=len(golden["generated_ids"]))

    assert golden.keys() - stages.keys() == {"mel", "input_ids"}
    np.testing.assert_array_equal(stages["generated_ids"], golden["generated_ids"])
    lengths = [token_count(n) for n in window_lengths([mel.shape[1]], 200)]
    for name in golden.keys() - {"mel", "input_ids", "generated_ids"}:
        got, want = stages[name].astype(np.float64), golden[name].astype(np.float64)
        assert got.shape == want.shape, name
        if got.ndim == 3:  # rows past the end of the tail window mean nothing
            got, want = (np.concatenate([w[:n] for w, n in zip(x, lengths, strict=True)]) for x in (got, want))
        cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
        assert cosine.min() >= 0.999999, name
        assert np.abs(got - want).max() <= 1e-4, name


# Stages by hand


@pytest.mark.parametrize("name", SHAPES)
def test_names_shapes_and_dtypes_of_the_stages(oracle, name):
    shape = SHAPES[name]
    mels = random_mels(2 * shape.n_window + 13, 9)
    stages = run_oracle(oracle, name, mels, n_new=3)

    n_audio = token_count(2 * shape.n_window) + 2 + 2
    n_tokens = n_audio + 6
    windows = (3, token_count(2 * shape.n_window), shape.enc_d_model)
    expected = {"enc.stem_proj": windows, "enc.out": (n_audio, shape.enc_d_out), "adapter": (n_audio, shape.d_model)}
    expected |= {f"enc.blk.{n}": windows for n in range(shape.enc_n_layer)}
    for k in range(shape.n_merger):
        expected |= {f"deepstack.{k}": (n_audio, shape.d_model), f"llm.inject.{k}": (n_tokens, shape.d_model)}
    expected |= {f"llm.blk.{n}": (n_tokens, shape.d_model) for n in range(shape.n_layer)}
    expected |= {f"enc.tap.{k}": (n_audio, shape.enc_d_out) for k in range(shape.n_merger)}
    expected |= {"llm.embed": (n_tokens, shape.d_model), "llm.final_norm": (n_tokens, shape.d_model)}
    expected |= {"logits": (n_tokens, shape.n_vocab), "generated_ids": (3,)}
    assert {stage: value.shape for stage, value in stages.items()} == expected
    assert all(value.dtype == np.float32 for stage, value in stages.items() if stage != "generated_ids")
    assert all(np.isfinite(value).all() for value in stages.values())


@pytest.mark.parametrize("name", SHAPES)
def test_norm_projection_adapters_and_head_by_hand(oracle, checkpoint, name):
    shape = SHAPES[name]
    weights = read_weights(checkpoint(name))
    frames = [2 * shape.n_window, 37]
    stages = run_oracle(oracle, name, random_mels(*frames))
    lengths = [token_count(n) for n in window_lengths(frames, shape.n_window)]

    def rows(stage: str) -> np.ndarray:
        return np.concatenate([w[:n] for w, n in zip(stages[stage], lengths, strict=True)]).astype(np.float64)

    def project(x: np.ndarray) -> np.ndarray:
        matrix = weights.get("audio_encoder.out_proj.weight")
        return x if matrix is None else x @ matrix.T

    def gated(x: np.ndarray, prefix: str) -> np.ndarray:
        gate, up, down = (weights[f"{prefix}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        return ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down

    assert ("audio_encoder.out_proj.weight" in weights) == (shape.enc_d_out != shape.enc_d_model)
    last = rows(f"enc.blk.{shape.enc_n_layer - 1}")
    normed = (last - last.mean(1, keepdims=True)) / np.sqrt(last.var(1, keepdims=True) + 1e-5)
    normed = normed * weights["audio_encoder.layer_norm.weight"] + weights["audio_encoder.layer_norm.bias"]
    np.testing.assert_allclose(stages["enc.out"], project(normed), atol=2e-5)
    np.testing.assert_allclose(stages["adapter"], gated(project(normed), "audio_adapter"), atol=2e-5)
    for k, tap in enumerate(shape.taps[: shape.n_inject]):
        merged = gated(project(rows(f"enc.blk.{tap}")), f"deepstack_audio_merger_list.{k}")
        np.testing.assert_allclose(stages[f"deepstack.{k}"], merged, atol=2e-5)
    head = weights["language_model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    np.testing.assert_allclose(stages["logits"], stages["llm.final_norm"] @ head.T, atol=2e-5)
    assert ("lm_head.weight" in weights) == (not shape.tied)


def test_the_scatter_and_the_injection_touch_the_audio_positions_only(oracle, checkpoint):
    stages = run_oracle(oracle, "projected", random_mels(61))
    ids, mask = prompt(8)
    table = read_weights(checkpoint("projected"))["language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(stages["llm.embed"][~mask], table[ids[~mask]])
    np.testing.assert_array_equal(stages["llm.embed"][mask], stages["adapter"])
    for k in range(2):
        before, after = stages[f"llm.blk.{k}"], stages[f"llm.inject.{k}"]
        np.testing.assert_array_equal(after[~mask], before[~mask])
        np.testing.assert_array_equal(after[mask], before[mask] + stages[f"deepstack.{k}"])


# Windows and padding


def test_positions_are_those_of_whisper():
    np.testing.assert_allclose(_sinusoids(50, 96), sinusoids(50, 96), atol=1e-6)


def test_a_second_clip_changes_nothing_of_the_first_when_both_have_full_windows(oracle):
    first, second = random_mels(430, 500)
    alone, both = (run_oracle(oracle, "default", mels)["enc.out"] for mels in ([first], [first, second]))
    assert len(alone) == 54
    assert len(both) == 54 + 63
    np.testing.assert_allclose(both[:54], alone, atol=1e-5)


def test_a_window_is_padded_to_the_longest_of_the_request(oracle):
    first, second = random_mels(300, 341)
    alone = run_oracle(oracle, "default", [first])
    both = run_oracle(oracle, "default", [first, second])
    zeros = run_oracle(oracle, "default", [np.pad(first, [(0, 0), (0, 41)]), second])
    assert alone["enc.stem_proj"].shape[1] == 38
    assert both["enc.stem_proj"].shape[1] == 43
    # What follows the 300 frames is zeros, not the edge of the convolution: the last token sees them.
    np.testing.assert_array_equal(both["enc.stem_proj"], zeros["enc.stem_proj"])
    np.testing.assert_allclose(both["enc.stem_proj"][0, :37], alone["enc.stem_proj"][0, :37], atol=1e-5)
    assert np.abs(both["enc.stem_proj"][0, 37] - alone["enc.stem_proj"][0, 37]).max() > 1e-3
    # Attention does not see them.
    assert np.abs(both["enc.blk.0"][0, :38] - zeros["enc.blk.0"][0, :38]).max() > 1e-3


def test_positions_and_attention_restart_in_every_window(oracle):
    (mel,) = random_mels(400)
    stages = run_oracle(oracle, "default", [np.concatenate([mel, mel], axis=1), mel])
    windows = stages["enc.out"].reshape(3, 50, -1)
    np.testing.assert_allclose(windows[1:], windows[:2], atol=1e-5)


def test_more_windows_than_one_group_of_the_stem(oracle):
    (long,) = random_mels(70 * 40 + 11)
    stages = run_oracle(oracle, "projected", [long])
    assert stages["enc.stem_proj"].shape[:2] == (71, 5)
    late = run_oracle(oracle, "projected", [long[:, 66 * 40 : 67 * 40]])
    np.testing.assert_allclose(stages["enc.out"][66 * 5 : 67 * 5], late["enc.out"], atol=1e-5)


# Decoding


@pytest.mark.parametrize("name", ["default", "projected"])
def test_decoding_with_the_cache_agrees_with_one_pass_over_everything(oracle, name):
    mels = random_mels(77)
    n_audio = sum(token_count(n) for n in window_lengths([77], SHAPES[name].n_window))
    ids, mask = prompt(n_audio)
    generated = oracle(name).run(mels, ids, mask, n_new=8)["generated_ids"]
    longer = np.concatenate([ids, generated[:-1]])
    logits = oracle(name).run(mels, longer, np.pad(mask, (0, 7)))["logits"]
    np.testing.assert_array_equal(logits[len(ids) - 1 :].argmax(1), generated)
    assert len(set(generated.tolist())) > 1


def test_a_request_without_audio(oracle):
    ids = np.array([3, 1, 4, 1, 5], dtype=np.int32)
    stages = oracle("default").run([], ids, np.zeros(5, bool), n_new=2)
    assert set(stages) == {
        "llm.embed",
        "llm.final_norm",
        "logits",
        "generated_ids",
        *(f"llm.blk.{n}" for n in range(3)),
    }
    shorter = oracle("default").run([], ids[:3], np.zeros(3, bool))
    np.testing.assert_allclose(stages["logits"][:3], shorter["logits"], atol=1e-5)


def test_trace_hands_stages_over_in_the_order_of_computation(oracle):
    names: list[str] = []
    oracle("tied").trace(random_mels(16), *prompt(2), lambda name, _: names.append(name), n_new=1)
    encoder = ["enc.stem_proj", *(f"enc.blk.{n}" for n in range(4)), "enc.out", "adapter", "enc.tap.0", "deepstack.0"]
    decoder = ["llm.embed", "llm.blk.0", "llm.inject.0", "llm.blk.1", "llm.blk.2", "llm.final_norm", "logits"]
    assert names == [*encoder, *decoder, "generated_ids", "decode.logits"]


# Refusals


def test_a_request_that_does_not_fit_is_refused_in_one_line(oracle):
    (mel,) = random_mels(16)
    ids, mask = prompt(3)
    with pytest.raises(OracleError, match="the prompt has 3 audio tokens, its mels make 2"):
        oracle("default").run([mel], ids, mask)
    with pytest.raises(OracleError, match=r"a mel of shape \(80, 16\): give \[128, frames\]"):
        oracle("default").run([mel[:80]], ids, mask)
    with pytest.raises(OracleError, match="equal lengths"):
        oracle("default").run([mel], ids, mask[:-1])


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("audio_config", "n_window", 30, "n_window = 30: a window of 60 frames is no multiple of 8"),
        (
            "audio_config",
            "deepstack_encoder_layer_indexes",
            [0, 4],
            r"= \[0, 4\]: the encoder has layers 0 to 3",
        ),
        ("audio_config", "encoder_layers", 5, r"missing \(15\): audio_encoder.layers.4"),
        ("language_config", "intermediate_size", 64, r"mlp.\w+_proj.weight has shape"),
        ("audio_config", "conv_chunksize", 0, "conv_chunksize = 0: it must be 1 to"),
        ("audio_config", "conv_chunksize", [64], r"conv_chunksize = \[64\]: it must be a whole number"),
        ("audio_config", "d_model", "256", "d_model = '256': it must be a whole number"),
        ("language_config", "vocab_size", 2**31, "embed_tokens.weight has shape"),
        ("language_config", "num_attention_heads", [4], r"num_attention_heads = \[4\]: it must be a whole number"),
        ("language_config", "rope_theta", None, "lacks language_config.rope_theta"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, section, key, value, message):
    directory = write_checkpoint(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config[section][key] = value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message) as caught:
        load_oracle(directory)
    assert "Traceback" not in str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        load_oracle(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConversionError, match=r"neither model\.safetensors nor"):
        load_oracle(tmp_path)
    directory = write_checkpoint(tmp_path / "model", n_shard=3)
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"no header")
    with pytest.raises(ConversionError, match=r"model-00002-of-00003.safetensors is no whole safetensors file"):
        load_oracle(directory)


def test_rope_parameters_as_newer_versions_write_them(tmp_path, oracle):
    directory = write_checkpoint(tmp_path / "model", seed=7)
    config = json.loads((directory / "config.json").read_text())
    theta = config["language_config"].pop("rope_theta")
    config["language_config"]["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    (directory / "config.json").write_text(json.dumps(config))
    ids, mask = prompt(2)
    got = load_oracle(directory).run(random_mels(16), ids, mask)
    np.testing.assert_array_equal(got["logits"], oracle("default").run(random_mels(16), ids, mask)["logits"])


def test_activations_stay_near_one(oracle):
    stages = run_oracle(oracle, "default", random_mels(600))
    spread = {
        name: value.std() for name, value in stages.items() if re.match(r"(enc|llm)\.(blk|inject|out|final)", name)
    }
    assert len(spread) > 10
    assert all(0.5 < value < 2 for value in spread.values()), spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_ways_to_read_a_tensor(tmp_path, monkeypatch, dtype):
    """That of the program for another environment, and that of this one: by pieces, and with a file cut short."""
    directory = write_checkpoint(tmp_path / "model", n_shard=1)
    path = directory / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(path).items()}
    save_tensors(tensors, path)
    monkeypatch.setattr(lazy, "ROWS_BYTES", 96)
    monkeypatch.setattr(model, "ROWS_BYTES", 96)
    checkpoint = open_world(directory)
    places = {n: (str(t.file), t.dtype, list(t.shape), t.offset) for n, t in checkpoint.tensors.items()}
    stored = lazy.Stored(json.loads(json.dumps(places)))
    for name in ("audio_encoder.conv2.weight", "audio_encoder.conv1.bias", "lm_head.weight"):
        for found in (stored.read(name), read_tensor(checkpoint, name)):
            assert found.dtype == torch.float32
            assert torch.equal(found, tensors[name].float()), name
    last = max(checkpoint.tensors.values(), key=lambda t: t.offset).name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match=f"ends inside {last}: it was cut short"):
        stored.read(last)
    with pytest.raises(ConversionError, match="it was cut short while being read"):
        read_tensor(checkpoint, last)
