"""GGUF to GGUF: the same weights as from the checkpoint, metadata copied, tensors that keep their type to the bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.convert.recipes import RECIPES, parse_override
from auricle.convert.requantize import plan_requantization
from auricle.convert.source import ConversionError
from auricle.engine.gguf import GGUFError, open_gguf
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.outputs import OutputError
from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import F16, F32, Q4_K, Q8_0
from auricle.kernels.quantize import quantize
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint, gguf_name, read_tensors
from gguf_samples import METADATA, TENSORS

# Rows of 256 and of 512 in the decoder; of 128, which fall back, in the encoder.
SHAPE = SampleShape(n_layer=3, d_ff=512, n_head=2, enc_n_layer=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    copy_checkpoint(folder / "checkpoint", SHAPE)
    for name in ("f32", "f16", "q8_0"):
        convert(plan_conversion(folder / "checkpoint", name), folder / f"{name}.gguf")
    return folder


def requantize(source: Path, out: Path, *arguments: object, **options: object) -> dict[str, bytes]:
    plan = plan_requantization(source, *arguments, **options)
    convert(plan, out)
    assert out.stat().st_size == plan.total_bytes
    return contents(out)


def contents(path: Path) -> dict[str, bytes]:
    with open_gguf(path) as file:
        return {name: file.data(name).tobytes() for name in file.tensors}


@pytest.mark.parametrize("name", RECIPES)
def test_from_f32_as_from_the_checkpoint(models: Path, tmp_path: Path, name: str) -> None:
    """The checkpoint's bf16 is exact in F32, so every byte of every tensor must be the same."""
    convert(plan_conversion(models / "checkpoint", name), tmp_path / "direct.gguf")
    found = requantize(models / "f32.gguf", tmp_path / "two.gguf", name)
    assert found == contents(tmp_path / "direct.gguf")
    with open_gguf(tmp_path / "direct.gguf") as direct, open_gguf(tmp_path / "two.gguf") as two:
        assert list(direct.tensors.values()) == list(two.tensors.values())
        assert list(direct.types) == list(two.types)
        assert all(np.array_equal(direct.metadata[key], two.metadata[key]) for key in direct.metadata)


@pytest.mark.parametrize("name", ["q4_k", "q3_k"])
def test_blocks_are_those_of_the_encoder(models: Path, tmp_path: Path, name: str) -> None:
    """Conversion adds nothing to `quantize`: weights read by safetensors and encoded whole give the same bytes."""
    plan = plan_conversion(models / "checkpoint", name)
    convert(plan, tmp_path / "a.gguf")
    found = contents(tmp_path / "a.gguf")
    weights = {gguf_name(n): t.float().numpy() for n, t in read_tensors(models / "checkpoint").items()}
    for row in plan:
        if row.source:
            rows = weights[row.target].reshape(-1, row.shape[-1])
            assert found[row.target] == quantize(rows, row.format).tobytes(), row.target
    assert {row.format.name for row in plan} >= {"F32", "F16", "Q8_0", "Q6_K" if name == "q4_k" else "Q5_K"}


