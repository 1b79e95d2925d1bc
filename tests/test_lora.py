"""Adapters applied when a model is loaded: the same as weights that were merged by hand, and nothing where none is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from adapters import EVERYTHING, merge_into, write_adapter
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.lora import plan_lora
from auricle.convert.requantize import plan_requantization
from auricle.convert.source import ConversionError
from auricle.engine import Model, load
from auricle.engine.gguf import GGUFError, Typed, f32, f32s, i32s, open_gguf, string, strings, u32, u64
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.graph import Graph
from auricle.engine.lora import LoraError, LowRank, apply_loras, parse_lora, stack
from auricle.engine.models.config import ModelError
from auricle.engine.rewrite import fuse_gates, fuse_linears, observe
from auricle.engine.sampling import OptionError
from auricle.kernels.formats import F32
from auricle.tools.sample import SampleShape
from auricle.tools.stages import mean_divergence, trace_stages
from checkpoints import build_f32, copy_checkpoint
from sounds import synthetic

SHAPE = SampleShape(n_layer=2, enc_n_layer=3, taps=(0, 1), n_inject=2, n_head=2, enc_d_out=96)
SOUND = synthetic(5.3, 16_000)
BACKENDS = {"reference": {"backend": "reference"}, "cpu": {"precision": "exact"}, "int8": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf, two adapters one.gguf and two.gguf, and both merged into the checkpoint by hand: merged.gguf."""
    folder = tmp_path_factory.mktemp("lora")
    checkpoint, base = build_f32(folder / "base", SHAPE, seed=0)
    base.rename(folder / "base.gguf")
    convert(plan_conversion(checkpoint, "q8_0"), folder / "q8_0.gguf")
    merged = copy_checkpoint(folder / "merged", SHAPE)
    for seed, (name, scale) in enumerate({"one": 1.0, "two": -0.5}.items()):
        adapter = write_adapter(folder / name, checkpoint, EVERYTHING, rank=3 + seed, seed=seed)
        convert(plan_lora(adapter), folder / f"{name}.gguf")
        merge_into(merged, adapter, scale)
    convert(plan_conversion(merged, "f32"), folder / "merged.gguf")
    convert(plan_conversion(merged, "q8_0"), folder / "merged_q8_0.gguf")
    return folder


BOTH = ("one.gguf:1", "two.gguf:-0.5")


def open_model(folder: Path, name: str, lora: tuple[str, ...] = (), **options: str) -> Model:
    return load(folder / name, lora=[f"{folder}/{spec}" for spec in lora], n_ctx=400, kv_type="f32", **options)


def answer(model: Model, names: tuple[str, ...] = ("logits",)) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Stages of one request, and its greedy tokens."""
    heard = model.listen(SOUND, 16_000)
    stages = trace_stages(model, heard, model.build_prompt("What?", heard), names)
    return stages, model.generate("What?", SOUND, sample_rate=16_000, max_new_tokens=12).token_ids


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_adapters_are_as_if_merged(folder: Path, backend: str) -> None:
    """All parts of the model are changed; a stage that is a linear map's result is the changed one."""
    names = ("enc.stem_proj", "enc.out", "adapter", "deepstack.1", "llm.blk.1", "logits")
    options = BACKENDS[backend]
    with open_model(folder, "base.gguf", BOTH, poison=True, **options) as model:
        got, tokens = answer(model, names)
    with open_model(folder, "merged.gguf", **options) as model:
        want, expected = answer(model, names)
    with open_model(folder, "base.gguf", **options) as model:
        plain, _ = answer(model, names)
    assert tokens == expected
    for name in names:
        size = np.abs(want[name]).max()
        assert np.abs(got[name] - want[name]).max() < 1e-4 * size, name
        assert np.abs(plain[name] - want[name]).max() > 0.02 * size, name


