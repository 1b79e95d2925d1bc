"""Every case of the op table on every backend, in an arena full of NaN, against the reference; the reference against
definitions written out in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from auricle.engine.backends import BackendError, find_backend
from auricle.engine.executor import compile_graph
from auricle.engine.graph import Graph
from auricle.engine.kv_cache import CacheTensor
from auricle.kernels.formats import BF16, F16, F32, Q4_K, Q5_K, Q6_K, Q8_0, Format
from op_cases import CASES, PADDED, Case, materials

FAST = ["cpu", "cpu exact"]
ROUNDED = {Q4_K, Q5_K, Q6_K, Q8_0}  # types that meet activations in int8, 256 weights at a time


def run_case(case: Case, backend: str, fmt: Format = F32, kv_format: Format = F32) -> dict[str, np.ndarray]:
    m = materials(case, fmt, kv_format)
    graph = case.graph()
    capture = [name for name in graph.stages if name.startswith("out.")]
    chosen = find_backend(*backend.split())
    program = compile_graph(graph, chosen, m.weights.get, capture=capture, states=m.states, poison=True)
    return {name: value.numpy().copy() for name, value in program.run(m.feed).items()}


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert np.isfinite(got[name]).all(), f"{name} has values that were never written"
        error = np.linalg.norm(got[name] - expected) / np.linalg.norm(expected)
        assert error <= tolerance, f"{name}: {error=}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backend_agrees_with_reference(case: Case, backend: str) -> None:
    assert_close(run_case(case, backend), run_case(case, "reference"), 2e-6)


LINEAR_CASES = [c for c in CASES if "linear" in c.name or "rows" in c.name]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("fmt", [F16, BF16, Q8_0], ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_weight_types(case: Case, fmt: Format, backend: str) -> None:
    rounded = backend == "cpu" and any(
        w.format in ROUNDED and w.shape[-1] % 256 == 0 for w in materials(case, fmt).weights.values()
    )
    tolerance = 1.2e-2 if rounded and "rows" not in case.name else 2e-6
    assert_close(run_case(case, backend, fmt), run_case(case, "reference", fmt), tolerance)


@pytest.mark.parametrize("fmt", [Q4_K, Q5_K, Q6_K, Q8_0], ids=str)
@pytest.mark.parametrize("case", [c for c in LINEAR_CASES if c.fills(256)], ids=str)
def test_rounded_activations(case: Case, fmt: Format) -> None:
    """A scale for each 32 activations costs about half a percent of a product, and the gate of a pair twice that."""
    assert_close(run_case(case, "cpu", fmt), run_case(case, "reference", fmt), 1.2e-2)
    assert_close(run_case(case, "cpu exact", fmt), run_case(case, "reference", fmt), 2e-6)


@pytest.mark.parametrize("fmt", [F32, F16, Q4_K], ids=str)
@pytest.mark.parametrize("case", [c for c in LINEAR_CASES if c.fills(256)], ids=str)
def test_bfloat16(case: Case, fmt: Format) -> None:
    assert_close(run_case(case, "cpu bf16", fmt), run_case(case, "reference", fmt), 1e-2)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize(("kv_format", "tolerance"), [(F16, 1e-3), (Q8_0, 2e-2)], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("kv_attention")], ids=str)
def test_cache_types(case: Case, kv_format: Format, tolerance: float, backend: str) -> None:
    (cache, *_) = case.graph().leaves_of("state")
    if cache.shape[-1] % kv_format.length:
        pytest.skip(f"rows of {cache.shape[-1]} do not fill blocks of {kv_format}")
    exact = run_case(case, "reference")
    stored = run_case(case, backend, kv_format=kv_format)
    assert_close(stored, exact, tolerance)
    assert_close(stored, run_case(case, "reference", kv_format=kv_format), 2e-6)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("kv_format", [F32, F16, Q8_0], ids=str)
@pytest.mark.parametrize("case", PADDED, ids=str)
def test_padding_changes_no_slot_and_gets_zeros(case: Case, kv_format: Format, backend: str) -> None:
    m = materials(case, F32, kv_format)
    positions = m.feed["p"]
    caches = {name: state.data.view(torch.uint8) for name, state in m.states.items()}
    n = case.filled + int((positions >= 0).sum())
    for data in caches.values():
        data[case.filled :] = 0xFF  # NaN in any type
    before = {name: data.clone() for name, data in caches.items()}
    m.feed["k"][positions < 0] = np.nan
    chosen = find_backend(*backend.split())
    program = compile_graph(case.graph(), chosen, {}.get, capture=["out.0"], states=m.states, poison=True)
    out = program.run(m.feed)["out.0"].numpy()
    assert np.isfinite(out).all()
    assert (out[positions < 0] == 0).all()
    assert (np.abs(out[positions >= 0]).sum((1, 2)) > 0).all()
    for name, data in caches.items():
        assert torch.equal(data[n:], before[name][n:])
        assert torch.equal(data[: case.filled], before[name][: case.filled])
        assert not torch.equal(data[case.filled : n], before[name][case.filled : n])


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_one_token_that_pads_is_not_stored(backend: str) -> None:
    g, cache = Graph(), CacheTensor((4, 2, 32), F16)
    rows, positions = g.input("x", (1, 2, 32)), g.input("p", (1,), "i32")
    caches = [g.kv_store(g.state(name, cache.shape), rows, positions) for name in "kv"]
    g.stage("out", g.kv_attention(rows, *caches, positions))
    cache.data.fill_(7)
    chosen, states = find_backend(*backend.split()), dict.fromkeys("kv", cache)
    program = compile_graph(g, chosen, {}.get, capture=["out"], states=states)
    out = program.run({"x": np.ones((1, 2, 32), np.float32), "p": np.array([-1], np.int32)})["out"]
    assert (cache.data == 7).all()
    assert (out == 0).all()


def reference_result(case_name: str) -> tuple[np.ndarray, dict[str, np.ndarray], dict]:
    (case,) = (c for c in CASES if c.name == case_name)
    m = materials(case)
    weights = {name: w.decode().numpy().astype(np.float64) for name, w in m.weights.items()}
    return run_case(case, "reference")["out.0"], m.feed | weights, m.states


def test_reference_rope() -> None:
    got, v, _ = reference_result("rope-5x3x128-at-40000")
    angles = v["p"][:, None] * 1e6 ** (-np.arange(64) / 64)
    turn = np.exp(1j * angles)[:, None]  # a rotation of the plane (element i, element i + 64)
    turned = (v["x"][..., :64] + 1j * v["x"][..., 64:]) * turn
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=0.02)
    first, v, _ = reference_result("rope-1x1x8-at-0")
    np.testing.assert_array_equal(first, v["x"])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_reference_window_attention() -> None:
    got, v, _ = reference_result("window_attention-3x7x2x16")
    for w, length in enumerate(v["n"]):
        for h in range(2):
            q, k, val = (v[name][w, :, h].astype(np.float64) for name in "qkv")
            want = softmax(q @ k[:length].T / 4.0) @ val[:length]
            np.testing.assert_allclose(got[w, :, h], want, atol=1e-6)


def test_reference_kv_attention() -> None:
    got, v, states = reference_result("kv_attention-9x16of2x32-after-23")
    past = {part: states[f"{part}.cache"].read(23).numpy() for part in "kv"}
    k, val = (np.concatenate([past[p], v[p]]).astype(np.float64) for p in "kv")
    for t in range(9):
        for h in range(16):
            seen = slice(0, 23 + t + 1)
            want = softmax(k[seen, h // 8] @ v["q"][t, h] / np.sqrt(32)) @ val[seen, h // 8]
            np.testing.assert_allclose(got[t, h], want, atol=1e-6)


def test_reference_norms_and_gelu() -> None:
    from math import erf

    got, v, _ = reference_result("rms_norm-5x33")
    x = v["x"].astype(np.float64)
    np.testing.assert_allclose(got, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * v["w"], atol=1e-6)
    got, v, _ = reference_result("layer_norm-5x33")
    x = v["x"].astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, x * v["w"] + v["b"], atol=1e-6)
    got, v, _ = reference_result("gelu-1x17")
    np.testing.assert_allclose(got, v["a"] * (1 + np.vectorize(erf)(v["a"] / np.sqrt(2))) / 2, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu exact", "reference"])
def test_a_k_quant_runs(backend: str) -> None:
    g = Graph()
    g.stage("out", g.linear(g.input("x", (3, 512)), g.weight("w", (5, 512))))
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (5, 2), np.uint8)[..., None].repeat(Q4_K.block_bytes, -1).reshape(5, -1)
    blocks = blocks.reshape(10, -1).copy()
    blocks[:, :4] = np.array([0.01, 0.02], "<f2").view(np.uint8)
    from auricle.engine.weights import Weight

    weight = Weight("w", Q4_K, (5, 512), blocks.reshape(5, -1))
    x = rng.standard_normal((3, 512), dtype=np.float32)
    program = compile_graph(g, find_backend(*backend.split()), lambda name: weight, capture=["out"], poison=True)
    want = torch.from_numpy(x).double() @ weight.decode().double().T
    np.testing.assert_allclose(program.run({"x": x})["out"].numpy(), want.numpy(), rtol=1e-4, atol=1e-4)


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="no backend 'tpu'; there are: auto, cpu, cuda, reference"):
        find_backend("tpu")
    with pytest.raises(BackendError, match="--precision is 'int4'; it must be one of: auto, exact, bf16"):
        find_backend("cpu", "int4")
    with pytest.raises(BackendError, match="--precision bf16 is not for the reference backend"):
        find_backend("reference", "bf16")
