"""Eleven faults, planted one at a time: the harness must find each, and name the place where it was planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import mel, prompts, runtime, session
from auricle.engine.backends import cpu, reference
from auricle.engine.gguf import open_gguf
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.models import moss_audio, qwen3
from auricle.engine.prompts import SECONDS_PER_MARKER, TOKENS_PER_MARKER
from auricle.tools.diff.audit import read_checkpoint
from auricle.tools.diff.checkpoint import Checkpoint
from auricle.tools.diff.locate import Verdict, run_diff
from auricle.tools.diff.request import Request, open_model
from auricle.tools.diff.sources import ModelFile, StageFile, open_stages
from auricle.tools.diff.walk import Walk
from auricle.tools.sample import SampleShape, write_checkpoint
from auricle.tools.stages import read_stages
from sounds import synthetic

oracle = pytest.importorskip("auricle.tools.oracle.model", reason="needs transformers (the test extra)")

SHAPE = SampleShape(
    n_window=20,
    taps=(0, 1),
    n_inject=2,
    enc_n_layer=3,
    enc_d_model=64,
    enc_d_out=64,
    enc_d_ff=96,
    d_adapter=64,
    d_model=96,
    n_layer=2,
    d_head=64,
    d_ff=128,
)
PROMPT = "What do you hear?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, its F32 and Q8_0 files, and what the PyTorch model makes of a sound: quiet, then loud, 2.51 s."""
    folder = tmp_path_factory.mktemp("faults")
    paths = {name: folder / name for name in ("checkpoint", "f32.gguf", "q8_0.gguf", "stages.safetensors")}
    write_checkpoint(paths["checkpoint"], SHAPE, seed=5)
    for name in ("f32", "q8_0"):
        convert(plan_conversion(paths["checkpoint"], name), paths[f"{name}.gguf"])
    sound = request()
    with open_model(paths["f32.gguf"], sound, backend="reference") as model:
        walk = Walk(model, sound)
        mels = [walk.compute("mel")]
        stages = oracle.load_oracle(paths["checkpoint"]).run(mels, walk.prompt.ids, walk.prompt.audio_rows >= 0)
    save_stages(paths["stages.safetensors"], stages | {"mel": mels[0], "input_ids": walk.prompt.ids})
    return paths


def save_stages(path: Path, stages: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in stages.items()}, path)