def test_on_quantised_weights(folder: Path) -> None:
    """The weights lose, the adapter does not: as near as the merged and then quantised file, and far from the base."""
    with open_model(folder, "q8_0.gguf", BOTH) as model:
        got, _ = answer(model)
    with open_model(folder, "merged.gguf") as model:
        want, _ = answer(model)
    with open_model(folder, "merged_q8_0.gguf") as model:
        quantised, _ = answer(model)
    with open_model(folder, "q8_0.gguf") as model:
        plain, _ = answer(model)
    lost = mean_divergence(quantised["logits"], want["logits"])
    assert mean_divergence(got["logits"], want["logits"]) < max(2 * lost, 1e-4)
    assert mean_divergence(plain["logits"], want["logits"]) > 20 * lost


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_nought_is_the_base(folder: Path, backend: str) -> None:
    with open_model(folder, "base.gguf", ("one.gguf:0", "two.gguf:-0.0"), **BACKENDS[backend]) as model:
        got, tokens = answer(model)
    with open_model(folder, "base.gguf", **BACKENDS[backend]) as model:
        want, expected = answer(model)
    assert tokens == expected
    assert np.array_equal(got["logits"], want["logits"])


def test_scales_add_up(folder: Path) -> None:
    """One adapter twice at half its strength is the adapter; a lone path and a list of one are the same."""
    found = [
        answer(open_model(folder, "base.gguf", lora))[0]["logits"] for lora in (("one.gguf",), ("one.gguf:0.5",) * 2)
    ]
    assert np.abs(found[0] - found[1]).max() < 1e-4
    with load(folder / "base.gguf", lora=folder / "one.gguf", n_ctx=400, kv_type="f32") as model:
        assert np.array_equal(answer(model)[0]["logits"], found[0])


def test_the_plan_counts_them(folder: Path) -> None:
    with open_model(folder, "base.gguf") as plain, open_model(folder, "base.gguf", ("one.gguf",)) as adapted:
        without, with_them = plain.plan([2.0]), adapted.plan([2.0])
    with open_gguf(folder / "one.gguf") as file:
        n_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
    assert sum(with_them.weights.values()) - sum(without.weights.values()) == n_bytes
    assert with_them.arena >= without.arena


# The rule.


def small_graph() -> Graph:
    g = Graph()
    x = g.input("x", (5, 8))
    gate, up = (g.linear(x, g.weight(name, (6, 8))) for name in ("gate", "up"))
    g.stage("gate", gate)
    y = g.linear(g.mul(g.silu(gate), up), g.weight("down", (8, 6)), g.weight("bias", (8,)))
    g.stage("out", g.add(x, y))
    return g


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_the_rule_leaves_other_graphs_alone() -> None:
    graph = small_graph()
    assert apply_loras(graph, ranks={"another": 2}) is graph
    assert apply_loras(graph, ranks={}) is graph


def test_the_rule_changes_what_it_names() -> None:
    graph = apply_loras(small_graph(), ranks={"gate": 2, "down": 3})
    assert ops(graph).count("linear") == 3 + 4
    shapes = {leaf.name: leaf.shape for leaf in graph.leaves_of("weight")}
    assert (shapes["gate.lora_a"], shapes["gate.lora_b"]) == ((2, 8), (6, 2))
    assert (shapes["down.lora_a"], shapes["down.lora_b"]) == ((3, 6), (8, 3))
    sums = [node for node in graph.nodes if node.op == "add"]
    assert graph.stages["gate"] is sums[0].outputs[0]
    biased = next(n for n in graph.nodes if n.op == "linear" and n.inputs[1].name == "down")
    assert biased.inputs[2].name == "bias"


def test_fusions_keep_the_change() -> None:
    """A changed gate is no plain gated pair any more; all maps of one x still go together."""
    changed = apply_loras(small_graph(), ranks={"gate": 2})
    assert "gated_linear" in ops(fuse_gates(small_graph())), "the pattern is gone: this test says nothing"
    assert "gated_linear" not in ops(fuse_gates(changed))
    (group,) = [node for node in fuse_linears(changed).nodes if node.op == "linears"]
    assert [w.name for w in group.inputs[1]] == ["gate", "gate.lora_a", "up"]


def test_observers_see_the_base_weights_alone() -> None:
    graph = apply_loras(observe(small_graph()), ranks={"gate": 2})
    assert sorted(leaf.name for leaf in graph.leaves_of("state")) == ["sum_squares down", "sum_squares gate up"]


def test_stack() -> None:
    rng = np.random.default_rng(0)
    pairs = [LowRank(rng.standard_normal((r, 7)), rng.standard_normal((5, r))) for r in (2, 3)]
    both = stack(pairs)
    assert both.rank == 5
    assert both.shape == (5, 7)
    np.testing.assert_allclose(both.rows(1, 4), sum(p.b @ p.a for p in pairs)[1:4], rtol=1e-12)


# What users and files get wrong.