def test_importance_reaches_the_encoder(models: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    name = "llm.blk.1.ffn.down.weight"
    importance = {name: rng.exponential(size=512).astype(np.float32) ** 4}
    plain = requantize(models / "f32.gguf", tmp_path / "plain.gguf", "q4_k")
    weighed = requantize(models / "f32.gguf", tmp_path / "weighed.gguf", "q4_k", importance=importance)
    assert [n for n in plain if plain[n] != weighed[n]] == [name]
    with open_gguf(models / "f32.gguf") as file:
        weights = file.data(name).view("<f4")
    assert weighed[name] == quantize(np.array(weights), Q4_K, importance[name]).tobytes()


def test_same_types_are_copied_to_the_bit(models: Path, tmp_path: Path) -> None:
    """Also quantised ones, for which nothing need be allowed."""
    for name in ("f16", "q8_0"):
        found = requantize(models / f"{name}.gguf", tmp_path / "copy.gguf", name)
        assert found == contents(models / f"{name}.gguf")
        assert (tmp_path / "copy.gguf").read_bytes() == (models / f"{name}.gguf").read_bytes()


def test_f16_is_read(models: Path, tmp_path: Path) -> None:
    found = requantize(models / "f16.gguf", tmp_path / "a.gguf", "q8_0")
    with open_gguf(models / "f16.gguf") as file:
        rows = file.data("llm.embed.weight").view("<f2").astype(np.float32)
    assert found["llm.embed.weight"] == quantize(rows, Q8_0).tobytes()


def test_quantised_weights_lose_twice_only_when_allowed(models: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"q8_0\.gguf is quantised: .* \(Q8_0 to Q4_K\).*--allow-requantize"
    ) as caught:
        plan_requantization(models / "q8_0.gguf", "q4_k")
    assert "\n" not in str(caught.value)
    found = requantize(models / "q8_0.gguf", tmp_path / "a.gguf", "q4_k", allow_requantize=True)
    name = "llm.blk.0.ffn.up.weight"
    with open_gguf(models / "q8_0.gguf") as file:
        rows = dequantize(file.data(name), Q8_0)
        ears = {n: file.data(n).tobytes() for n in file.tensors if n.startswith("enc.")}
    assert found[name] == quantize(rows, Q4_K).tobytes()
    assert {n: raw for n, raw in found.items() if n in ears} == ears


def test_decoding_is_no_second_loss(models: Path, tmp_path: Path) -> None:
    found = requantize(models / "q8_0.gguf", tmp_path / "a.gguf", "f32")
    reader = gguf.GGUFReader(models / "q8_0.gguf")
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        assert found[tensor.name] == values.astype("<f4").tobytes(), tensor.name


def test_metadata_is_copied_with_its_types(models: Path, tmp_path: Path) -> None:
    requantize(models / "f16.gguf", tmp_path / "a.gguf", "q5_k")
    with open_gguf(models / "f16.gguf") as before, open_gguf(tmp_path / "a.gguf") as after:
        assert list(before.types) == list(after.types)
        changed = {key for key in before.types if not np.array_equal(before.metadata[key], after.metadata[key])}
        assert changed == {"general.file_type"}
        assert (before.metadata.get("general.file_type"), after.metadata.get("general.file_type")) == (1, 17)
        kinds = [(typed.type, typed.item) for typed in before.types.values()]
        assert kinds == [(typed.type, typed.item) for typed in after.types.values()]


def test_files_of_another_kind(tmp_path: Path) -> None:
    """Every kind of value, another alignment, names no recipe knows."""
    before = dict.fromkeys(name for name, *_ in TENSORS)
    layout = plan_layout(METADATA, TENSORS, alignment=64)
    with GGUFWriter(tmp_path / "a.gguf", layout) as writer:
        for name, shape, fmt in TENSORS:
            rows = np.random.default_rng(len(before)).standard_normal(shape, dtype=np.float32)
            before[name] = quantize(rows.reshape(-1, shape[-1]), fmt).tobytes()
            writer.write(name, before[name])
    overrides = [parse_override("w=f32"), parse_override("head=q8_0")]
    found = requantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "f16", overrides)
    with open_gguf(tmp_path / "b.gguf") as file:
        assert file.alignment == 64
        assert {name: file.types[name].type for name in METADATA} == {name: t.type for name, t in METADATA.items()}
        assert file.metadata.get("tokens") == METADATA["tokens"].value
        assert [file.tensors[name].format for name in ("w", "norm", "conv", "head")] == [F32, F32, F16, Q8_0]
    assert {n for n in before if before[n] == found[n]} == {"norm", "conv", "head"}


def test_blocks_that_are_not_finite_are_named(tmp_path: Path) -> None:
    rows = quantize(np.ones((4, 512), np.float32), Q4_K)
    rows[2, 144:148] = 0xFF  # scale and minimum of the row's second block: NaN
    with GGUFWriter(tmp_path / "a.gguf", plan_layout({}, [("w", (4, 512), Q4_K)])) as writer:
        writer.write("w", rows)
    with pytest.raises(ConversionError, match=r"tensor w\[2, 256\] is nan: .*a\.gguf is damaged"):
        requantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "f32")
    assert not list(tmp_path.glob("b.gguf*"))


def test_a_model_is_not_written_over_itself(models: Path) -> None:
    before = (models / "f16.gguf").read_bytes()
    with pytest.raises(OutputError, match="is an input itself"):
        requantize(models / "f16.gguf", models / "f16.gguf", "q8_0")
    assert (models / "f16.gguf").read_bytes() == before


def test_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("text")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        plan_requantization(tmp_path / "a.gguf", "q8_0")
