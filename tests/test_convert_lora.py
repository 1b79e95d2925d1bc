"""Adapter folders to GGUF in llama.cpp's naming, and adapters merged into files that are made."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import CONFIG, EVERYTHING, WEIGHTS, merge_into, write_adapter
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.lora import FIXED, plan_lora
from auricle.convert.requantize import plan_requantization
from auricle.convert.source import ConversionError
from auricle.engine import load
from auricle.engine.gguf import open_gguf
from auricle.engine.lora import LoraError, read_lora
from auricle.kernels.dequantize import dequantize
from auricle.tools.sample import SampleShape
from checkpoints import change_json, copy_checkpoint, gguf_name
from sounds import synthetic
from test_cli_conversion import auricle, fail, succeed

SHAPE = SampleShape(n_layer=2, enc_n_layer=3, taps=(0, 1), n_inject=2, n_head=2, enc_d_out=96)
SOUND = synthetic(2.3, 16_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert_lora")
    checkpoint = copy_checkpoint(folder / "checkpoint", SHAPE)
    write_adapter(folder / "adapter", checkpoint, EVERYTHING, rank=4, alpha=6.0)
    for name in ("f32", "q8_0"):
        convert(plan_conversion(checkpoint, name), folder / f"{name}.gguf")
    convert(plan_lora(folder / "adapter"), folder / "lora.gguf")
    return folder


def weights(path: Path) -> dict[str, np.ndarray]:
    with open_gguf(path) as file:
        return {n: dequantize(file.data(n), t.format).reshape(t.shape) for n, t in file.tensors.items()}


def answers(path: Path, **options: Any) -> tuple[int, ...]:
    with load(path, n_ctx=300, kv_type="f32", precision="exact", **options) as model:
        return model.generate("What?", SOUND, sample_rate=16_000, max_new_tokens=12).token_ids


# Adapter folders.


def test_the_file_is_as_llama_cpp_writes_it(folder: Path) -> None:
    """Read by the gguf package: keys, names and every number; its shapes are innermost first."""
    reader = gguf.GGUFReader(folder / "lora.gguf")
    found = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert found["general.type"] == "adapter"
    assert found["general.architecture"] == "moss_audio"
    assert found["adapter.type"] == "lora"
    assert found["adapter.lora.alpha"] == 6.0
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    want = {}
    for name, tensor in load_file(folder / "adapter" / WEIGHTS).items():
        module, half = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
        want[f"{gguf_name(f'{module}.weight')}.lora_{half.lower()}"] = tensor.numpy()
    tensors = {t.name: t for t in reader.tensors}
    assert tensors.keys() == want.keys()
    for name, values in want.items():
        assert tuple(tensors[name].shape) == values.shape[::-1]
        assert np.array_equal(tensors[name].data, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_types_are_kept_or_chosen(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint", dtype=dtype)
    kinds = {None: str(dtype)[6:].replace("float", "f").upper(), "F32": "F32", "f16": "F16", "bf16": "BF16"}
    for kind, stored in kinds.items():
        convert(plan_lora(adapter, kind), tmp_path / "out.gguf")
        with open_gguf(tmp_path / "out.gguf") as file:
            assert {tensor.format.name for tensor in file.tensors.values()} == {stored}
        if kind == "F32":
            exact = load_file(adapter / WEIGHTS)["base_model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"]
            found = weights(tmp_path / "out.gguf")["llm.blk.0.ffn.up.weight.lora_a"]
            assert np.array_equal(found, exact.float().numpy())
    with pytest.raises(ConversionError, match="not stored as 'q4_k': choose one of f32, f16, bf16"):
        plan_lora(adapter, "q4_k")


def test_rank_stabilised(folder: Path, tmp_path: Path) -> None:
    """lora_alpha / sqrt(r) is the scale, and alpha / r what readers compute."""
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint", rank=9, alpha=2.0, use_rslora=True)
    convert(plan_lora(adapter), tmp_path / "out.gguf")
    plain = load_file(adapter / WEIGHTS)["base_model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"]
    with open_gguf(tmp_path / "out.gguf") as file:
        pair = read_lora(file, 1.0, "moss_audio")["llm.blk.1.attn.q.weight"]
    np.testing.assert_allclose(pair.b, plain.numpy() * 2.0 / math.sqrt(9), rtol=1e-6)


def test_ranks_may_differ(folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint", rank=4)
    other = write_adapter(tmp_path / "b", folder / "checkpoint", r".*\.v_proj", rank=2)
    save_file(load_file(adapter / WEIGHTS) | load_file(other / WEIGHTS), adapter / WEIGHTS)
    with pytest.raises(ConversionError, match="says r = 4: the tensors' rank is"):
        plan_lora(adapter)
    change_json(adapter / CONFIG, {"rank_pattern": {"v_proj": 2}})
    assert any("rank 2, 4, alpha 8" in note for note in plan_lora(adapter).notes)
    change_json(adapter / CONFIG, {"use_rslora": True})
    with pytest.raises(ConversionError, match="use_rslora with several ranks"):
        plan_lora(adapter)


def test_names_of_an_adapter_that_was_not_renamed(folder: Path, tmp_path: Path) -> None:
    """A state dict taken from a running model has the adapter's name, default, in it."""
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint")
    pairs = load_file(adapter / WEIGHTS)
    save_file({n.replace(".weight", ".default.weight"): t for n, t in pairs.items()}, adapter / WEIGHTS)
    assert {row.target for row in plan_lora(adapter)} == {
        f"llm.blk.{n}.{part}.weight.lora_{half}"
        for n in range(2)
        for part in ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
        for half in "ab"
    }