def test_parse_lora(tmp_path: Path) -> None:
    assert parse_lora("voice.gguf") == (Path("voice.gguf"), 1.0)
    assert parse_lora("voice.gguf:0.5") == (Path("voice.gguf"), 0.5)
    assert parse_lora("a:b/voice.gguf:-2e-1") == (Path("a:b/voice.gguf"), -0.2)
    assert parse_lora(Path("voice.gguf")) == (Path("voice.gguf"), 1.0)
    (tmp_path / "take:2").touch()
    assert parse_lora(f"{tmp_path}/take:2") == (tmp_path / "take:2", 1.0)


@pytest.mark.parametrize("spec", ["v.gguf:", "v.gguf:half", "v.gguf:nan", "v.gguf:inf", ":0.5", "v.gguf:0,5"])
def test_scales_that_are_none(spec: str) -> None:
    with pytest.raises(OptionError, match="is no scale; write FILE or FILE:SCALE"):
        parse_lora(spec)


def write_file(path: Path, metadata: dict[str, Typed | None], tensors: dict[str, np.ndarray]) -> Path:
    """An adapter file of one good pair, but for what is said otherwise."""
    usual = {"general.type": string("adapter"), "general.architecture": string("moss_audio")}
    usual |= {"adapter.type": string("lora"), "adapter.lora.alpha": f32(4.0)} | metadata
    layout = plan_layout({k: v for k, v in usual.items() if v}, [(n, x.shape, F32) for n, x in tensors.items()])
    with GGUFWriter(path, layout) as writer:
        for name, values in tensors.items():
            writer.write(name, values.astype("<f4"))
    return path


Q = "llm.blk.0.attn.q.weight"
PAIR = {f"{Q}.lora_a": np.ones((2, 256)), f"{Q}.lora_b": np.ones((256, 2))}
EMBED = {"llm.embed.weight.lora_a": np.ones((2, 256)), "llm.embed.weight.lora_b": np.ones((512, 2))}
NAN = np.where(np.arange(512).reshape(2, 256) == 300, np.nan, 1.0)

