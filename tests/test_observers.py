"""Observers: what the engine sums up about the inputs of matrices, against numpy and against hooks in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from auricle.convert.importance import merge
from auricle.engine import Model, load
from auricle.engine.backends import BACKENDS, find_backend
from auricle.engine.executor import compile_graph, draft_graph
from auricle.engine.graph import Graph
from auricle.engine.rewrite import SUMS, observe, observed_weights
from auricle.engine.runtime import Runtime
from auricle.kernels.formats import F32, Q8_0
from auricle.tools.imatrix import by_weight, run_request
from auricle.tools.sample import SampleShape
from auricle.tools.stages import window_lengths
from checkpoints import build_f32, gguf_name
from op_cases import make_weight
from sounds import synthetic

oracle = pytest.importorskip("auricle.tools.oracle.model", reason="needs transformers (the test extra)")

SHAPES = {
    "plain": SampleShape(),
    "projected": SampleShape(enc_d_model=96, enc_n_head=3, enc_d_out=80, d_adapter=56, d_ff=72),
    "tied": SampleShape(n_head=4, n_kv_head=4, d_head=64, d_model=128, tied=True, taps=(1, 3), n_inject=2),
}
N_NEW = 6


def energies(states: dict[str, torch.Tensor]) -> dict[str, tuple[np.ndarray, int]]:
    """By weight, its sums and its rows."""
    return {name: (sums.squares, sums.n_rows) for name, sums in merge(by_weight(states)).sums.items()}


def assert_same(got: dict, want: dict, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, (sums, n_rows) in want.items():
        assert got[name][1] == n_rows, name
        np.testing.assert_allclose(got[name][0], sums, rtol=tolerance, atol=tolerance * sums.mean(), err_msg=name)


# The op and the rule, on graphs made here.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [None, [5, 0, 2]], ids=["all", "lengths"])
def test_sum_squares(backend: str, lengths: list[int] | None) -> None:
    g = Graph()
    x = g.input("x", (3, 5, 7))
    n = None if lengths is None else g.input("n", (3,), "i32")
    g.require(g.sum_squares(g.state("sums", (8,)), x, n))
    g.stage("out", g.silu(x))
    sums = torch.zeros(8, dtype=torch.float64)
    program = compile_graph(g, find_backend(backend), {}.get, capture=["out"], states={"sums": sums}, poison=True)
    values = np.random.default_rng(0).standard_normal((2, 3, 5, 7), dtype=np.float32)
    seen = np.ones((3, 5), bool) if lengths is None else np.arange(5) < np.array(lengths)[:, None]
    values[:, ~seen] = np.nan
    for run in values:
        program.run({"x": run} | ({} if lengths is None else {"n": np.array(lengths, np.int32)}))
    rows = values[:, seen].astype(np.float64).reshape(-1, 7)
    np.testing.assert_allclose(sums[:-1].numpy(), (rows**2).sum(0), rtol=1e-14)
    assert sums[-1] == len(rows)


def test_sums_do_not_lose_small_rows_after_many() -> None:
    """In float32 a sum of 2^24 would not grow by ones any more."""
    g = Graph()
    g.stage("sums", g.sum_squares(g.state("s", (3,)), g.input("x", (4, 2))))
    sums = torch.tensor([2.0**24, 2.0**30, 0.0], dtype=torch.float64)
    program = compile_graph(g, find_backend("cpu"), {}.get, capture=["sums"], states={"s": sums})
    program.run({"x": np.ones((4, 2), np.float32)})
    assert sums.tolist() == [2.0**24 + 4, 2.0**30 + 4, 4]


def gated_graph() -> Graph:
    """A gate and its way back, then one weight more for two different inputs."""
    g = Graph()
    x = g.input("x", (3, 32))
    gate, up = (g.linear(x, g.weight(name, (64, 32))) for name in ("gate", "up"))
    y = g.linear(g.stage("inner", g.mul(g.silu(gate), up)), g.weight("down", (32, 64)))
    w = g.weight("shared", (32, 32))
    g.stage("out", g.add(g.linear(x, w), g.linear(y, w)))
    return g


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", [F32, Q8_0], ids=str)
def test_observe_sees_what_each_weight_meets(backend: str, fmt) -> None:
    rng = np.random.default_rng(1)
    weights = {v.name: make_weight(v.name, v.shape, fmt, rng) for v in gated_graph().leaves_of("weight")}
    x = rng.standard_normal((3, 32), dtype=np.float32)
    plain = compile_graph(gated_graph(), find_backend(backend), weights.get, capture=["out"])
    graph = observe(gated_graph())
    states = {v.name: torch.zeros(v.shape, dtype=torch.float64) for v in graph.leaves_of("state")}
    program = compile_graph(graph, find_backend(backend), weights.get, capture=["out"], states=states, poison=True)
    np.testing.assert_array_equal(program.run({"x": x})["out"], plain.run({"x": x})["out"])

    assert set(states) == {f"{SUMS} gate up shared", f"{SUMS} down", f"{SUMS} shared"}
    w = {name: weight.decode().double().numpy() for name, weight in weights.items()}
    g = x @ w["gate"].T
    inner = g / (1 + np.exp(-g)) * (x @ w["up"].T)
    both = np.concatenate([x, inner @ w["down"].T])
    want = {"gate": x, "up": x, "down": inner, "shared": both}
    want = {name: ((rows.astype(np.float64) ** 2).sum(0), len(rows)) for name, rows in want.items()}
    assert_same(energies(states), want, 1e-5)


def test_fusions_still_apply_to_an_observed_graph() -> None:
    ops = [node.op for node in draft_graph(observe(gated_graph()), find_backend("cpu"), ["out"]).graph.nodes]
    assert ops.count("gated_linear") == 1
    assert ops.count("sum_squares") == 3


def test_nothing_is_observed_where_a_stage_is_fed() -> None:
    draft = draft_graph(observe(gated_graph()), find_backend("cpu"), ["out"], ["inner"])
    assert "sum_squares" not in {node.op for node in draft.graph.nodes}
    assert observed_weights("kv.0.k") == []


# A whole model.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Gives the checkpoint folder and the F32 file of a shape, made once."""
    return cache(lambda name: build_f32(tmp_path_factory.mktemp(name), SHAPES[name], seed=list(SHAPES).index(name)))