def test_closed_world(folder: Path, tmp_path: Path) -> None:
    """Whatever has no place and whatever lacks its counterpart is listed, and nothing is written."""
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint")
    pairs = load_file(adapter / WEIGHTS)
    q = "base_model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"
    pairs["base_model.model.language_model.embed_tokens.lora_embedding_A"] = torch.ones(4, 512)
    pairs["base_model.model.language_model.layers.0.mlp.new_proj.lora_A.weight"] = torch.ones(4, 256)
    del pairs[q]
    save_file(pairs, adapter / WEIGHTS)
    done = auricle("convert", "--lora", adapter, "-o", tmp_path / "out.gguf")
    assert done.returncode == 6
    assert "nothing was written\nmissing (1): llm.blk.1.attn.q.weight.lora_b\nsurplus (2): " in done.stderr
    assert "embed_tokens.lora_embedding_A" in done.stderr
    assert "layers.0.mlp.new_proj.lora_A.weight" in done.stderr
    assert not list(tmp_path.glob("out.gguf*"))


NOT_LINEAR = ("language_model.embed_tokens", "audio_encoder.conv1", "language_model.norm")


@pytest.mark.parametrize("module", NOT_LINEAR)
def test_what_is_no_linear_map(folder: Path, tmp_path: Path, module: str) -> None:
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint")
    key = f"base_model.model.{module}.lora_"
    save_file({f"{key}A.weight": torch.ones(4, 256), f"{key}B.weight": torch.ones(512, 4)}, adapter / WEIGHTS)
    with pytest.raises(ConversionError, match=r"surplus \(2\)"):
        plan_lora(adapter)


ODD: dict[str, Any] = {
    "peft_type": "LOHA",
    "bias": "lora_only",
    "modules_to_save": ["audio_adapter"],
    "alpha_pattern": {"q_proj": 3},
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1, 2],
    "target_parameters": ["x"],
    "init_lora_weights": "pissa_niter_4",
}


@pytest.mark.parametrize("key", FIXED)
def test_more_than_plain_lora(folder: Path, tmp_path: Path, key: str) -> None:
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint", **{key: ODD.get(key, True)})
    with pytest.raises(ConversionError, match=rf"{CONFIG} says {key} = .*: only plain LoRA on linear maps"):
        plan_lora(adapter)


