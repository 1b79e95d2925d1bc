"""Conversion of a Hugging Face checkpoint, read back with the `gguf` package and compared with safetensors' reading."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from auricle.convert.hf import convert, plan_conversion
from auricle.convert.names.table import evaluate, fold
from auricle.engine.gguf import open_gguf
from auricle.engine.models.moss_audio import PART_NAMES
from auricle.engine.outputs import OutputError
from auricle.kernels.formats import BF16, F16, F32, Q8_0
from auricle.tools.sample import SampleShape
from checkpoints import (
    SHAPE,
    WEIGHTS,
    change_json,
    change_tensors,
    copy_checkpoint,
    gguf_name,
    read_tensors,
    sparse_checkpoint,
)
from support import SHARED, needs_shared

GOLDEN = SHARED / "golden" / "a" / "checkpoint"
TYPES = ["f32", "f16", "bf16", "q8_0"]
MATRIX = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
FILE_TYPE = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
DERIVED = {"audio.mel_filters", "audio.mel_window"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "sample")


def run(folder: Path, type_name: str, out: Path) -> gguf.GGUFReader:
    """Convert; what the plan promised must be what the file is."""
    plan = plan_conversion(folder, type_name)
    convert(plan, out)
    assert out.stat().st_size == plan.total_bytes
    assert not list(out.parent.glob("*.part"))
    reader = gguf.GGUFReader(out)
    assert [(t.name, tuple(t.shape[::-1]), t.tensor_type.value, t.n_bytes) for t in reader.tensors] == [
        (row.target, row.shape, row.format.id, row.nbytes) for row in plan
    ]
    return reader


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Weights of a tensor by the gguf package's decoder, in the shape outermost first."""
    decoded = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    return decoded.reshape([int(n) for n in tensor.shape[::-1]])


def metadata(folder: Path, out: Path, type_name: str = "q8_0") -> dict[str, Any]:
    reader = run(folder, type_name, out)
    return {name: field.contents() for name, field in reader.fields.items()}


def check_values(folder: Path, reader: gguf.GGUFReader, type_name: str) -> None:
    expected = {gguf_name(name): tensor.float().numpy() for name, tensor in read_tensors(folder).items()}
    assert {t.name for t in reader.tensors} == expected.keys() | DERIVED
    for tensor in reader.tensors:
        if tensor.name in DERIVED:
            continue
        found, weights = values(tensor), expected[tensor.name]
        fmt = MATRIX[type_name] if weights.ndim > 1 else F32
        if fmt is Q8_0 and weights.ndim == 4:
            fmt = F16
        if fmt is BF16 and weights.ndim == 4:
            fmt = F32  # the same numbers, which ggml can convolve by
        assert tensor.tensor_type.value == fmt.id, tensor.name
        if fmt in (F32, BF16):
            np.testing.assert_array_equal(found, weights, err_msg=tensor.name)
        elif fmt is F16:
            np.testing.assert_array_equal(found, weights.astype(np.float16), err_msg=tensor.name)
        else:
            blocks = weights.reshape(-1, 32)
            # Half a step of the scale, and the scale's own rounding to 11 bits over 127 steps.
            bound = np.abs(blocks).max(axis=1, keepdims=True) * (0.5 / 127 + 2.0**-11) + 1e-9
            assert (np.abs(found.reshape(-1, 32) - blocks) <= bound).all(), tensor.name


@needs_shared
@pytest.mark.parametrize("type_name", TYPES)
def test_golden_checkpoint(type_name: str, tmp_path: Path) -> None:
    reader = run(GOLDEN, type_name, tmp_path / "golden.gguf")
    assert reader.fields["general.file_type"].contents() == FILE_TYPE[type_name]
    check_values(GOLDEN, reader, type_name)


