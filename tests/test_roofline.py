"""`benchmarks/roofline.py`: what it counts, against sizes worked out from the file and the shape alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from auricle.engine.kv_cache import KV_FORMATS
from auricle.kernels.formats import BY_NAME, F16
from auricle.tools import synth
from auricle.tools.synth import SHAPES
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import roofline

plan_synth = cache(synth.plan_synth)
SHAPE = SHAPES["moss-audio-4b"].values
N_LAYER, D_MODEL, D_FF, N_VOCAB = (
    SHAPE[f"llm.{k}"] for k in ("num_layers", "hidden_size", "intermediate_size", "vocab_size")
)
N_HEAD, N_KV_HEAD, D_HEAD = (SHAPE[f"llm.{k}"] for k in ("num_heads", "num_kv_heads", "head_dim"))
MATRIX_WEIGHTS = N_LAYER * D_MODEL * (2 * N_HEAD * D_HEAD + 2 * N_KV_HEAD * D_HEAD + 3 * D_FF) + N_VOCAB * D_MODEL


@pytest.fixture(scope="module", autouse=True)
def plans() -> Iterator[None]:
    """Files are planned once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "plan_synth", plan_synth)
        yield


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """By recipe and phase, of the 4B shape."""
    found = [row for recipe in ("q4_k", "f16") for row in roofline.measure_shape("4b", recipe, F16)]
    return {(row["recipe"], row["phase"]): row for row in found}


@pytest.mark.parametrize("recipe", ["q4_k", "f16"])
def test_a_decode_step_reads_the_decoder_and_the_head(rows: dict, recipe: str) -> None:
    tensors = plan_synth("moss-audio-4b", recipe).layout.tensors
    embedding = tensors["llm.embed.weight"]
    whole = sum(t.nbytes for name, t in tensors.items() if name.startswith("llm.")) - embedding.nbytes
    row_bytes = embedding.nbytes // N_VOCAB
    for n_tokens, phase in ((1, "decode at 200"), (1, "decode at 8192"), (400, "prefill of 400")):
        assert rows[recipe, phase]["weight_bytes"] == whole + n_tokens * row_bytes


def test_the_encoder_reads_its_weights_and_the_adapters(rows: dict) -> None:
    tensors = plan_synth("moss-audio-4b", "q4_k").layout.tensors
    whole = sum(t.nbytes for name, t in tensors.items() if name.startswith(("enc.", "adapter.", "deepstack.")))
    assert rows["q4_k", "encoder, 11 s"]["weight_bytes"] == whole


@pytest.mark.parametrize(("kv_type", "bits"), [("f16", 16), ("q8_0", 8 + 16 / 32)])
def test_a_decode_step_reads_the_cache_once_and_writes_a_slot(kv_type: str, bits: float) -> None:
    found = {row["phase"]: row for row in roofline.measure_shape("4b", "q4_k", KV_FORMATS[kv_type])}
    slot_bytes = 2 * N_LAYER * N_KV_HEAD * D_HEAD * bits / 8
    for context in roofline.CONTEXTS:
        assert found[f"decode at {context}"]["cache_bytes"] == (context + 1 + 1) * slot_bytes


def test_multiplications(rows: dict) -> None:
    """Two operations a weight and token; attention: two a slot seen, for keys and for values."""
    decode, prefill = rows["q4_k", "decode at 200"], rows["q4_k", "prefill of 400"]
    width = N_LAYER * N_HEAD * D_HEAD
    assert decode["flops"] == 2 * MATRIX_WEIGHTS + 4 * width * 201
    n, head = 400, N_VOCAB * D_MODEL
    seen = n * (n + 1) // 2
    assert prefill["flops"] == 2 * n * (MATRIX_WEIGHTS - head) + 2 * head + 4 * width * seen


def test_the_encoder_of_11_seconds_multiplies_as_much_as_worked_out_elsewhere(rows: dict) -> None:
    """46 GFLOP in the stem, 190 in the layers, 46 in adapters and mergers for 138 tokens; windows are padded to 150."""
    assert 280e9 < rows["q4_k", "encoder, 11 s"]["flops"] < 280e9 * 150 / 138


