"""The CUDA backend: on a stand-in for the card everywhere, and on a GPU where there is one.

The stand-in's runs are interpreted, in processes of their own (`cuda_worker.py`).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from auricle.engine import AuricleError, load
from auricle.engine.backends import BackendError, find_backend
from auricle.engine.backends.backend import Backend
from auricle.engine.executor import compile_graph
from auricle.engine.graph import Graph, cut
from auricle.engine.kv_cache import KV_FORMATS, CacheTensor
from auricle.engine.memory import Request, find_fit, plan_request
from auricle.engine.models.moss_audio import read_moss_audio
from auricle.engine.rewrite import (
    absorb_closings,
    absorb_norms,
    fuse_convolutions,
    widen_linears,
)
from auricle.kernels.formats import F32
from auricle.tools.synth import PlannedFile
from op_cases import make_weight
from support import ROOT

pytest.importorskip("triton", reason="the kernels are written in Triton")
RULES = pytest.importorskip("auricle.engine.backends.cuda").RULES
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALF_ERROR = 2e-3  # relative norm, of products in half precision
BYTE_ERROR = 1e-2  # of products of a few tokens, which are rounded to int8


def run_worker(*arguments: object) -> dict:
    command = [sys.executable, ROOT / "tests" / "cuda_worker.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# On the stand-in.


def test_every_op_agrees_with_the_reference() -> None:
    result = run_worker("ops")
    assert len(result["errors"]) > 60
    rounded = {name for name in result["errors"] if name.endswith(("Q8_0", "Q4_K")) and not name.startswith("kv_")}
    assert len(rounded) > 5
    limits = {name: BYTE_ERROR if name in rounded else HALF_ERROR for name in result["errors"]}
    assert not {name: error for name, error in result["errors"].items() if not error <= limits[name]}
    assert result["errors"]["head Q8_0 exact"] == 0.0
    assert len(result["padding"]) == 6
    assert all(result["padding"].values())
    for large in result["large"].values():  # a residual stream in half precision would be inf, or lose the rest
        assert large["rest"] <= HALF_ERROR
        assert large["channel"] <= 1e-6


def test_a_model_from_end_to_end(tmp_path: Path) -> None:
    result = run_worker("model", tmp_path)
    got, want = result["answers"]
    assert got[0] == want[0]
    forced = result["forced"]
    assert forced["relative"] <= BYTE_ERROR
    assert forced["nats"] <= 1e-3
    assert forced["clear"] > 5
    assert forced["wrong"] == 0
    for looked_ahead, plain in (result["greedy"], result["drawn"]):
        assert looked_ahead == plain
    assert result["peak"] == pytest.approx(result["planned"], rel=0.05)


# Rules.


def decoder_half(n_tokens: int = 3) -> Graph:
    """Attention over a cache between a norm and a residual: what the rules of this backend are about."""
    g = Graph()
    x, positions = g.input("x", (n_tokens, 16)), g.input("p", (n_tokens,), "i32")
    h = g.stage("normed", g.rms_norm(x, g.weight("n", (16,)), eps=1e-6))
    q, k, v = (
        g.reshape(g.linear(h, g.weight(name, (heads * 8, 16))), shape=(n_tokens, heads, 8))
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    )
    q, k = (
        g.rope(g.rms_norm(y, g.weight(f"{n}.n", (8,)), eps=1e-6), positions, theta=1e4) for y, n in ((q, "q"), (k, "k"))
    )
    k = g.stage("turned", k)
    caches = [g.kv_store(g.state(f"{n}.cache", (5, 2, 8)), y, positions) for y, n in ((k, "k"), (v, "v"))]
    for cache in caches:
        g.require(cache)
    mixed = g.reshape(g.kv_attention(q, *caches, positions), shape=(n_tokens, 32))
    o = g.stage("o", g.linear(mixed, g.weight("o", (16, 32))))
    x = g.add(x, o)
    h = g.layer_norm(x, g.weight("ln", (16,)), g.weight("lb", (16,)), eps=1e-5)
    h = g.gelu(g.linear(h, g.weight("fc1", (24, 16)), g.weight("b1", (24,))))
    g.stage("out", g.add(x, g.linear(h, g.weight("fc2", (16, 24)), g.weight("b2", (16,)))))
    return g


def ops_after(rules: tuple[Callable, ...], capture: list[str], n_tokens: int = 3) -> list[str]:
    graph = cut(decoder_half(n_tokens), capture)
    for rule in rules:
        graph = rule(graph, capture)
    return [node.op for node in graph.nodes if node.op != "reshape"]


def test_rules_leave_few_launches() -> None:
    assert ops_after(RULES, ["out"]) == [
        "wide_linear", "norm_rope_store", "kv_attention", "wide_linear", "wide_linear", "wide_linear",
    ]  # fmt: skip
    assert ops_after(RULES, ["out"], n_tokens=1) == ["wide_linear", "norm_rope_attention", *["wide_linear"] * 3]


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_the_head_of_one_token_finds_the_likeliest_itself(n_tokens: int) -> None:
    g = Graph()
    h = g.rms_norm(g.input("x", (n_tokens, 32)), g.weight("norm", (32,)), eps=1e-6)
    logits = g.stage("logits", g.linear(h, g.weight("head", (40, 32))))
    token = g.stage("token", g.argmax(logits))
    assert (token.shape, token.dtype) == ((n_tokens,), "i32")
    closed = absorb_closings(absorb_norms(widen_linears(cut(g, ["token"]))), ["token"])
    assert [n.op for n in closed.nodes] == (["wide_linear"] if n_tokens == 1 else ["wide_linear", "argmax"])
    assert closed.stages["token"].dtype == "i32"
    seen = absorb_closings(absorb_norms(widen_linears(g)), ["token", "logits"])
    assert [n.op for n in seen.nodes] == ["wide_linear", "argmax"]


@pytest.mark.parametrize(
    ("stage", "stays"), [("normed", "rms_norm"), ("turned", "norm_rope"), ("o", "add")], ids=lambda x: x
)
def test_captured_stages_are_not_fused_away(stage: str, stays: str) -> None:
    assert stays not in ops_after(RULES, ["out"])
    assert stays in ops_after(RULES, ["out", stage])


@pytest.mark.parametrize("n_rules", range(1, len(RULES) + 1))
@pytest.mark.parametrize("capture", [["out"], ["out", "normed", "turned", "o"]], ids="+".join)
def test_rules_keep_the_numbers(n_rules: int, capture: list[str]) -> None:
    exact, results = find_backend("reference"), []
    x = np.random.default_rng(0).standard_normal((3, 16), dtype=np.float32)
    for rules in ((), RULES[:n_rules]):
        graph, rng = decoder_half(), np.random.default_rng(5)
        weights = {v.name: make_weight(v.name, v.shape, F32, rng) for v in graph.leaves_of("weight")}
        states = {v.name: CacheTensor(v.shape, F32) for v in graph.leaves_of("state")}
        backend = replace(exact, rules=rules)
        program = compile_graph(graph, backend, weights.get, capture=capture, states=states, poison=True)
        values = program.run({"x": x, "p": np.arange(3)})
        results.append({**{n: v.numpy().copy() for n, v in values.items()}, "kept": states["k.cache"].read(3).numpy()})
    want, got = results
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def stem(depth: int = 3) -> Graph:
    """Convolutions with GELUs, and the transposition after them, as encoders begin."""
    g = Graph()
    x = g.input("x", (2, 1, 12, 10))
    for n, c_in in enumerate((1, 4, 5)[:depth]):
        y = g.stage(f"conv{n}", g.conv2d(x, g.weight(f"w{n}", (4 + n, c_in, 3, 3)), g.weight(f"b{n}", (4 + n,)),
                                         stride=2, padding=1))  # fmt: skip
        x = g.gelu(y)
    g.stage("out", g.permute(x, dims=(0, 3, 1, 2)))
    return g


@pytest.mark.parametrize(
    ("capture", "ops"),
    [
        (["out"], ["conv_stack"]),
        (["out", "conv0"], ["conv2d", "gelu", "conv_stack"]),
        (["out", "conv2"], ["conv2d", "gelu", "conv2d", "gelu", "conv2d", "gelu", "permute"]),
    ],
)
def test_convolutions_become_one_op_as_far_as_nobody_looks_between_them(capture: list[str], ops: list[str]) -> None:
    graph = fuse_convolutions(cut(stem(), capture), capture)
    assert [node.op for node in graph.nodes] == ops
    exact, results = find_backend("reference"), []
    for rules in ((), (fuse_convolutions,)):
        rng = np.random.default_rng(5)
        weights = {v.name: make_weight(v.name, v.shape, F32, rng) for v in stem().leaves_of("weight")}
        program = compile_graph(stem(), replace(exact, rules=rules), weights.get, capture=capture, poison=True)
        values = program.run({"x": np.random.default_rng(0).standard_normal((2, 1, 12, 10), dtype=np.float32)})
        results.append({name: value.numpy().copy() for name, value in values.items()})
    for name in capture:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def test_no_library_takes_memory_beside_the_plan(card: Backend) -> None:
    """A long clip's stem lies in the arena, and in half of what float32 between its ops would take."""
    file = PlannedFile("moss-audio-4b", "q4_k_all")
    request = Request((60_000,), n_prompt=8000, n_distinct=150, n_new=256)
    memory = plan_request(file, read_moss_audio(file), card, KV_FORMATS["f16"], request)
    assert memory.libraries == 0
    assert memory.arena < 300 << 20