@pytest.mark.parametrize("type_name", TYPES)
def test_every_value(folder: Path, tmp_path: Path, type_name: str) -> None:
    check_values(folder, run(folder, type_name, tmp_path / "a.gguf"), type_name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("type_name", TYPES)
def test_other_source_dtypes(folder: Path, tmp_path: Path, type_name: str, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    reader = run(folder, type_name, tmp_path / "a.gguf")
    if type_name == "bf16":  # not exact from these: the bf16 nearest to each weight
        weights = read_tensors(folder)["lm_head.weight"].to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(
            values(next(t for t in reader.tensors if t.name == "llm.lm_head.weight")), weights
        )
    else:
        check_values(folder, reader, type_name)


def test_slabs_join_without_a_seam(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, "q8_0", tmp_path / "whole.gguf")
    monkeypatch.setattr("auricle.convert.slabs.SLAB_WEIGHTS", 7 * 64)
    run(folder, "q8_0", tmp_path / "slabs.gguf")
    assert (tmp_path / "slabs.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_derived_tensors(folder: Path, tmp_path: Path) -> None:
    reader = run(folder, "q8_0", tmp_path / "a.gguf")
    derived = {t.name: values(t) for t in reader.tensors if t.name in DERIVED}
    window = torch.hann_window(400, periodic=True, dtype=torch.float64).numpy()
    np.testing.assert_allclose(derived["audio.mel_window"], window, atol=1e-7)
    filters = derived["audio.mel_filters"]
    assert filters.shape == (201, SHAPE.n_mels)
    assert (filters >= 0).all()
    assert (filters.sum(axis=0) > 0).all()


@pytest.mark.parametrize("shape", [
    SampleShape(enc_d_out=64, taps=(3, 0), n_inject=1, n_head=4, n_kv_head=1, d_head=32),
    SampleShape(tied=True, taps=(), n_window=20, n_mels=80),
], ids=["projected", "tied"])  # fmt: skip
def test_other_structures(tmp_path: Path, shape: SampleShape) -> None:
    folder = copy_checkpoint(tmp_path / "sample", shape)
    check_values(folder, run(folder, "f32", tmp_path / "a.gguf"), "f32")
    with open_gguf(tmp_path / "a.gguf") as file:
        assert file.metadata.get("moss_audio.deepstack.num_taps") == len(shape.taps)
        assert [file.metadata.get(f"moss_audio.deepstack.tap.{k}") for k in range(len(shape.taps))] == list(shape.taps)
        assert file.metadata.get("moss_audio.deepstack.num_inject_layers") == shape.n_merger
        assert file.metadata.get("moss_audio.enc.n_window") == shape.n_window


def test_tied_head_that_is_stored_is_left_out(folder: Path, tmp_path: Path) -> None:
    change_json(folder / "config.json", {"tie_word_embeddings": True})
    plan = plan_conversion(folder, "bf16")
    assert "llm.lm_head.weight" not in {row.target for row in plan}
    assert list(plan.dropped) == ["lm_head.weight"]
    assert any("lm_head.weight" in note for note in plan.notes)


def test_computed_buffers_are_dropped(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"language_model.rotary_emb.inv_freq": torch.zeros(4)}))
    assert list(plan_conversion(folder, "bf16").dropped) == ["language_model.rotary_emb.inv_freq"]


def test_rows_that_fill_no_block_fall_back(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "sample", SampleShape(enc_d_model=48, enc_n_head=2, d_model=64, d_ff=32))
    plan = plan_conversion(folder, "q8_0")
    odd = [row for row in plan if row.shape[-1] % 32 and len(row.shape) == 2 and row.source]
    assert odd
    assert all(row.format is F16 and "48" in row.note for row in odd)
    run(folder, "q8_0", tmp_path / "a.gguf")


def test_plan_adds_up(folder: Path) -> None:
    plan = plan_conversion(folder, "q8_0")
    assert tuple(plan.bytes_by_part()) == PART_NAMES
    tensors = sum(row.nbytes for row in plan)
    assert sum(plan.bytes_by_part().values()) == sum(plan.bytes_by_type().values()) == tensors
    assert 0 <= plan.total_bytes - plan.metadata_bytes - tensors < 32 * len(plan)
    head = next(row for row in plan if row.target == "llm.lm_head.weight")
    assert (head.source, head.source_dtype, head.part) == ("lm_head.weight", "BF16", "head")
    assert plan.bytes_by_part()["head"] == head.nbytes == SHAPE.n_vocab * SHAPE.d_model // 32 * 34


def test_model_metadata(folder: Path, tmp_path: Path) -> None:
    found = metadata(folder, tmp_path / "a.gguf")
    config = json.loads((folder / "config.json").read_text())
    audio, language = config["audio_config"], config["language_config"]
    same = "num_mel_bins encoder_layers d_model encoder_attention_heads encoder_ffn_dim downsample_rate n_window"
    same += " downsample_hidden_size max_source_positions encoder_attention_window_size output_dim layer_norm_eps"
    expected = {f"enc.{key}": audio[key] for key in same.split()}
    same = "hidden_size head_dim intermediate_size vocab_size max_position_embeddings rope_theta rms_norm_eps"
    expected |= {f"llm.{key}": language[key] for key in same.split()}
    renamed = {"layers": "hidden_layers", "heads": "attention_heads", "kv_heads": "key_value_heads"}
    expected |= {f"llm.num_{key}": language[f"num_{name}"] for key, name in renamed.items()}
    expected |= {"adapter.hidden_size": config["adapter_hidden_size"], "time_markers": True}
    expected |= {"deepstack.num_taps": 3, "deepstack.num_inject_layers": 3}
    expected |= {f"deepstack.tap.{k}": tap for k, tap in enumerate(audio["deepstack_encoder_layer_indexes"])}
    expected |= {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    processor = json.loads((folder / "processor_config.json").read_text())
    expected |= {key: processor[key] for key in ("audio_token_id", "audio_start_id", "audio_end_id")}
    own = {key.removeprefix("moss_audio."): v for key, v in found.items() if key.startswith("moss_audio.")}
    assert own == pytest.approx(expected)
    assert (found["general.architecture"], found["general.name"]) == ("moss_audio", "sample")
    assert (found["general.file_type"], found["general.quantization_version"]) == (7, 2)


def test_defaults_of_an_older_checkpoint(folder: Path, tmp_path: Path) -> None:
    """No n_window, no processor_config.json, injection into every tap, transformers 5's place for rope_theta."""
    ids = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    ids = {key: ids[key] for key in ("audio_token_id", "audio_start_id", "audio_end_id")}
    rope = {"language_config.rope_theta": None, "language_config.rope_parameters": {"rope_theta": 1e6}}
    older = {"audio_config.n_window": None, "deepstack_num_inject_layers": None, "eos_token_id": [7, 8]}
    change_json(folder / "config.json", {**ids, **rope, **older})
    found = metadata(folder, tmp_path / "a.gguf")
    assert found["moss_audio.enc.n_window"] == 200
    assert found["moss_audio.deepstack.num_inject_layers"] == 3
    notes = plan_conversion(folder, "f32").notes
    assert "config.json lacks audio_config.n_window: 200 is assumed, as in the official code" in notes
    assert found["moss_audio.time_markers"] is True
    assert found["moss_audio.llm.rope_theta"] == 1e6
    assert found["moss_audio.audio_token_id"] == ids["audio_token_id"]
    assert found["moss_audio.eos_token_id"] == 7


def test_source_is_told(folder: Path, tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--OpenMOSS-Team--MOSS-Audio-4B-Instruct" / "snapshots" / revision
    cached.parent.mkdir(parents=True)
    folder.rename(cached)
    (cached / "README.md").write_text("---\nlanguage:\n- en\nlicense: apache-2.0\n---\n# A model\nlicense: none\n")
    found = metadata(cached, tmp_path / "a.gguf")
    assert found["general.name"] == "MOSS-Audio-4B-Instruct"
    assert found["general.license"] == "apache-2.0"
    assert found["general.source.repository"] == "OpenMOSS-Team/MOSS-Audio-4B-Instruct"
    assert found["general.source.revision"] == revision
    assert found["general.source.shard.0.name"] == WEIGHTS
    assert found["general.source.shard.0.sha256"] == hashlib.sha256((cached / WEIGHTS).read_bytes()).hexdigest()


def test_converting_loads_no_torch() -> None:
    """It would be most of the memory, and of the time a `--dry-run` takes."""
    code = "import sys; import auricle.convert.hf; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_progress_reaches_its_total(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    convert(plan_conversion(folder, "f16"), tmp_path / "a.gguf", lambda *report: seen.append(report))
    phases = {what: [(done, total) for w, done, total in seen if w == what] for what, _, _ in seen}
    assert list(phases) == ["checking", "writing"]  # nothing to verify where nothing is resumed
    for reports in phases.values():
        done = [d for d, _ in reports]
        assert done == sorted(done)
        assert reports[-1][0] == reports[-1][1]
        assert len({total for _, total in reports}) == 1
    n_weights = sum(t.numel() for t in read_tensors(folder).values())
    assert phases["writing"][-1][1] == n_weights + 201 * SHAPE.n_mels + 400
    assert phases["checking"][-1][1] == (folder / WEIGHTS).stat().st_size


def test_a_shard_is_not_overwritten(folder: Path) -> None:
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(OutputError, match="is an input itself"):
        convert(plan_conversion(folder, "f32"), folder / WEIGHTS)
    assert (folder / WEIGHTS).read_bytes() == before


def test_missing_output_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere is not a folder"):
        convert(plan_conversion(folder, "f32"), tmp_path / "nowhere" / "a.gguf")


def test_expressions_and_folded_names() -> None:
    assert evaluate("a*b/4", {"a": 6, "b": 2}) == 3
    assert fold(["x.0.w", "x.2.w", "x.1.w", "x.7.w", "y.3.w", "z"]) == ["x.{0-2,7}.w", "y.3.w", "z"]


MEMORY = """
import sys
from auricle.convert.hf import convert, plan_conversion
from auricle.engine.memory import peak_bytes
plan = plan_conversion(sys.argv[1], sys.argv[2])
before = peak_bytes()
convert(plan, sys.argv[3])
print(peak_bytes() - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "sample", replace(SHAPE, d_adapter=800_000, taps=(), n_inject=0))
    size = (folder / WEIGHTS).stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", MEMORY, str(folder), "q8_0", str(tmp_path / "a.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) < size * 0.6