FAULTS = {
    "a model": (
        {"general.type": string("model")},
        PAIR,
        "is a model; give it with -m; give a file of auricle conv",
    ),
    "a matrix": ({"general.type": string("imatrix")}, PAIR, "is an importance matrix; give it with --imatrix"),
    "a projector": ({"general.type": string("mmproj")}, PAIR, "is of the type 'mmproj'; give a file"),
    "a type that is a list": (
        {"general.type": strings(["adapter"])},
        PAIR,
        r"type = \['adapter'\]: it must be a text",
    ),
    "a type that is a number": ({"general.type": u32(1)}, PAIR, "general.type = 1: it must be a text"),
    "a list of adapter types": ({"adapter.type": strings(["lora"])}, PAIR, r"adapter.type = .*: it must be a text"),
    "no adapter type": ({"adapter.type": None}, PAIR, "adapter.type is None, not 'lora'"),
    "numbers for an architecture": (
        {"general.architecture": i32s([1])},
        PAIR,
        "architecture = .* must be a text",
    ),
    "alpha is a text": ({"adapter.lora.alpha": string("4")}, PAIR, "adapter.lora.alpha = '4': it must be a number"),
    "alpha is a list": ({"adapter.lora.alpha": f32s([4.0])}, PAIR, "adapter.lora.alpha = .*: it must be a number"),
    "another adapter": ({"adapter.type": string("control")}, PAIR, "adapter.type is 'control', not 'lora'"),
    "another architecture": ({"general.architecture": string("qwen3")}, PAIR, "for 'qwen3', and the model is 'moss_a"),
    "alpha is none": ({"adapter.lora.alpha": f32(float("inf"))}, PAIR, "adapter.lora.alpha = inf: it must be a number"),
    "huge alpha": ({"adapter.lora.alpha": f32(3e38)}, {**PAIR, f"{Q}.lora_b": 9 * PAIR[f"{Q}.lora_b"]}, "not finite"),
    "empty": ({}, {"x": np.ones(3)}, "holds 'x', which is neither .lora_a nor .lora_b"),
    "line break": ({}, {"a\nb": np.ones(3)}, r"holds 'a\\nb', which"),
    "half": ({}, {f"{Q}.lora_a": PAIR[f"{Q}.lora_a"]}, "lora_b' is missing beside its counterpart"),
    "ranks differ": ({}, {**PAIR, f"{Q}.lora_b": np.ones((256, 3))}, r"\[2, 256\] and \[256, 3\], not"),
    "one dimension": ({}, {**PAIR, f"{Q}.lora_b": np.ones(256)}, r"\[2, 256\] and \[256\], not"),
    "another shape": ({}, {**PAIR, f"{Q}.lora_a": np.ones((2, 64))}, r"\[256, 64\], and in .* it is \[256, 256\]"),
    "unknown": ({}, {n.replace("blk.0", "blk.9"): x for n, x in PAIR.items()}, "no tensor of .*; it is for another"),
    "embedding": ({}, EMBED, "only matrices of linear maps can be changed"),
    "norm": (
        {},
        {"llm.final_norm.weight.lora_a": np.ones((1, 256)), "llm.final_norm.weight.lora_b": np.ones((1, 1))},
        "only matrices of linear maps can be changed",
    ),
    "not finite": ({}, {**PAIR, f"{Q}.lora_a": NAN}, "holds numbers that are not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_are_none(folder: Path, tmp_path: Path, fault: str) -> None:
    metadata, tensors, message = FAULTS[fault]
    path = write_file(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises((LoraError, GGUFError), match=message) as caught:
        load(folder / "base.gguf", lora=[path])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_alpha_may_be_missing(folder: Path, tmp_path: Path) -> None:
    """Then the scale is the user's alone, as llama.cpp has it."""
    rng = np.random.default_rng(0)
    pair = {name: 0.1 * rng.standard_normal(values.shape) for name, values in PAIR.items()}
    stated = write_file(tmp_path / "stated.gguf", {}, pair)
    silent = write_file(tmp_path / "silent.gguf", {"adapter.lora.alpha": None}, pair)
    with load(folder / "base.gguf", lora=[f"{stated}:0.5"], n_ctx=400) as model:
        want = answer(model)[0]["logits"]
    with load(folder / "base.gguf", lora=[f"{silent}:1"], n_ctx=400) as model:
        assert np.array_equal(answer(model)[0]["logits"], want)


def test_alpha_may_be_whole_and_the_type_unsaid(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pair = {name: 0.1 * rng.standard_normal(values.shape) for name, values in PAIR.items()}
    stated = write_file(tmp_path / "stated.gguf", {}, pair)
    silent = write_file(tmp_path / "silent.gguf", {"adapter.lora.alpha": u32(4), "general.type": None}, pair)
    answers = []
    for path in (stated, silent):
        with load(folder / "base.gguf", lora=[path], n_ctx=400) as model:
            answers.append(answer(model)[0]["logits"])
    assert np.array_equal(*answers)


def test_what_is_no_model_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    adapter = write_file(tmp_path / "voice.gguf", {}, PAIR)
    matrix = write_file(tmp_path / "matrix.gguf", {"general.type": string("imatrix")}, PAIR)
    theirs = write_file(tmp_path / "theirs.gguf", {"general.type": None, f"count.{Q}": u64(3)}, {Q: np.ones((1, 256))})
    other = write_file(tmp_path / "eyes.gguf", {"general.type": string("mmproj")}, PAIR)
    for path, complaint in (
        (adapter, "is a LoRA adapter; give it with --lora beside a model; a model is wanted here"),
        (matrix, "is an importance matrix; give it with --imatrix"),
        (theirs, "is an importance matrix; give it with --imatrix"),
        (other, "is of the type 'mmproj'"),
    ):
        with pytest.raises(ModelError, match=complaint) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        if path is not other:
            with pytest.raises(ConversionError, match="only models are quantised"):
                plan_requantization(path, "q8_0")


def test_bytes_that_are_no_adapter(folder: Path, tmp_path: Path) -> None:
    """Each beginning of a file, and a folder: one line, whatever it is."""
    raw = write_file(tmp_path / "good.gguf", {}, PAIR).read_bytes()
    attempt = partial(load, folder / "base.gguf")
    for n in (0, 3, 20, 60, 200, len(raw) - 1):
        (tmp_path / "cut.gguf").write_bytes(raw[:n])
        with pytest.raises(GGUFError):
            attempt(lora=[str(tmp_path / "cut.gguf")])
    for path in (tmp_path, tmp_path / "absent.gguf", folder / "base.gguf"):
        with pytest.raises((LoraError, GGUFError)):
            attempt(lora=[str(path)])
