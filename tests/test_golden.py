"""The main job against the official code: every stage, every generated token, on three recordings.

The golden files hold what the official PyTorch code computed in float32 with a small checkpoint.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import Model, load
from auricle.engine.models.moss_audio import token_count
from auricle.engine.session import Heard
from support import SHARED, needs_shared

pytestmark = needs_shared

GOLDEN = SHARED / "golden" / "a"
CLIPS = ["jfk", "jfk_3s", "late_loud"]
PROMPT = "Transcribe the audio."
N_NEW = 48

# Smallest per-row cosine, and largest error where one is promised.
LIMITS = {"f32": (0.999999, 1e-4), "bf16": (0.999999, 1e-4), "f16": (0.999999, 1e-2), "q8_0": (0.999, 1.0)}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden checkpoint in every type."""
    directory = tmp_path_factory.mktemp("golden")
    paths = {name: directory / f"{name}.gguf" for name in LIMITS}
    for name, path in paths.items():
        convert(plan_conversion(GOLDEN / "checkpoint", name), path)
    return paths


@cache
def golden(clip: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(GOLDEN / f"{clip}.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def trace(model: Model, clip: str) -> dict[str, np.ndarray]:
    """Every stage that the golden file has, from the audio file on, and the greedy tokens."""
    heard = model.listen(SHARED / "data" / "audio" / f"{clip}.wav")
    prompt = model.build_prompt(PROMPT, heard)
    stages = [name for name in golden(clip)[0] if name not in ("mel", "input_ids", "generated_ids")]
    encoder = [name for name in stages if not name.startswith("llm.") and name != "logits"]
    decoder = [name for name in stages if name not in encoder]
    rows = model.runtime.encode(heard.mels)
    result = model.generate(PROMPT, SHARED / "data" / "audio" / f"{clip}.wav", max_new_tokens=N_NEW)
    return {
        "mel": heard.mels[0],
        "input_ids": prompt.ids,
        **model.runtime.trace_encoder(heard.mels, encoder, {}),
        **model.runtime.trace_decoder(prompt, rows, decoder, {}),
        "generated_ids": np.array(result.token_ids, np.int32),
        "text": result.text,
    }


def drop_padding(stage: np.ndarray, n_frames: int, window: int = 400) -> np.ndarray:
    """Rows of valid tokens of [windows, tokens, d]: only the last window can be short."""
    if stage.ndim == 2:
        return stage
    n_tail = token_count(n_frames - window * (len(stage) - 1))
    return np.concatenate([stage[:-1].reshape(-1, stage.shape[-1]), stage[-1, :n_tail]])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("type_name", LIMITS)
def test_every_stage(models: dict[str, Path], type_name: str, backend: str, clip: str) -> None:
    want, metadata = golden(clip)
    least_cosine, most_error = LIMITS[type_name]
    with load(models[type_name], backend=backend, n_ctx=512, kv_type="f32", poison=True) as model:
        got = trace(model, clip)
    np.testing.assert_array_equal(got["input_ids"], want["input_ids"])
    n_frames = want["mel"].shape[1]
    assert got["mel"].shape == want["mel"].shape
    for name, expected in want.items():
        if name in ("input_ids", "generated_ids"):
            continue
        assert got[name].shape == expected.shape, name
        a, b = (drop_padding(x, n_frames) for x in (got[name], expected))
        assert np.isfinite(a).all(), name
        if name == "mel":
            a, b = a.T, b.T
        assert cosines(a, b).min() >= least_cosine, name
        assert np.abs(a - b).max() <= most_error, name
    if type_name in ("f32", "bf16"):
        np.testing.assert_array_equal(got["generated_ids"], want["generated_ids"])
        assert got["text"] == metadata["generated_text"]


@pytest.mark.parametrize("clip", CLIPS)
def test_bf16_is_bit_equal_to_f32_on_the_reference(models: dict[str, Path], clip: str) -> None:
    traces = []
    for type_name in ("f32", "bf16"):
        with load(models[type_name], backend="reference", n_ctx=512) as model:
            traces.append(trace(model, clip))
    for name, value in traces[0].items():
        np.testing.assert_array_equal(value, traces[1][name], err_msg=name)


def test_the_clip_maximum_matters(models: dict[str, Path]) -> None:
    """A mel whose maximum is taken window by window is far from the golden one: the test above can fail."""
    from auricle.engine.mel import log_mel

    with load(models["f32"], n_ctx=512) as model:
        heard = model.listen(SHARED / "data" / "audio" / "late_loud.wav")
        want = golden("late_loud")[0]
        from auricle.engine.audio import load_audio

        samples = load_audio(SHARED / "data" / "audio" / "late_loud.wav")
        early = Heard([log_mel(samples[: 4 * 16000])], 4.0)
        rows = model.runtime.encode(early.mels)[0].numpy()
    assert np.abs(rows[:50] - want["adapter"][:50]).max() > 1e-2
    assert heard.mels[0].shape == want["mel"].shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunked_prefill_and_small_batches_agree(models: dict[str, Path], backend: str) -> None:
    """Windows one at a time and a prompt in chunks of 7 give what the golden file has."""
    from dataclasses import replace

    want, _ = golden("jfk")
    with load(models["f32"], backend=backend, n_ctx=512, kv_type="f32", poison=True) as model:
        model.backend = replace(model.backend, window_batch=1, prefill_chunk=7)
        got = trace(model, "jfk")
    assert np.abs(got["logits"] - want["logits"]).max() <= 1e-4
    np.testing.assert_array_equal(got["generated_ids"], want["generated_ids"])


def test_feeding_a_stage_continues_from_it(models: dict[str, Path]) -> None:
    """With the golden input of a layer, its output is the golden one; the producers are not run."""
    want, _ = golden("jfk")
    with load(models["f32"], backend="reference", n_ctx=512) as model:
        heard = model.listen(SHARED / "data" / "audio" / "jfk.wav")
        prompt = model.build_prompt(PROMPT, heard)
        feed = {"enc.blk.1": want["enc.blk.1"]}
        got = model.runtime.trace_encoder(heard.mels, ["enc.blk.2", "deepstack.0"], feed)
        rows = model.runtime.encode(heard.mels)
        got |= model.runtime.trace_decoder(prompt, rows, ["llm.blk.4", "logits"], {"llm.blk.3": want["llm.blk.3"]})
    for name, value in got.items():
        a, b = (drop_padding(x, want["mel"].shape[1]) for x in (value, want[name]))
        assert np.abs(a - b).max() <= 1e-4, name


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_small_caches_stay_close(models: dict[str, Path], kv_type: str) -> None:
    want, _ = golden("jfk")
    with load(models["f32"], n_ctx=512, kv_type=kv_type, poison=True) as model:
        got = trace(model, "jfk")
    assert cosines(got["logits"], want["logits"]).min() >= (0.99999 if kv_type == "f16" else 0.999)