@pytest.mark.parametrize("alpha", [0, -1.0, "8", True, None, float("inf")])
def test_alphas_that_are_none(folder: Path, tmp_path: Path, alpha: Any) -> None:
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint")
    (adapter / CONFIG).write_text(json.dumps(json.loads((adapter / CONFIG).read_text()) | {"lora_alpha": alpha}))
    with pytest.raises(ConversionError, match=r"lora_alpha( = .*: it must be a (positive )?number|; fetch)"):
        plan_lora(adapter)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("r", [4], r"r = \[4\]: it must be a whole number"),
        ("r", "4", "r = '4': it must be a whole number"),
        ("r", 5, "r = 5: the tensors' rank is 4"),
        ("r", None, "lacks r"),
        ("rank_pattern", [1], r"rank_pattern = \[1\]: it must be an object"),
        ("lora_alpha", [8], r"lora_alpha = \[8\]: it must be a number"),
        ("lora_alpha", 10**400, "a number of 401 digits"),
        ("lora_alpha", 10**99, "lora_alpha = a number of 329 bits: it must be a positive number"),
        ("use_rslora", "no", "use_rslora = 'no': it must be true or false"),
        ("bias", ["none"], r"bias = \['none'\]: only plain LoRA"),
        ("init_lora_weights", {"a": []}, "only plain LoRA"),
    ],
)
def test_values_of_another_kind(folder: Path, tmp_path: Path, key: str, value: Any, complaint: str) -> None:
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint")
    change_json(adapter / CONFIG, {key: value})
    with pytest.raises(ConversionError, match=complaint) as caught:
        plan_lora(adapter)
    assert "\n" not in str(caught.value)


def test_a_copy_of_the_base_is_left_out(folder: Path, tmp_path: Path) -> None:
    """peft saves what an adapted head is the head of."""
    plain = write_adapter(tmp_path / "plain", folder / "checkpoint", "lm_head")
    convert(plan_lora(plain), tmp_path / "plain.gguf")
    pairs = load_file(plain / WEIGHTS)
    pairs |= {f"base_model.model.lm_head.base_layer.{part}": torch.ones(512, 256) for part in ("weight", "bias")}
    save_file(pairs, plain / WEIGHTS)
    plan = plan_lora(plain)
    copies = "base_model.model.lm_head.base_layer.bias, base_model.model.lm_head.base_layer.weight"
    assert f"left out, a copy of the model's own: {copies}" in plan.notes
    convert(plan, tmp_path / "copies.gguf")
    with open_gguf(tmp_path / "plain.gguf") as want, open_gguf(tmp_path / "copies.gguf") as found:
        assert list(want.tensors) == list(found.tensors)
        assert all(np.array_equal(want.data(name), found.data(name)) for name in want.tensors)
    save_file({n: t for n, t in pairs.items() if "base_layer" in n}, plain / WEIGHTS)
    with pytest.raises(ConversionError, match="does not hold pairs"):
        plan_lora(plain)