def test_totals_are_those_of_the_launches(rows: dict) -> None:
    for row in rows.values():
        assert row["n_launches"] == sum(launch["count"] for launch in row["launches"])
        for key in ("weight_bytes", "cache_bytes", "activation_bytes", "flops"):
            assert row[key] == sum(launch["count"] * launch[key] for launch in row["launches"])


def test_floors(rows: dict) -> None:
    """Decoding is bound by memory on every card, prefill by multiplying; a floor is never below either."""
    for card in roofline.CARDS:
        for (_, phase), row in rows.items():
            by_memory = 1e3 * (row["weight_bytes"] + row["cache_bytes"]) / card.bytes_per_s
            by_multiplying = 1e3 * row["flops"] / card.flops_per_s
            floor = row["floor_ms"][card.name]
            assert max(by_memory, by_multiplying) * (1 - 1e-9) <= floor <= by_memory + by_multiplying
            if phase.startswith("decode"):
                assert floor == pytest.approx(by_memory)
    assert rows["q4_k", "prefill of 400"]["floor_ms"]["RTX 3060"] > 2e3 * 400 * 3.6e9 / 26e12


def test_every_matrix_is_named_with_its_type(rows: dict) -> None:
    launches = {launch["name"]: launch for launch in rows["q4_k", "decode at 200"]["launches"]}
    assert launches["llm.lm_head"]["types"] == ("Q6_K",)
    gates, norm = 2 * BY_NAME["Q4_K"].tensor_bytes((D_FF, D_MODEL)), 4 * D_MODEL
    assert launches["llm.blk.N.ffn.gate+up"]["weight_bytes"] == gates + norm
    assert launches["llm.blk.N.ffn.gate+up"]["count"] == N_LAYER


def test_caches_are_no_activations(rows: dict) -> None:
    """Of a step no launch but the head's, whose result is the logits, reads and writes more than a few rows."""
    for launch in rows["q4_k", "decode at 8192"]["launches"]:
        assert launch["activation_bytes"] < 8 * (D_FF + N_VOCAB * (launch["name"] == "llm.lm_head"))


def test_measured_times_stand_beside_floors(tmp_path: Path) -> None:
    configuration = {
        "shape": "4b",
        "recipe": "q4_k",
        "contexts": [{"context": 200, "step_s": 2e-3}],
        "clips": [{"clip_s": 11, "encoder_s": 5e-3}],
    }
    document = {"machine": {"gpu": "NVIDIA H200"}, "configurations": [configuration]}
    (tmp_path / "end_to_end-nvidia-h200.json").write_text(json.dumps(document))
    assert roofline.find_measured("4b", "q4_k", "decode at 200", tmp_path) == {"H200": 2.0}
    assert roofline.find_measured("4b", "q4_k", "encoder, 11 s", tmp_path) == {"H200": 5.0}
    assert roofline.find_measured("4b", "q4_k", "decode at 8192", tmp_path) == {}
    assert roofline.find_measured("8b", "q4_k", "decode at 200", tmp_path) == {}


def test_the_table_goes_between_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"above\n{roofline.BEGIN}\nold\n{roofline.END}\nbelow\n")
    roofline.main(["--shapes", "tiny", "--recipes", "q4_k_all", "--readme", str(path)])
    *_, last = capsys.readouterr().out.splitlines()
    text = path.read_text()
    assert "old" not in text
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "| tiny q4_k_all | decode at 200 |" in text
    assert [card["name"] for card in json.loads(last)["cards"]] == [card.name for card in roofline.CARDS]


def test_the_committed_document_is_of_this_code(rows: dict) -> None:
    document = json.loads((ROOT / "benchmarks/results/roofline.json").read_text())
    kept = {(row["recipe"], row["phase"]): row for row in document["rows"] if row["shape"] == "4b"}
    for key, row in rows.items():
        for name in ("n_launches", "weight_bytes", "cache_bytes", "flops"):
            assert kept[key][name] == row[name], f"{key}: run benchmarks/roofline.py --save"