def request() -> Request:
    sound = synthetic(2.51, 16_000, seed=3)  # a last window of 11 frames, whose end meets the padding
    sound[: len(sound) // 2] *= 1e-6  # far enough below the loudest part for the floor of the mel
    return Request((sound,), PROMPT)


def judge(path: Path, files: dict[str, Path], *, against: str = "checkpoint") -> Verdict:
    """The verdict of `--bisect` with the checkpoint, or with the stages alone."""
    asked = request()
    with open_model(path, asked, backend="reference") as model:
        if against == "stages":
            return run_diff(model, asked, StageFile(files["stages.safetensors"]), mode="bisect").verdict
        source = Checkpoint(files["checkpoint"], Walk(model, asked))
        return run_diff(model, asked, source, mode="bisect", read=read_checkpoint(files["checkpoint"])).verdict


@pytest.mark.parametrize("against", ["checkpoint", "stages"])
@pytest.mark.parametrize("file", ["f32.gguf", "q8_0.gguf"])
def test_no_fault_no_complaint(files: dict[str, Path], file: str, against: str) -> None:
    verdict = judge(files[file], files, against=against)
    assert verdict.passed, verdict.summary


# Faults in code.

Patch = pytest.MonkeyPatch


def change_config(patch: Patch, change: Callable[[moss_audio.MossAudioConfig], moss_audio.MossAudioConfig]) -> None:
    read = session.read_moss_audio
    patch.setattr(session, "read_moss_audio", lambda file: change(read(file)))


def shift_taps(patch: Patch) -> None:
    change_config(patch, lambda c: replace(c, taps=tuple(tap + 1 for tap in c.taps)))


def widen_rms_eps(patch: Patch) -> None:
    change_config(patch, lambda c: replace(c, decoder=replace(c.decoder, rms_norm_eps=1e-5)))


def narrow_layer_eps(patch: Patch) -> None:
    change_config(patch, lambda c: replace(c, encoder=replace(c.encoder, layer_norm_eps=1e-6)))


def inject_before(patch: Patch) -> None:
    """The rows of merger n are added to the input of layer n."""
    build = qwen3.build_decoder

    def build_decoder(g, c, n_tokens, n_ctx, *, inject, **options) -> None:
        def build_block(g, c, n, x, positions, n_ctx):
            if inject and n in inject.layers:
                x = g.add_rows(x, inject.layers[n], inject.index)
            return block(g, c, n, x, positions, n_ctx)

        block = qwen3.build_block
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(qwen3, "build_block", build_block)
            plain = replace(inject, layers={}) if inject else None
            build(g, c, n_tokens, n_ctx, inject=plain, **options)

    patch.setattr(moss_audio, "build_decoder", build_decoder)


def leave_tail_unpadded(patch: Patch) -> None:
    """Each window is a batch of its own length."""
    cut = runtime.cut_windows

    def cut_windows(c, mels, n_batch):
        for batch in cut(c, mels, 1):
            frames = c.encoder.window_frames
            total = sum(mel.shape[1] for mel in mels)
            valid = min(frames, total - batch.windows.start * frames)
            yield replace(batch, mel=batch.mel[..., :valid])

    patch.setattr(runtime, "cut_windows", cut_windows)


def add_k_bias(patch: Patch) -> None:
    build = moss_audio.build_linear

    def build_linear(g, name, x, n_out, bias=True):
        y = build(g, name, x, n_out, bias)
        if name.endswith("attn.k"):
            node = g.nodes.pop()
            bias_of_q = g.weight(f"{name[:-1]}q.bias", (n_out,))
            y = g.linear(*node.inputs[:2], bias_of_q)
        return y

    patch.setattr(moss_audio, "build_linear", build_linear)


def interleave_rope(patch: Patch) -> None:
    """Neighbours turn together, not elements half a head apart."""
    right = reference.DEFINITIONS["rope"]

    def rope(x, positions, *, theta):
        n, n_head, d = x.shape
        apart = x.reshape(n, n_head, d // 2, 2).transpose(-1, -2).reshape(n, n_head, d)
        turned = right(apart, positions, theta=theta)
        return turned.reshape(n, n_head, 2, d // 2).transpose(-1, -2).reshape(n, n_head, d)

    patch.setitem(reference.DEFINITIONS, "rope", rope)


def norm_after_rope(patch: Patch) -> None:
    """rms_norm(rope(q)): the two calls change places while a block is built."""
    build = qwen3.build_block

    def build_block(g, c, n, x, positions, n_ctx):
        def rope(normed, positions, *, theta):
            node = g.nodes.pop()
            assert node.op == "rms_norm"
            return g.rms_norm(
                g.append("rope", (node.inputs[0], positions), {"theta": theta}), node.inputs[1], **node.attrs
            )

        g.rope = rope
        try:
            return build(g, c, n, x, positions, n_ctx)
        finally:
            del g.rope

    patch.setattr(qwen3, "build_block", build_block)


def shift_markers(patch: Patch) -> None:
    """A marker comes one audio token early."""

    def audio_span(n_tokens, special, digits):
        span = [special.audio_start]
        for at in range(n_tokens):
            if digits is not None and at % TOKENS_PER_MARKER == TOKENS_PER_MARKER - 1:
                second = (at // TOKENS_PER_MARKER + 1) * SECONDS_PER_MARKER
                span += [digits[int(digit)] for digit in str(second)]
            span.append(special.audio)
        return [*span, special.audio_end]

    patch.setattr(prompts, "audio_span", audio_span)


def forget_the_floor(patch: Patch) -> None:
    """The log-mel without the floor of 8 below the clip's maximum."""
    patch.setattr(mel, "DYNAMIC_RANGE", 1e3)


# Fault -> where the verdict must be with the checkpoint (stage, value inside it, an op that is done there), and
# the stage with stages alone; None: stages alone cannot show it.
PLANTED: dict[str, tuple[Callable[[Patch], None], str, str | None, str | None, str | None]] = {
    "tap off by one": (shift_taps, "enc.tap.0", "enc.tap.0", "take_rows", "enc.tap.0"),
    "injection before the layer": (inject_before, "llm.blk.0", "llm.blk.0.attn_norm", "add_rows", "llm.blk.0"),
    "tail window not padded": (leave_tail_unpadded, "enc.stem_proj", "enc.conv1", "conv2d", "enc.stem_proj"),
    "k bias": (add_k_bias, "enc.blk.0", "enc.blk.0.attn.k", "linear", None),
    "rope interleaved": (interleave_rope, "llm.blk.0", "llm.blk.0:rope", "rope", "llm.blk.0"),
    "QK norm after rope": (norm_after_rope, "llm.blk.0", "llm.blk.0.attn.q_norm", "rope", "llm.blk.0"),
    "time markers": (shift_markers, "input_ids", None, None, "input_ids"),
    "mel without the floor": (forget_the_floor, "mel", None, None, "mel"),
    "rms eps": (widen_rms_eps, "llm.blk.0", "llm.blk.0.attn_norm", "rms_norm", "llm."),
    "layer norm eps": (narrow_layer_eps, "enc.blk.0", "enc.blk.0.attn_norm", "layer_norm", "enc."),
}


@pytest.mark.parametrize("fault", [name for name in PLANTED if name != "time markers"])
def test_a_fault_in_code_is_named(files: dict[str, Path], monkeypatch: Patch, fault: str) -> None:
    plant, stage, op, done, _ = PLANTED[fault]
    plant(monkeypatch)
    verdict = judge(files["f32.gguf"], files)
    assert not verdict.passed
    assert (verdict.stage, verdict.op) == (stage, op), verdict
    assert done is None or done in verdict.ops, verdict
    assert verdict.tensor is None
    assert (op or stage) in verdict.summary


@pytest.mark.parametrize("fault", [name for name, row in PLANTED.items() if row[4]])
def test_a_fault_in_code_is_named_by_stages_alone(files: dict[str, Path], monkeypatch: Patch, fault: str) -> None:
    plant, _, _, _, stage = PLANTED[fault]
    plant(monkeypatch)
    verdict = judge(files["f32.gguf"], files, against="stages")
    assert not verdict.passed
    assert verdict.stage.startswith(stage) if stage.endswith(".") else verdict.stage == stage, verdict
    assert verdict.op is None


def test_evidence_tells_which_rows(files: dict[str, Path], monkeypatch: Patch) -> None:
    leave_tail_unpadded(monkeypatch)
    assert "all in the last window" in judge(files["f32.gguf"], files, against="stages").evidence[0]


def test_evidence_tells_where_rows_begin(files: dict[str, Path], monkeypatch: Patch) -> None:
    inject_before(monkeypatch)
    assert "the first at an audio token" in judge(files["f32.gguf"], files, against="stages").evidence[0]


# Faults in files.


def rewrite(source: Path, target: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """The file again, with the bytes of its tensors changed by `change`."""
    with open_gguf(source) as file:
        tensors = {name: file.data(name).copy() for name in file.tensors}
        change(tensors)
        layout = plan_layout(dict(file.types), [(n, t.shape, t.format) for n, t in file.tensors.items()])
        with GGUFWriter(target, layout) as writer:
            for name, data in tensors.items():
                writer.write(name, data)
    return target


def swap(tensors: dict[str, np.ndarray]) -> None:
    q, v = "enc.blk.1.attn.q.weight", "enc.blk.1.attn.v.weight"
    tensors[q], tensors[v] = tensors[v], tensors[q]


def test_swapped_tensors_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    verdict = judge(rewrite(files["f32.gguf"], tmp_path / "swapped.gguf", swap), files)
    assert (verdict.stage, verdict.op) == ("enc.blk.1", "enc.blk.1.attn.q")
    assert verdict.tensor == "enc.blk.1.attn.q.weight"


def test_swapped_tensors_are_named_by_stages_alone(files: dict[str, Path], tmp_path: Path) -> None:
    verdict = judge(rewrite(files["f32.gguf"], tmp_path / "swapped.gguf", swap), files, against="stages")
    assert (verdict.stage, verdict.op, verdict.tensor) == ("enc.blk.1", None, None)
    assert "linear" in verdict.ops


def flip(name: str, row: int, byte: int, bit: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][row, byte] ^= 1 << bit

    return change


@pytest.mark.parametrize(("row", "byte", "bit"), [(5, 36, 6), (5, 36, 3), (95, 71, 2), (0, 35, 5)])
def test_a_flipped_bit_is_named(files: dict[str, Path], tmp_path: Path, row: int, byte: int, bit: int) -> None:
    """Byte 0, 1 of a Q8_0 block of 34 are its scale; 36 is the third of the second block; 35 that block's scale."""
    name = "llm.blk.1.ffn.down.weight"
    verdict = judge(rewrite(files["q8_0.gguf"], tmp_path / "bad.gguf", flip(name, row, byte, bit)), files)
    assert not verdict.passed
    assert verdict.tensor == name
    assert (verdict.stage, verdict.op) == ("llm.blk.1", "llm.blk.1.ffn.down")
    assert f"row {row}, column {byte // 34 * 32}" in verdict.evidence[0]


def test_a_flipped_exponent_shows_in_stages_alone(files: dict[str, Path], tmp_path: Path) -> None:
    bad = rewrite(files["q8_0.gguf"], tmp_path / "bad.gguf", flip("llm.blk.1.ffn.down.weight", 5, 35, 6))
    verdict = judge(bad, files, against="stages")
    assert (verdict.passed, verdict.stage) == (False, "llm.blk.1")


def test_a_value_that_is_not_finite_is_a_failure(files: dict[str, Path], tmp_path: Path) -> None:
    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors["llm.blk.1.ffn_norm.weight"].view("<f4")[7] = np.nan

    verdict = judge(rewrite(files["f32.gguf"], tmp_path / "nan.gguf", poison), files, against="stages")
    assert verdict.stage == "llm.blk.1"
    assert "not finite" in verdict.evidence[0]


def test_the_reference_is_looked_at_too(files: dict[str, Path], tmp_path: Path) -> None:
    """A NaN or a missing row on the other side is a failure, and nothing is cut to fit."""
    stages, _ = read_stages(files["stages.safetensors"])
    stages["llm.blk.0"] = stages["llm.blk.0"].copy()
    stages["llm.blk.0"][4, 2] = np.inf
    stages["adapter"] = stages["adapter"][:-1]
    save_stages(tmp_path / "bad.safetensors", stages)
    asked = request()
    with open_model(files["f32.gguf"], asked, backend="cpu") as model:
        outcome = run_diff(model, asked, open_stages(tmp_path / "bad.safetensors"))
    failed = {r.name: r.failures[0] for r in outcome.stages if not r.passed}
    assert failed.keys() == {"adapter", "llm.blk.0"}
    assert "shape [32, 96] here, [31, 96] in the reference" in failed["adapter"]
    assert failed["llm.blk.0"] == "the reference has values that are not finite, first in row 4"


def test_a_faulty_backend_is_told_from_the_reference(files: dict[str, Path], monkeypatch: Patch) -> None:
    """One file on two backends: ops are compared by the names of the graph, fused ones as a whole."""
    exact = cpu.make_backend("exact")
    bind = exact.kernels["gated_linear"].bind

    def wrong(node, inputs, outputs, scratch):
        call = bind(node, inputs, outputs, scratch)
        return lambda: (call(), outputs[0].mul_(1.001))

    kernels = dict(exact.kernels)
    kernels["gated_linear"] = replace(kernels["gated_linear"], bind=wrong)
    monkeypatch.setattr(cpu, "make_backend", lambda precision: replace(exact, kernels=kernels))
    asked = request()
    with open_model(files["q8_0.gguf"], asked, backend="cpu") as model:
        other = ModelFile(files["q8_0.gguf"], asked, "reference")
        verdict = run_diff(model, asked, other, mode="bisect").verdict
        other.close()
    assert (verdict.stage, verdict.op) == ("adapter", "adapter:mul")
    assert verdict.given == ["enc.out"]
