"""The diff harness: metrics, limits, sources, and the command. Faults are planted in test_diff_faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.engine.gguf import string
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.sampling import OptionError
from auricle.kernels.formats import F32
from auricle.tools.cli.main import run  # noqa: F401  (registers the commands)
from auricle.tools.diff import metrics, thresholds
from auricle.tools.diff.audit import audit, read_gguf
from auricle.tools.diff.locate import added_errors, compare_ops, run_diff
from auricle.tools.diff.request import Blocks, DiffError, Request, blocks_of, make_request, open_model
from auricle.tools.diff.sources import ModelFile, from_archive, open_stages
from auricle.tools.diff.walk import Walk
from auricle.tools.sample import SampleShape, write_checkpoint
from auricle.tools.stages import read_stages
from sounds import encode, synthetic
from support import SHARED, diff_command, needs_shared

GOLDEN = SHARED / "golden" / "a"
SHAPE = SampleShape(
    n_window=20,
    taps=(0, 2),
    n_inject=2,
    enc_n_layer=3,
    enc_d_model=64,
    enc_d_out=48,
    enc_d_ff=96,
    d_adapter=64,
    d_model=96,
    n_layer=3,
    d_head=64,
    d_ff=128,
)
PROMPT = "What do you hear?"


# Metrics.


def test_metrics_are_those_of_whole_arrays() -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal((300, 7)).astype(np.float32)
    a = (b + 0.01 * rng.standard_normal(b.shape)).astype(np.float32)
    comparison = metrics.Comparison()
    for start in range(0, 300, 64):
        comparison.add(a[start : start + 64], b[start : start + 64])
    got = comparison.metrics()
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    errors = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)
    want = {
        "cos_min": cosines.min(),
        "cos_p1": np.percentile(cosines, 1),
        "cos_mean": cosines.mean(),
        "nmse": np.square(x - y).sum() / np.square(y).sum(),
        "error_max": errors.max(),
        "max_abs": np.abs(x - y).max(),
        "max_relative": (np.abs(x - y).max(-1) / np.sqrt(np.square(y).mean(-1))).max(),
        "norm_ratio": np.linalg.norm(x) / np.linalg.norm(y),
    }
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-9)
    positions = comparison.positions()
    assert len(positions["starts"]) == len(positions["cos_min"]) == 200
    assert min(positions["cos_min"]) == pytest.approx(cosines.min(), rel=1e-8)
    assert positions["worst_rows"][0]["row"] == errors.argmax()


def test_logits_metrics_by_hand() -> None:
    b = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]], np.float32))
    a = np.log(np.array([[0.2, 0.7, 0.1], [0.25, 0.5, 0.25]], np.float32)) + 3
    comparison = metrics.Comparison(logits=True)
    comparison.add(a, b)
    got = comparison.metrics()
    divergence = 0.7 * np.log(0.7 / 0.2) + 0.2 * np.log(0.2 / 0.7)
    assert got["kl_mean"] == pytest.approx(divergence / 2, rel=1e-6)
    assert got["kl_max"] == pytest.approx(divergence, rel=1e-6)
    assert (got["top1"], got["top5"]) == (0.5, 1.0)
    assert (got["p_choice"], got["p_choice_reference"]) == pytest.approx((0.35, 0.6), rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_ends_a_comparison(value: float, side: int) -> None:
    sides = [np.ones((5, 3), np.float32), np.ones((5, 3), np.float32)]
    sides[side][3, 1] = value
    comparison = metrics.Comparison()
    comparison.add(sides[0][:2], sides[1][:2])
    comparison.add(sides[0][2:], sides[1][2:])
    assert comparison.bad == (["this side", "the reference"][side], 3)
    assert comparison.metrics() == {}


def test_zero_rows_and_shapes() -> None:
    comparison = metrics.Comparison()
    comparison.add(np.zeros((2, 3), np.float32), np.array([[0, 0, 0], [0, 1, 0]], np.float32))
    assert comparison.metrics()["cos_min"] == 0.0
    assert comparison.metrics()["cos_mean"] == 0.5
    with pytest.raises(AssertionError):
        comparison.add(np.zeros((2, 3)), np.zeros((2, 4)))
    assert [len(b) for b in blocks_of(np.zeros((300, 1)))] == [128, 128, 44]
    assert len(list(blocks_of(Blocks((3, 1), iter([np.zeros((3, 1))]))))) == 1


# Limits.


def test_limits_follow_the_types() -> None:
    assert thresholds.noise_of([("Q8_0", "Q8_0"), ("F32", "BF16"), ("BF16", "BF16")]) == 0.0
    assert thresholds.noise_of([("F32", None)]) == 0.0
    assert thresholds.noise_of([("Q8_0", None), ("F32", None)]) == thresholds.NOISE["Q8_0"]
    assert thresholds.noise_of([("F32", "Q4_K")]) == thresholds.NOISE["Q4_K"]
    assert thresholds.noise_of([("TQ1_0", None)]) == thresholds.WORST
    ranked = [thresholds.limits_for("llm.blk.0", ["linear"], n, "stage") for n in sorted(thresholds.NOISE.values())]
    assert all(a["nmse"] <= b["nmse"] and a["cos_min"] >= b["cos_min"] for a, b in pairwise(ranked))
    exact, summed = (thresholds.limits_for("x", ops, 0.0, "op")["nmse"] for ops in (["rms_norm"], ["linear"]))
    assert exact < summed


def test_a_metric_that_is_nan_fails() -> None:
    assert thresholds.failures({"cos_min": float("nan"), "nmse": float("nan")}, {"cos_min": 0.9, "nmse": 1.0})


def test_overrides() -> None:
    overrides = thresholds.parse_overrides(["llm.blk.*=0.5", "logits:kl_mean=0.1"])
    limits = {"nmse": 1e-9, "cos_min": 0.999999}
    assert thresholds.apply_overrides("llm.blk.3", limits, overrides) == {"cos_min": 0.5}
    assert thresholds.apply_overrides("logits", limits, overrides) == limits | {"kl_mean": 0.1}
    assert thresholds.apply_overrides("enc.out", limits, overrides) == limits
    for text in ("llm.blk.0", "=0.5", "x=high"):
        with pytest.raises(OptionError, match="write STAGE=COSINE"):
            thresholds.parse_overrides([text])


# Goldens.


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("diff")
    paths = {name: folder / f"{name}.gguf" for name in ("f32", "f16", "q8_0")}
    for name, path in paths.items():
        convert(plan_conversion(GOLDEN / "checkpoint", name), path)
    return paths


@needs_shared
@pytest.mark.parametrize("clip", ["jfk", "jfk_3s", "late_loud"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("type_name", ["f32", "f16", "q8_0"])
def test_goldens_pass(golden_files: dict[str, Path], type_name: str, backend: str, clip: str) -> None:
    source = open_stages(GOLDEN / f"{clip}.safetensors")
    mode = "isolate" if clip == "jfk_3s" else "chain"
    asked = make_request([SHARED / "data" / "audio" / f"{clip}.wav"], source.prompt, 6)
    with open_model(golden_files[type_name], asked, backend=backend) as model:
        outcome = run_diff(model, asked, source, mode=mode)
    assert outcome.verdict.passed, outcome.verdict.summary
    stages, _ = read_stages(GOLDEN / f"{clip}.safetensors")
    assert {r.name for r in outcome.stages} == stages.keys() - {"generated_ids"}
    assert all(r.limits and r.metrics for r in outcome.stages)
    least = min(r.metrics["cos_min"] for r in outcome.stages if "cos_min" in r.metrics)
    assert least >= {"f32": 0.9999999, "f16": 0.999999, "q8_0": 0.999}[type_name]
    if type_name == "f32":
        assert outcome.tokens.own == outcome.tokens.reference


# Sources.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint, files of it, two clips, and the stages that an F32 file computes for the first."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: folder / name for name in ("checkpoint", "f32.gguf", "q8_0.gguf", "a.wav", "b.wav")}
    write_checkpoint(paths["checkpoint"], SHAPE, seed=2)
    for name in ("f32", "q8_0"):
        convert(plan_conversion(paths["checkpoint"], name), paths[f"{name}.gguf"])
    paths["a.wav"].write_bytes(encode(synthetic(1.3, 16_000), 16_000, "wav"))
    paths["b.wav"].write_bytes(encode(synthetic(0.37, 16_000, seed=1), 16_000, "wav"))
    return paths


def collect(path: Path, asked: Request, backend: str = "reference") -> dict[str, np.ndarray]:
    """Every stage and the answer as a model file gives them."""
    stages: dict[str, np.ndarray] = {}

    def keep(name: str, value: np.ndarray | Blocks, part: str) -> None:
        stages[name] = np.concatenate(list(blocks_of(value))) if isinstance(value, Blocks) else value

    source = ModelFile(path, asked, backend)
    with open_model(path, asked, backend=backend) as model:
        wanted = [*Walk(model, asked).outline.names(False), "generated_ids", "decode.logits"]
    source.trace(asked, wanted, keep)
    source.close()
    return stages


@pytest.mark.parametrize("audio", [["a.wav"], ["a.wav", "b.wav"], []])
@pytest.mark.parametrize("mode", ["chain", "bisect"])
@pytest.mark.parametrize(("precision", "most"), [("exact", 1e-10), ("auto", 1e-3)])
def test_one_file_on_two_backends(
    files: dict[str, Path], audio: list[str], mode: str, precision: str, most: float
) -> None:
    asked = make_request([files[name] for name in audio], PROMPT, 4)
    with open_model(files["q8_0.gguf"], asked, backend="cpu", precision=precision) as model:
        outcome = run_diff(model, asked, ModelFile(files["q8_0.gguf"], asked, "reference"), mode=mode)
    assert outcome.verdict.passed, outcome.verdict.summary
    assert not outcome.missing
    assert max(r.metrics.get("nmse", 0) for r in outcome.stages) < most
    assert bool(outcome.ops) == (mode == "bisect")


def test_a_checkpoint_agrees_and_is_isolated(files: dict[str, Path]) -> None:
    checkpoint = pytest.importorskip("auricle.tools.diff.checkpoint")
    pytest.importorskip("transformers")
    asked = make_request([files["a.wav"], files["b.wav"]], PROMPT, 5)
    with open_model(files["q8_0.gguf"], asked, backend="cpu") as model:
        walk = Walk(model, asked)
        chain, isolated = (
            run_diff(model, asked, checkpoint.Checkpoint(files["checkpoint"], walk), mode=mode)
            for mode in ("chain", "isolate")
        )
    assert chain.verdict.passed, chain.verdict.summary
    assert isolated.verdict.passed, isolated.verdict.summary
    errors = [{r.name: r.metrics.get("nmse", 0) for r in o.stages} for o in (chain, isolated)]
    assert errors[1]["llm.blk.2"] < errors[0]["llm.blk.2"] / 2, "alone a layer adds less than all before it"
    assert errors[1]["llm.final_norm"] < 1e-12 < errors[0]["llm.final_norm"], "a norm has no quantised weight"
    assert errors[1]["llm.inject.0"] == 0
    assert chain.tokens.reference == collect(files["f32.gguf"], asked)["generated_ids"].tolist()


def test_weights_that_do_not_stay_give_the_same(files: dict[str, Path]) -> None:
    oracle = pytest.importorskip("auricle.tools.oracle.model")
    mel = np.random.default_rng(0).standard_normal((128, 40)).astype(np.float32)
    ids = np.full(7, 5)
    ids[1:6] = 9
    runs = []
    for resident in (0, 100_000, sys.maxsize):
        model = oracle.load_oracle(files["checkpoint"], resident)
        runs.append(model.run([mel], ids, ids == 9, n_new=3))
        held = sum(4 * p.numel() for p in model.model.parameters() if not p.is_meta)
        assert held <= resident
    for name, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[2][name], err_msg=name)
        np.testing.assert_array_equal(value, runs[1][name], err_msg=name)


def write_archive(path: Path, tensors: dict[str, np.ndarray]) -> None:
    layout = plan_layout(
        {"general.architecture": string("activations")}, [(n, t.shape, F32) for n, t in tensors.items()]
    )
    with GGUFWriter(path, layout) as writer:
        for name, value in tensors.items():
            writer.write(name, np.ascontiguousarray(value, "<f4").view(np.uint8))


def test_an_archive_of_the_peer(files: dict[str, Path], tmp_path: Path) -> None:
    """Names are mapped; a stage of which only the first window or the last row is stored is compared there."""
    asked = make_request([files["a.wav"]], PROMPT, 3)
    stages = collect(files["f32.gguf"], asked)
    archive = {
        "mel_spectrogram": stages["mel"],
        "enc_layer_2": stages["enc.blk.2"][:5],
        "encoder_output": stages["enc.out"],
        "adapter_output": stages["adapter"],
        "deepstack_proj_1": stages["deepstack.1"],
        "prefill_inputs_embeds": stages["llm.embed"],
        "prefill_last_hidden": stages["llm.final_norm"][-1],
        "prefill_logits_step0": stages["logits"][-1],
        "prefill_argmax_step0": stages["generated_ids"][:1].astype(np.float32),
    }
    write_archive(tmp_path / "good.gguf", archive)
    archive["enc_layer_2"] = stages["enc.blk.2"][:4]
    archive["prefill_logits_step0"] = archive["prefill_logits_step0"] + np.eye(1, 512, 7, dtype=np.float32)[0]
    write_archive(tmp_path / "bad.gguf", archive)
    outcomes = []
    with open_model(files["f32.gguf"], asked, backend="cpu") as model:
        for name in ("good.gguf", "bad.gguf"):
            outcomes.append(run_diff(model, asked, open_stages(tmp_path / name)))
    good, bad = outcomes
    assert good.verdict.passed, good.verdict.summary
    assert {r.name: r.rows for r in good.stages if r.rows != "all"} == {
        "enc.blk.2": "first window",
        "llm.final_norm": "last row",
        "logits": "last row",
    }
    assert [r.name for r in good.stages][:2] == ["mel", "enc.blk.2"]
    assert good.tokens.reference == stages["generated_ids"][:1].tolist()
    assert [r.name for r in bad.stages if not r.passed] == ["enc.blk.2", "logits"]
    assert "shape [5, 64] here, [4, 64] in the reference" in bad.stages[1].failures[0]


def test_names_in_archives() -> None:
    assert from_archive("enc_layer_24") == ("enc.blk.24", "first window")
    assert from_archive("deepstack_proj_0") == ("deepstack.0", "all")
    assert from_archive("generated_text") is None


def test_tensors_are_compared_by_blocks(files: dict[str, Path]) -> None:
    asked = make_request([], PROMPT, 0)
    own, other = (open_model(files[f"{name}.gguf"], asked, backend="cpu") for name in ("q8_0", "f32"))
    with own, other:
        types = {name: t.format.name for name, t in other.file.tensors.items()}
        results = list(audit(own.file, types, read_gguf(other.file)))
    assert len(results) == len(types)
    assert not [r.name for r in results if r.failures]
    quantised = [r for r in results if r.type == "Q8_0"]
    assert all(3e-3 < r.error < 8e-3 and r.worst > 3e-3 for r in quantised)
    assert all(r.error == 0 == r.worst for r in results if r.type == "F32")


def test_errors_that_tensors_add(files: dict[str, Path]) -> None:
    """Each quantised matrix has a number of its own, and its norms and biases none."""
    asked = make_request([files["a.wav"]], PROMPT, 0)
    with open_model(files["q8_0.gguf"], asked, backend="reference") as model:
        other = ModelFile(files["f32.gguf"], asked, "reference")
        added = added_errors(compare_ops(model, asked, other, None, ()))
        matrices = {name for name, t in model.file.tensors.items() if t.format.name == "Q8_0"}
    assert added.keys() >= matrices - {"enc.out_proj.weight"}
    assert all(1e-6 < added[name] < 3e-4 for name in matrices - {"enc.out_proj.weight"})


# The command.


def test_the_command_passes(files: dict[str, Path]) -> None:
    status, text = diff_command(
        files["q8_0.gguf"], files["a.wav"], "--against", files["f32.gguf"], "--tokens", 3, "--prompt", PROMPT
    )
    assert status == 0, text
    assert "agrees: all limits hold" in text
    assert "\x1b" not in text
    assert "llm.blk.2 " in text


def test_the_command_fails_with_a_status_of_its_own(files: dict[str, Path]) -> None:
    arguments = [files["q8_0.gguf"], files["a.wav"], "--against", files["f32.gguf"], "--tokens", 0]
    status, text = diff_command(*arguments, "--threshold", "enc.blk.1=0.9999999")
    assert status == 7, text
    assert "differs first at enc.blk.1" in text
    status, text = diff_command(*arguments, "--threshold", "logits:kl_mean=0")
    assert status == 7
    assert "differs first at logits" in text


def test_the_document(files: dict[str, Path]) -> None:
    status, text = diff_command(
        files["q8_0.gguf"], files["a.wav"], "--against", files["f32.gguf"], "--tokens", 3, "--bisect", "--json"
    )
    assert status == 0
    facts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert facts["format"] == "auricle.diff"
    assert facts["verdict"]["passed"]
    assert facts["meta"]["mode"] == "bisect"
    assert facts["meta"]["model"]["types"]["decoder"]["Q8_0"] == 21
    (start, stop), *more = facts["meta"]["audio_spans"]
    assert (stop - start, more) == (sum(facts["meta"]["windows"]), [])
    names = [stage["name"] for stage in facts["stages"]]
    assert names[:3] == ["mel", "input_ids", "enc.stem_proj"]
    assert names[-2:] == ["logits", "decode.logits"]
    logits = facts["stages"][-2]
    assert {"cos_min", "cos_p1", "cos_mean", "nmse", "max_abs", "norm_ratio", "kl_mean", "kl_p99"} <= logits[
        "metrics"
    ].keys()
    assert len(logits["positions"]["cos_min"]) == facts["meta"]["n_tokens"] <= 200
    assert {op["name"] for op in facts["ops"]} >= {"llm.blk.0:rope", "enc.conv2", "llm.blk.2.attn.q"}
    assert len(facts["tokens"]["own"]["pieces"]) == 3
    assert all(t["nbytes"] > 0 for t in facts["tensors"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "give one of --reference"),
        (["--against", "x.gguf", "--checkpoint", "y"], "give one of --reference"),
        (["--official", "x"], "--checkpoint DIR"),
        (["--reference", "nothing.safetensors"], "cannot read nothing.safetensors"),
        (["--checkpoint", "{checkpoint}", "--threshold", "mel"], "write STAGE=COSINE"),
        (["--checkpoint", "{checkpoint}", "--tokens", "-1"], "--tokens is -1"),
        (["--official", "{checkpoint}", "--checkpoint", "{checkpoint}"], "has no src/modeling_moss_audio.py"),
    ],
)
def test_wrong_use_is_one_line(files: dict[str, Path], options: list[str], complaint: str) -> None:
    options = [option.format(checkpoint=files["checkpoint"]) for option in options]
    status, text = diff_command(files["f32.gguf"], files["a.wav"], *options)
    assert status == 2
    assert complaint in text
    assert "\n" not in text.strip()


def test_an_official_program_that_fails_says_why(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "modeling_moss_audio.py").write_text("raise ImportError('needs a library that is not here')\n")
    paths = ["--official", tmp_path, "--checkpoint", files["checkpoint"], "--official-python", sys.executable]
    status, text = diff_command(files["f32.gguf"], files["a.wav"], *paths)
    assert status == 2
    assert "the official code stopped: ImportError: needs a library that is not here" in text


@needs_shared
@pytest.mark.skipif("AURICLE_OFFICIAL" not in os.environ, reason="needs AURICLE_OFFICIAL, a checkout, and its Python")
def test_the_official_code_agrees(golden_files: dict[str, Path]) -> None:
    """AURICLE_OFFICIAL is a checkout of the official repository, AURICLE_OFFICIAL_PYTHON a Python that can run it."""
    python = os.environ.get("AURICLE_OFFICIAL_PYTHON", sys.executable)
    paths = ["--official", os.environ["AURICLE_OFFICIAL"], "--checkpoint", GOLDEN / "checkpoint"]
    audio = SHARED / "data" / "audio" / "jfk_3s.wav"
    status, text = diff_command(golden_files["f32"], audio, *paths, "--official-python", python, "--bisect")
    assert status == 0, text


def test_importing_the_command_is_light() -> None:
    code = (
        "import auricle.tools.cli.diff, sys; print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_file_without_stages_says_so(tmp_path: Path, files: dict[str, Path]) -> None:
    write_archive(tmp_path / "other.gguf", {"nothing_of_ours": np.ones((2, 2), np.float32)})
    asked = make_request([files["a.wav"]], PROMPT, 0)
    with (
        open_model(files["f32.gguf"], asked, backend="cpu") as model,
        pytest.raises(DiffError, match="none of the stages"),
    ):
        run_diff(model, asked, open_stages(tmp_path / "other.gguf"))