# The plan, from sizes alone: nothing is launched, so the stand-in serves here, too.


@pytest.fixture(scope="module")
def card() -> Backend:
    from auricle.engine.backends.cuda import make_backend
    from stand_in import StandIn

    return make_backend(StandIn())


@pytest.mark.parametrize(
    ("gib", "processors", "windows", "chunk"),
    [
        (8, 24, 4, 512),
        (16, 34, 8, 512),
        (24, 128, 16, 1024),
        (80, 132, 32, 1024),
        (141, 132, 64, 1024),
        (4, 16, 2, 512),
    ],
)
def test_work_is_cut_by_the_size_of_the_card(gib: int, processors: int, windows: int, chunk: int) -> None:
    from auricle.engine.backends.cuda import batch_sizes

    total = gib << 30
    assert batch_sizes(total, total, processors) == {"window_batch": windows, "prefill_chunk": chunk}
    busy = batch_sizes(total, total // 8, processors)
    assert busy["window_batch"] < windows
    assert batch_sizes(total, 0, processors)["window_batch"] == 1


def test_the_small_recipe_fits_a_small_card(card: Backend) -> None:
    file = PlannedFile("moss-audio-4b", "q4_k_all")
    request = Request((1100,), n_prompt=200, n_distinct=150, n_new=256)
    memory = plan_request(file, read_moss_audio(file), card, KV_FORMATS["f16"], request)
    assert memory.total < 3.6 * 2**30
    stored = sum(t.nbytes for t in file.tensors.values())
    assert sum(memory.weights.values()) == pytest.approx(stored, rel=0.01)
    assert memory.kv_cache == 2 * 36 * 512 * 8 * 128 * 2


def test_a_budget_is_kept_in_the_promised_order(card: Backend) -> None:
    file = PlannedFile("tiny", "q8_0")
    config, formats = read_moss_audio(file), [KV_FORMATS["f16"], KV_FORMATS["q8_0"]]
    request = Request((3000,) * 4, n_prompt=1700, n_distinct=150, n_new=300)

    def fit(budget: int) -> tuple:
        return find_fit(file, config, card, formats, request, budget)

    found, plain, _ = fit(1 << 40)
    assert found is plain
    assert found.changes == ()
    nothing, _, least = fit(1000)
    assert nothing is None
    assert least.plan.total < plain.plan.total / 2
    seen = []
    for budget in np.linspace(plain.plan.total - 1, least.plan.total, 6).astype(int):
        found, _, _ = fit(int(budget))
        if found is not None:
            assert found.plan.total <= budget
            seen.append((("kept", "dropped", "cpu").index(found.encoder), formats.index(found.kv_format)))
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


# Opening.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_card_one_line_says_so() -> None:
    with pytest.raises(BackendError, match="--backend cpu") as caught:
        find_backend("cuda")
    assert "\n" not in str(caught.value)
    assert find_backend("auto").name == "cpu"


def test_a_budget_on_the_processor(tmp_path: Path) -> None:
    from auricle.convert.hf import convert, plan_conversion
    from auricle.tools.sample import write_checkpoint

    path = tmp_path / "model.gguf"
    convert(plan_conversion(write_checkpoint(tmp_path / "checkpoint"), "q8_0"), path)
    with load(path, backend="cpu", precision="exact", memory=1 << 40) as model:
        assert model.generate("What?", max_new_tokens=2).token_ids
    complaint = r"--memory 0\.01 GiB does not hold this request.*the least it can take"
    with (
        load(path, backend="cpu", precision="exact", memory=10 << 20) as model,
        pytest.raises(AuricleError, match=complaint),
    ):
        model.generate("What?", max_new_tokens=2)


# On a GPU.


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("numba", reason="quantising to Q4_K needs numba")
    from auricle.convert.hf import convert, plan_conversion
    from auricle.tools.sample import SampleShape, write_checkpoint

    folder = tmp_path_factory.mktemp("sample")
    shape = SampleShape(d_model=512, n_layer=4, n_head=8, n_kv_head=2, d_ff=1536, n_vocab=4096)
    convert(plan_conversion(write_checkpoint(folder / "checkpoint", shape), "q4_k"), folder / "model.gguf")
    return folder / "model.gguf"


SOUND = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 5).astype(np.float32)


