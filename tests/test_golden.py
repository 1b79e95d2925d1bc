"""The main job against the official code: every stage, every generated token, on three recordings.

The golden files hold what the official PyTorch code computed in float32 with a small checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import Model, load
from auricle.engine.audio import load_audio, log_mel
from auricle.engine.models.moss_audio import token_count
from auricle.engine.session import Heard
from auricle.tools.stages import drop_padding, mean_divergence, read_stages, row_cosines, trace_stages
from support import SHARED, needs_shared

pytestmark = needs_shared

GOLDEN = SHARED / "golden" / "a"
CLIPS = ["jfk", "jfk_3s", "late_loud"]
PROMPT = "Transcribe the audio."
N_NEW = 48

# Smallest per-row cosine, and largest error where one is promised.
LIMITS = {"f32": (0.999999, 1e-4), "bf16": (0.999999, 1e-4), "f16": (0.999999, 1e-4), "q8_0": (0.999, 1.0)}


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
    return read_stages(GOLDEN / f"{clip}.safetensors")


def trace(model: Model, clip: str) -> dict[str, np.ndarray]:
    """Every stage that the golden file has, from the audio file on, and the greedy tokens."""
    audio = SHARED / "data" / "audio" / f"{clip}.wav"
    heard = model.listen(audio)
    prompt = model.build_prompt(PROMPT, heard)
    names = [name for name in golden(clip)[0] if name not in ("input_ids", "generated_ids")]
    result = model.generate(PROMPT, audio, max_new_tokens=N_NEW)
    return {
        **trace_stages(model, heard, prompt, names),
        "input_ids": prompt.ids,
        "generated_ids": np.array(result.token_ids, np.int32),
        "text": result.text,
    }


def comparable(stage: np.ndarray, clip: str) -> np.ndarray:
    """Rows of valid tokens: the windows are of 400 frames, the last one of what is left."""
    n_frames = golden(clip)[0]["mel"].shape[1]
    return drop_padding(stage, [token_count(min(400, n_frames - start)) for start in range(0, n_frames, 400)])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("type_name", LIMITS)
def test_every_stage(models: dict[str, Path], type_name: str, backend: str, clip: str) -> None:
    want, metadata = golden(clip)
    least_cosine, most_error = LIMITS[type_name]
    with load(models[type_name], backend=backend, n_ctx=512, kv_type="f32", poison=True) as model:
        got = trace(model, clip)
    np.testing.assert_array_equal(got["input_ids"], want["input_ids"])
    assert got["mel"].shape == want["mel"].shape
    for name, expected in want.items():
        if name in ("input_ids", "generated_ids"):
            continue
        assert got[name].shape == expected.shape, name
        a, b = comparable(got[name], clip), comparable(expected, clip)
        assert np.isfinite(a).all(), name
        if name == "mel":
            a, b = a.T, b.T
        assert row_cosines(a, b).min() >= least_cosine, name
        assert np.abs(a - b).max() <= most_error, name
    if type_name != "q8_0":
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
    """With the maximum of its own four seconds the first window is far from the golden one: the test above can fail."""
    samples = load_audio(SHARED / "data" / "audio" / "late_loud.wav")
    early = Heard([log_mel(samples[: 4 * 16_000])], 4.0)
    with load(models["f32"], n_ctx=512) as model:
        rows = model.runtime.encode(early.mels)[0].numpy()
    assert np.abs(rows[:50] - golden("late_loud")[0]["adapter"][:50]).max() > 1e-2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunked_prefill_and_small_batches_agree(models: dict[str, Path], backend: str) -> None:
    """Windows one at a time and a prompt in chunks of 7 give what the golden file has."""
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
        a, b = comparable(value, "jfk"), comparable(want[name], "jfk")
        assert np.abs(a - b).max() <= 1e-4, name


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_small_caches_stay_close(models: dict[str, Path], kv_type: str) -> None:
    want, _ = golden("jfk")
    with load(models["f32"], n_ctx=512, kv_type=kv_type, poison=True) as model:
        got = trace(model, "jfk")
    assert row_cosines(got["logits"], want["logits"]).min() >= (0.99999 if kv_type == "f16" else 0.999)


@pytest.mark.parametrize("clip", CLIPS)
def test_rounded_activations_keep_the_answer(models: dict[str, Path], clip: str) -> None:
    """Int8 activations beside the reference on the same file, along the official answer: little divergence, and the
    same likeliest token wherever the reference's margin is above twice the error of the logits."""
    answers = []
    for backend in ("reference", "cpu"):
        with load(models["q8_0"], backend=backend, n_ctx=512, kv_type="f32", poison=True) as model:
            heard = model.listen(SHARED / "data" / "audio" / f"{clip}.wav")
            prompt = model.build_prompt(PROMPT, heard)
            rows = model.runtime.encode(heard.mels)
            prefix = model.runtime.trace_decoder(prompt, rows, ["logits"], {})["logits"]
            ids = golden(clip)[0]["generated_ids"].tolist()
            steps = [model.runtime.decode(token, len(prompt.ids) + i).copy() for i, token in enumerate(ids)]
            answers.append(np.concatenate([prefix, steps]))
    want, got = answers
    assert mean_divergence(got, want) <= 1e-3
    error = np.abs(got - want).max(-1)
    second, first = np.sort(want, -1)[:, -2:].T
    clear = first - second > 2 * error
    assert clear.mean() > 0.5, "the margins say nothing"
    np.testing.assert_array_equal(got.argmax(-1)[clear], want.argmax(-1)[clear])
    assert error.max() > 1e-4, "nothing was rounded"
