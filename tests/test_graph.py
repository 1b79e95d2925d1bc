"""Graphs, rewrite rules, the memory plan and the executor, on graphs made up at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auricle.engine.backends import find_backend
from auricle.engine.backends.backend import Backend
from auricle.engine.executor import Program, compile_graph, draft_graph
from auricle.engine.graph import Graph, Value, cut, expand
from auricle.engine.plan import Span, find_memory, place, plan_memory, value_spans
from auricle.engine.rewrite import fuse_add_norms, fuse_gates, fuse_linears
from auricle.kernels.formats import F32
from op_cases import make_weight

REFERENCE = find_backend("reference")
RULES = [fuse_gates, fuse_linears, fuse_add_norms]


def run(graph: Graph, backend: Backend, capture: list[str], feed: dict, fed: tuple = ()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    weights = {v.name: make_weight(v.name, v.shape, F32, rng) for v in graph.leaves_of("weight")}
    program = compile_graph(graph, backend, weights.get, capture=capture, feed=fed, poison=True)
    return {name: value.numpy().copy() for name, value in program.run(feed).items()}


def block_graph() -> Graph:
    """A small decoder block without attention: all three fusions apply."""
    g = Graph()
    x = g.input("x", (3, 8))
    a, b, c = (g.linear(x, g.weight(name, (8, 8))) for name in "abc")
    s = g.stage("sum", g.add(g.mul(a, b), c))
    h = g.stage("norm", g.rms_norm(s, g.weight("n", (8,)), eps=1e-6))
    gate = g.stage("gate", g.linear(h, g.weight("gate", (16, 8))))
    up = g.linear(h, g.weight("up", (16, 8)))
    y = g.linear(g.mul(g.silu(gate), up), g.weight("down", (8, 16)))
    g.stage("out", g.add(s, y))
    return g


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("capture", [["out"], ["out", "gate"], ["sum", "norm", "out"]], ids="+".join)
def test_rules_keep_the_numbers(rule, capture: list[str]) -> None:
    graph = block_graph()
    x = np.random.default_rng(0).standard_normal((3, 8), dtype=np.float32)
    with_rule = Backend("ruled", REFERENCE.kernels, (rule,), "f32", 4, 8)
    want = run(graph, REFERENCE, capture, {"x": x})
    got = run(graph, with_rule, capture, {"x": x})
    for name in capture:
        np.testing.assert_array_equal(got[name], want[name])


def ops_after(rule, capture: list[str]) -> list[str]:
    return [node.op for node in rule(cut(block_graph(), capture), capture).nodes]


def test_rules_apply() -> None:
    assert ops_after(fuse_gates, ["out"]).count("gated_linear") == 1
    assert "silu" not in ops_after(fuse_gates, ["out"])
    assert ops_after(fuse_linears, ["out"]).count("linears") == 2
    assert ops_after(fuse_add_norms, ["out"]).count("add_rms_norm") == 1


def test_a_captured_stage_is_not_fused_away() -> None:
    assert "gated_linear" not in ops_after(fuse_gates, ["out", "gate"])


def test_expansion_removes_all_fused_ops() -> None:
    graph = block_graph()
    for rule in RULES:
        graph = rule(graph, ["out"])
    assert {"linears", "add_rms_norm"} <= {n.op for n in graph.nodes}
    plain = {n.op for n in expand(graph, known=()).nodes}
    assert plain == {"linear", "mul", "add", "rms_norm", "silu"}


def test_feeding_a_stage_cuts_its_producers_off() -> None:
    graph = cut(block_graph(), ["out"], ["norm"])
    assert {leaf.name for leaf in graph.leaves_of("input")} == {"x", "norm"}
    assert "rms_norm" not in {n.op for n in graph.nodes}
    graph = cut(block_graph(), ["gate"], ["norm"])
    assert {leaf.name for leaf in graph.leaves_of("input")} == {"norm"}


def test_a_fed_stage_gives_the_same_as_computing_it() -> None:
    x = np.random.default_rng(0).standard_normal((3, 8), dtype=np.float32)
    whole = run(block_graph(), REFERENCE, ["norm", "sum", "out"], {"x": x})
    feed = {"norm": whole["norm"], "sum": whole["sum"]}
    fed = run(block_graph(), REFERENCE, ["out"], feed, fed=("norm", "sum"))
    np.testing.assert_array_equal(fed["out"], whole["out"])


def test_unknown_names() -> None:
    with pytest.raises(AssertionError, match="no such stage"):
        cut(block_graph(), ["nothing"])
    with pytest.raises(AttributeError, match="no op 'matmul'"):
        Graph().matmul()


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    """Elementwise ops, views and linears over a growing pool of values of a few sizes."""
    g = Graph()
    pool: list[Value] = [g.input("x", (draw(st.integers(1, 4)), 12)), g.input("y", (2, 6))]
    for _ in range(draw(st.integers(1, 25))):
        a = draw(st.sampled_from(pool))
        op = draw(st.sampled_from(["silu", "add", "reshape", "linear", "linear", "norm", "gate"]))
        if op == "reshape":
            pool.append(g.reshape(a, shape=(a.size,) if len(a.shape) > 1 else (1, a.size)))
        elif op == "linear":
            n_out = draw(st.integers(1, 40))
            pool.append(g.linear(a, g.weight(f"w{a.shape[-1]}.{n_out}", (n_out, a.shape[-1]))))
        elif op == "norm":
            pool.append(g.rms_norm(a, g.weight(f"n{a.shape[-1]}", a.shape[-1:]), eps=1e-6))
        elif op == "gate":
            pool += [g.silu(a), g.linear(a, g.weight(f"sq{a.shape[-1]}", (a.shape[-1], a.shape[-1])))]
            pool.append(g.mul(pool[-2], pool[-1]))
        elif op == "add":
            pool.append(g.add(a, draw(st.sampled_from([b for b in pool if b.shape == a.shape]))))
        else:
            pool.append(g.silu(a))
    for i, value in enumerate(draw(st.lists(st.sampled_from(pool[2:]), min_size=1, max_size=3, unique_by=id))):
        g.stage(f"s{i}", value)
    return g


@settings(max_examples=150, deadline=None)
@given(random_graphs())
def test_values_that_live_together_never_share_bytes(graph: Graph) -> None:
    graph = cut(graph, list(graph.stages))
    outputs = list(graph.stages.values())
    plan = plan_memory(graph, outputs)
    spans = value_spans(graph, outputs, find_memory(graph))
    items = [(span, plan.offsets[value]) for value, span in spans.items()]
    for i, (a, a_at) in enumerate(items):
        assert a_at % 64 == 0
        assert a_at + a.nbytes <= plan.arena_bytes
        for b, b_at in items[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or a_at + a.nbytes <= b_at or b_at + b.nbytes <= a_at


@settings(max_examples=60, deadline=None)
@given(random_graphs())
def test_a_planned_run_equals_one_without_sharing(graph: Graph) -> None:
    """Each stage alone and all stages together give the same, though their plans differ."""
    rng = np.random.default_rng(3)
    names = list(graph.stages)
    feed = {v.name: rng.standard_normal(v.shape, dtype=np.float32) for v in graph.leaves_of("input")}

    def used(capture: list[str]) -> dict[str, np.ndarray]:
        needed = {v.name for v in cut(graph, capture).leaves_of("input")}
        return {name: array for name, array in feed.items() if name in needed}

    together = run(graph, REFERENCE, names, used(names))
    everything = {f"n{i}": node.outputs[0] for i, node in enumerate(graph.nodes)}
    graph.stages.update(everything)
    unshared = run(graph, REFERENCE, [*names, *everything], used([*names, *everything]))
    for name in names:
        np.testing.assert_array_equal(together[name], unshared[name])


def test_the_arena_is_as_large_as_its_highest_value() -> None:
    draft = draft_graph(block_graph(), REFERENCE, ["out"])
    rng = np.random.default_rng(0)
    program = Program(draft, lambda name: make_weight(name, SHAPES[name], F32, rng), {})
    assert program.arena.numel() == draft.plan.arena_bytes
    tensors = [t for t in program._bound.values() if isinstance(t, torch.Tensor)]
    base = program.arena.data_ptr()
    ends = [t.data_ptr() + t.numel() * t.element_size() - base for t in tensors]
    assert 0 <= draft.plan.arena_bytes - max(ends) < 64
    assert draft.plan.arena_bytes < sum(t.numel() * 4 for t in tensors), "nothing was shared"


SHAPES = {v.name: v.shape for v in block_graph().leaves_of("weight")}


@settings(max_examples=80, deadline=None)
@given(random_graphs(), st.permutations(RULES))
def test_rules_change_nothing_on_random_graphs(graph: Graph, rules: list) -> None:
    rng = np.random.default_rng(4)
    names = list(graph.stages)
    needed = {v.name for v in cut(graph, names).leaves_of("input")}
    feed = {
        v.name: rng.standard_normal(v.shape, dtype=np.float32) for v in graph.leaves_of("input") if v.name in needed
    }
    ruled = Backend("ruled", REFERENCE.kernels, tuple(rules), "f32", 4, 8)
    want, got = run(graph, REFERENCE, names, feed), run(graph, ruled, names, feed)
    for name in names:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_stage_that_is_fed_can_be_captured() -> None:
    norm = np.ones((3, 8), np.float32)
    for backend in (REFERENCE, find_backend("cpu")):
        np.testing.assert_array_equal(
            run(block_graph(), backend, ["norm"], {"norm": norm}, fed=("norm",))["norm"], norm
        )


def test_placing_disjoint_lifetimes_in_one_place() -> None:
    offsets, total = place([Span(100, 0, 1), Span(128, 2, 3), Span(64, 1, 2)])
    assert total == 192
    assert offsets[0] == offsets[1] == 0
    assert place([]) == ([], 0)


def test_scratch_is_planned_and_reused() -> None:
    g = Graph()
    x = g.input("x", (1, 16))
    g.stage("out", g.silu(g.silu(g.silu(x))))
    plan = plan_memory(g, [g.stages["out"]], scratch=lambda node: 256)
    assert len(plan.scratch) == 3
    assert plan.arena_bytes == 256 + 2 * 64