def observing_runtime(model: Model, states: dict[str, torch.Tensor] | None) -> Runtime:
    return Runtime(
        model.file, model.config, model.backend, n_ctx=model.n_ctx, kv_format=F32, poison=True, observers=states
    )


def hooked_energies(checkpoint, heard, prompt, lengths: list[int]) -> dict[str, tuple[np.ndarray, int]]:
    """The same sums from forward hooks on every linear layer of the PyTorch model."""
    model = oracle.load_oracle(checkpoint)
    sums: dict[str, tuple[np.ndarray, int]] = {}
    in_window = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def add(name: str, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        old, n = sums.get(name, (0.0, 0))
        sums[name] = (old + rows.square().sum(0).numpy(), n + len(rows))

    def hook(name: str) -> Callable:
        weight, padded = gguf_name(f"{name}.weight"), name.startswith("audio_encoder.")
        return lambda _module, inputs, _output: add(weight, inputs[0][in_window] if padded else inputs[0])

    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(hook(name))
    model.model.language_model.register_forward_hook(  # of a run only the last row chooses a token
        lambda _module, _inputs, output: add("llm.lm_head.weight", output.last_hidden_state[0, -1:])
    )
    model.run(heard.mels, prompt.ids, prompt.audio_rows >= 0, n_new=N_NEW + 1)
    return sums


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_energies_are_those_of_hooks_in_pytorch(built, shape: str, backend: str) -> None:
    """Two clips, both with a tail window: its padding must not count."""
    checkpoint, path = built(shape)
    states: dict[str, torch.Tensor] = {}
    with load(path, backend=backend, n_ctx=400) as model:
        heard = model.listen([synthetic(5.2, 16_000), synthetic(1.004, 16_000, seed=1)])
        prompt = model.build_prompt("What do you hear?", heard)
        lengths = window_lengths(model.config.encoder, [mel.shape[1] for mel in heard.mels])
        run_request(observing_runtime(model, states), heard, prompt, N_NEW, frozenset())
        want = hooked_energies(checkpoint, heard, prompt, lengths)
        matrices = {v for name in states for v in observed_weights(name)}
    if SHAPES[shape].tied:
        want["llm.embed.weight"] = want.pop("llm.lm_head.weight")
    assert matrices == want.keys()
    assert want["enc.stem_proj.weight"][1] == sum(lengths) < len(lengths) * max(lengths)
    assert {state.dtype for state in states.values()} == {torch.float64}
    got = energies(states)
    assert_same(got, want, 2e-5)
    assert got["llm.blk.0.ffn.down.weight"][1] == len(prompt.ids) + N_NEW


def test_the_answer_ends_as_it_would(built) -> None:
    """At a token that ends it, at the budget, at the end of the context; an id that ends it is not run."""
    with load(built("plain")[1], n_ctx=400) as model:
        heard = model.listen(synthetic(1.0, 16_000))
        prompt = model.build_prompt("What do you hear?", heard)
        chosen = observing_runtime(model, {})
        first = int(chosen.prefill(prompt, chosen.encode(heard.mels)).argmax())
        for n_ctx, n_new, stop_ids, want in [(400, 9, {first}, 1), (400, 4, (), 5), (len(prompt.ids) + 2, 9, (), 3)]:
            model.n_ctx = n_ctx
            states: dict[str, torch.Tensor] = {}
            run_request(observing_runtime(model, states), heard, prompt, n_new, frozenset(stop_ids))
            assert energies(states)["llm.lm_head.weight"][1] == want


def test_observing_changes_no_number(built) -> None:
    with load(built("plain")[1], n_ctx=400) as model:
        heard = model.listen(synthetic(5.0, 16_000))
        prompt = model.build_prompt("What do you hear?", heard)
        logits = []
        for states in ({}, None):
            runtime = observing_runtime(model, states)
            logits.append(runtime.prefill(prompt, runtime.encode(heard.mels)).copy())
    np.testing.assert_array_equal(*logits)


def test_a_clip_is_the_sum_of_its_full_windows(built) -> None:
    with load(built("plain")[1], n_ctx=400) as model:
        mel = model.listen(synthetic(12.0, 16_000)).mels[0]
        assert mel.shape[1] == 3 * 400
        parts = [[mel], *([mel[:, n : n + 400]] for n in range(0, 1200, 400))]
        found = []
        for mels in parts:
            states: dict[str, torch.Tensor] = {}
            observing_runtime(model, states).encode(mels)
            found.append(energies(states))
    whole, *windows = found
    assert len(windows) == 3
    added = {name: (sum(w[name][0] for w in windows), sum(w[name][1] for w in windows)) for name in whole}
    assert_same(whole, added, 1e-5)
    assert whole["enc.blk.0.attn.q.weight"][1] == 150


def test_what_fills_a_tail_window_does_not_count(built) -> None:
    """Beside a longer window a tail is padded; beside itself it is not: blocks see the same number of rows."""
    with load(built("plain")[1], n_ctx=400) as model:
        mel = model.listen(synthetic(5.0, 16_000)).mels[0]
        counts = []
        for mels in ([mel], [mel[:, :400]], [mel[:, 400:]]):
            states: dict[str, torch.Tensor] = {}
            observing_runtime(model, states).encode(mels)
            counts.append({name: n for name, (_, n) in energies(states).items()})
    whole, full, tail = counts
    assert all(whole[name] == full[name] + tail[name] for name in whole)
    assert whole["enc.blk.0.attn.q.weight"] == 50 + 13