@needs_card
def test_teacher_forced_on_a_card(sample: Path) -> None:
    logits = []
    for backend in ("cuda", "reference"):
        with load(sample, backend=backend, n_ctx=2000) as model:
            heard = model.listen(SOUND, 16_000)
            prompt = model.build_prompt("What?", heard)
            rows = model.runtime.encode(heard.mels)
            logits.append(model.runtime.trace_decoder(prompt, rows, ["logits"], {})["logits"])
    got, want = logits
    second, first = np.sort(want, -1)[:, -2:].T
    clear = first - second > 2 * np.abs(got - want).max(-1)
    assert clear.sum() > 20
    assert (got.argmax(-1) == want.argmax(-1))[clear].all()


@needs_card
def test_a_thousand_steps_wait_for_nothing_but_tokens(sample: Path) -> None:
    from auricle.engine.sampling import Sampler, SamplingOptions

    with load(sample, backend="cuda", n_ctx=2000) as model:
        prompt = model.build_prompt("What?", model.listen(None))
        first = int(model.runtime.prefill(prompt, [], 1100).argmax())
        for options in (SamplingOptions(), SamplingOptions(0.8, 40, 0.95, 0.01, 1.1, seed=1)):
            list(model.runtime.steps(first, len(prompt.ids), 5, Sampler(options)))  # compiles and records
            torch.cuda.set_sync_debug_mode("error")
            try:
                tokens = list(model.runtime.steps(first, len(prompt.ids), 1000, Sampler(options)))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(tokens) == 1000


@needs_card
def test_the_peak_is_the_planned_one(sample: Path) -> None:
    with load(sample, backend="cuda", n_ctx=2000) as model:
        plan = model.plan([5.0], "What?", max_new_tokens=200)
        planned = plan.total - plan.libraries  # what the convolutions take is free again when the decoder comes
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.generate("What?", SOUND, sample_rate=16_000, max_new_tokens=200)
        assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.05)