def test_against_the_model(folder: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(
        tmp_path / "other", SampleShape(n_layer=1, enc_n_layer=3, d_ff=320, taps=(0,), n_inject=1, enc_d_out=96)
    )
    wide = write_adapter(tmp_path / "wide", other, r".*mlp\.gate_proj")
    more = write_adapter(tmp_path / "more", folder / "checkpoint")
    convert(plan_conversion(other, "f32"), tmp_path / "other.gguf")
    assert len(plan_lora(wide, base=tmp_path / "other.gguf")) == 2
    with pytest.raises(
        ConversionError, match=r"llm.blk.0.ffn.gate.weight \[320, 256\], and the model's is \[256, 256\]"
    ):
        plan_lora(wide, base=folder / "f32.gguf")
    with pytest.raises(ConversionError, match=r"surplus \(14\): base_model.model.language_model.layers.1."):
        plan_lora(more, base=tmp_path / "other.gguf")
    with pytest.raises(ConversionError, match="is a LoRA adapter; give it with --lora beside a model"):
        plan_lora(more, base=folder / "lora.gguf")


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is not a folder"):
        plan_lora(folder / "lora.gguf")
    with pytest.raises(ConversionError, match=f"has no {CONFIG}"):
        plan_lora(folder / "checkpoint")
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint")
    raw = (adapter / WEIGHTS).read_bytes()
    for n in (0, 7, 100, len(raw) - 1):
        (adapter / WEIGHTS).write_bytes(raw[:n])
        with pytest.raises(ConversionError):
            plan_lora(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ConversionError, match=f"has no {WEIGHTS}"):
        plan_lora(adapter)


def test_numbers_that_are_none(folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", folder / "checkpoint")
    pairs = load_file(adapter / WEIGHTS)
    next(iter(pairs.values()))[1, 2] = math.nan
    save_file(pairs, adapter / WEIGHTS)
    with pytest.raises(ConversionError, match=r"\[1, 2\] is nan"):
        convert(plan_lora(adapter), tmp_path / "out.gguf")


# Merging.


def test_merged_as_by_hand(folder: Path, tmp_path: Path) -> None:
    """From the checkpoint and from a file, into F32: the sums, every other tensor to the bit, and the same answers."""
    by_hand = copy_checkpoint(tmp_path / "by_hand", SHAPE)
    merge_into(by_hand, folder / "adapter", 0.5)
    convert(plan_conversion(by_hand, "f32"), tmp_path / "want.gguf")
    spec = f"{folder / 'lora.gguf'}:0.5"
    convert(plan_conversion(folder / "checkpoint", "f32", lora=[spec]), tmp_path / "a.gguf")
    convert(plan_requantization(folder / "f32.gguf", "f32", lora=[spec]), tmp_path / "b.gguf")
    want, base, changed = weights(tmp_path / "want.gguf"), weights(folder / "f32.gguf"), weights(folder / "lora.gguf")
    for name in ("a", "b"):
        found = weights(tmp_path / f"{name}.gguf")
        assert found.keys() == want.keys()
        for tensor, values in found.items():
            if f"{tensor}.lora_a" in changed:
                assert np.abs(values - want[tensor]).max() < 1e-6
                assert np.abs(values - base[tensor]).max() > 1e-2
            else:
                assert np.array_equal(values, base[tensor]), tensor
        with open_gguf(tmp_path / f"{name}.gguf") as file:
            assert file.metadata["auricle.lora.merged"] == ["lora.gguf:0.5"]
        assert answers(tmp_path / f"{name}.gguf") == answers(folder / "f32.gguf", lora=[spec])


def test_merged_and_quantised_at_once(folder: Path, tmp_path: Path) -> None:
    """One pass gives the bytes that merging into F32 first and quantising then gives."""
    spec = str(folder / "lora.gguf")
    succeed("quantize", folder / "f32.gguf", tmp_path / "merged.gguf", "--type", "f32", "--lora", spec)
    succeed("quantize", tmp_path / "merged.gguf", tmp_path / "two.gguf", "--type", "q4_k")
    succeed("quantize", folder / "f32.gguf", tmp_path / "one.gguf", "--type", "q4_k", "--lora", spec)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_merging_twice(folder: Path, tmp_path: Path) -> None:
    spec = str(folder / "lora.gguf")
    succeed("quantize", folder / "f32.gguf", tmp_path / "one.gguf", "--type", "f32", "--lora", spec)
    succeed("quantize", tmp_path / "one.gguf", tmp_path / "two.gguf", "--type", "f32", "--lora", f"{spec}:-1")
    base, back = weights(folder / "f32.gguf"), weights(tmp_path / "two.gguf")
    assert all(np.abs(back[name] - base[name]).max() < 1e-6 for name in base)
    with open_gguf(tmp_path / "two.gguf") as file:
        assert file.metadata["auricle.lora.merged"] == ["lora.gguf:1", "lora.gguf:-1"]


def test_into_quantised_weights(folder: Path, tmp_path: Path) -> None:
    """They would lose a second time, even in the type they have."""
    source, spec = folder / "q8_0.gguf", str(folder / "lora.gguf")
    command = ("quantize", source, tmp_path / "out.gguf", "--type", "q8_0", "--lora", spec)
    fail(6, "would lose a second time", *command)
    succeed(*command, "--allow-requantize")
    base, found, pair = weights(source), weights(tmp_path / "out.gguf"), weights(folder / "lora.gguf")
    name = "llm.blk.1.ffn.down.weight"
    want = base[name] + 6.0 / 4 * pair[f"{name}.lora_b"] @ pair[f"{name}.lora_a"]
    assert np.abs(found[name] - want).max() < np.abs(want).max() / 200
    assert np.array_equal(found["llm.embed.weight"], base["llm.embed.weight"])


@pytest.mark.parametrize("scale", [1, 0.25])
def test_an_interrupted_merge_goes_on_with_its_own_adapter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """The work of one merge, at scale 1, is not taken for that of another."""
    from auricle.convert import stream

    out, real, seen = tmp_path / "out.gguf", stream.encode_slab, []

    def stop(source: Any, row: Any, *rest: Any) -> np.ndarray:
        seen.append(row.target)
        if len(seen) > 40:
            raise KeyboardInterrupt
        return real(source, row, *rest)

    monkeypatch.setattr(stream, "encode_slab", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(plan_requantization(folder / "f32.gguf", "f16", lora=[str(folder / "lora.gguf")]), out, jobs=1)
    monkeypatch.setattr(stream, "encode_slab", real)
    spec = f"{folder / 'lora.gguf'}:{scale}"
    succeed("quantize", folder / "f32.gguf", out, "--type", "f16", "--resume", "--lora", spec)
    convert(plan_requantization(folder / "f32.gguf", "f16", lora=[spec]), tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_an_adapter_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(
        tmp_path / "other", SampleShape(n_layer=1, enc_n_layer=3, taps=(0,), n_inject=1, n_head=2, enc_d_out=96)
    )
    with pytest.raises(LoraError, match=r"which is no tensor of .*other; it is for another model"):
        plan_conversion(other, "f32", lora=[str(folder / "lora.gguf")])


# The command.


def test_command(folder: Path, tmp_path: Path) -> None:
    adapter, out, model = folder / "adapter", tmp_path / "out.gguf", folder / "f32.gguf"
    done = succeed("convert", "--lora", adapter, "-o", out, "-m", model)
    assert "matrices of rank 4, alpha 6" in done.stderr
    assert out.read_bytes() == (folder / "lora.gguf").read_bytes()
    assert "file: " in succeed("convert", "--lora", adapter, "-o", tmp_path / "no.gguf", "--dry-run").stdout
    assert not (tmp_path / "no.gguf").exists()
    merged = succeed("convert", folder / "checkpoint", "-o", tmp_path / "m.gguf", "--type", "f16", "--lora", out)
    assert "tensors" in merged.stderr


def test_commands_that_are_none(folder: Path, tmp_path: Path) -> None:
    adapter, out = folder / "adapter", ("-o", tmp_path / "out.gguf")
    fail(2, "give the folder of a checkpoint, or --lora DIR", "convert", *out)
    fail(2, "give the folder of a checkpoint, or --lora DIR", "convert", *out, "--lora", adapter, "--lora", adapter)
    fail(2, "are for models", "convert", *out, "--lora", adapter, "--tensor-type", "*=f16")
    fail(2, "-m is for --lora DIR alone", "convert", folder / "checkpoint", *out, "-m", folder / "f32.gguf")
    fail(3, "is a directory", "convert", folder / "checkpoint", *out, "--lora", adapter)
    fail(2, "is no scale", "quantize", folder / "f32.gguf", out[1], "--lora", "x.gguf:much")
    fail(2, "is no scale", "plan", "-m", folder / "f32.gguf", "--lora", "x.gguf:much")
    fail(3, "is a model; give it with -m", "plan", "-m", folder / "f32.gguf", "--lora", folder / "f32.gguf")
    assert not list(tmp_path.iterdir())


def test_diff_of_adapter_and_merged_file(folder: Path, tmp_path: Path) -> None:
    """`auricle diff --lora` finds the two ways of using an adapter equal, and the base different."""
    import soundfile

    soundfile.write(tmp_path / "clip.wav", SOUND, 16_000)
    convert(plan_requantization(folder / "f32.gguf", "f32", lora=[str(folder / "lora.gguf")]), tmp_path / "m.gguf")
    command = ("diff", folder / "f32.gguf", tmp_path / "clip.wav", "--against", tmp_path / "m.gguf", "--tokens", 4)
    assert auricle(*command, "--lora", folder / "lora.gguf", "--precision", "exact").returncode == 0
    assert auricle(*command, "--lora", folder / "lora.gguf", "--precision", "exact", "--isolate").returncode == 0
    assert auricle(*command, "--precision", "exact").returncode == 7
    fail(2, "merge them first", *command, "--lora", folder / "lora.gguf", "--sensitivity", tmp_path / "report.json")
