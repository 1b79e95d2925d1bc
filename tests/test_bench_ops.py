"""`benchmarks/ops.py`: its document, that a case which differs gets no time, and what it counts as work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from auricle.engine.backends import find_backend
from auricle.engine.backends.backend import Backend, Kernel
from auricle.engine.executor import draft_graph
from auricle.kernels.formats import F16, F32, Q4_K, Q8_0
from op_cases import CASES, MODEL_CASES, Case, materials, tolerance
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import op_work
import ops

SMALL = [c for c in CASES if c.name in ("linear-1x256x300", "rms_norm-5x33", "kv_attention-1x8of2x32-after-40")]


@pytest.fixture
def run_ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark on few small cases, without compiled kernels; gives its document."""
    monkeypatch.setattr(ops, "MODEL_CASES", SMALL)
    monkeypatch.setattr(ops, "last_level_cache", lambda: 100_000)
    monkeypatch.setattr(ops, "Yardsticks", lambda: op_work.Yardsticks(1 << 20, 64))
    monkeypatch.setattr(ops, "describe_machine", lambda: {"cpu": "some"})

    def run(*arguments: str) -> dict[str, Any]:
        ops.main([*arguments, "--precision", "exact", "--threads", "1", "--seconds", "0.01", "--patience", "0"])
        *table, last = capsys.readouterr().out.splitlines()
        document = json.loads(last)
        assert len([line for line in table if line.startswith("| ")]) == len(document["cases"]) + 2
        return document

    return run


def test_the_document(run_ops: Callable[..., dict[str, Any]]) -> None:
    document = run_ops("--types", "Q4_K", "F16")
    rows = {(row["case"].partition("-")[0], row["type"]): row for row in document["cases"]}
    attention = [("kv_attention", "F16"), ("kv_attention", "Q8_0")]
    assert sorted(rows) == sorted([("linear", "Q4_K"), ("linear", "F16"), ("rms_norm", "F32"), *attention])
    for row in rows.values():
        assert row["green"]
        assert 0 <= row["error"] <= row["tolerance"] == 2e-6
        assert 1e-7 < row["seconds"] < 1
        assert row["per_s"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["copies"] * row["bytes"] >= 4 * 100_000 or row["bound"] == "cache"
    linear = rows["linear", "Q4_K"]
    assert (linear["bound"], linear["bytes"], linear["flops"]) == ("memory", 300 * 144, 2 * 256 * 300)
    assert linear["shares"]["read"] > 0
    assert rows["kv_attention", "Q8_0"]["bytes"] == 41 * 2 * 2 * 34  # slots, keys and values, heads, bytes a head
    assert document["machine"] == {"cpu": "some"}


def test_a_red_case_gets_no_time(
    run_ops: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bind_wrong(node: Any, inputs: Any, outputs: Any, scratch: Any) -> Callable[[], None]:
        return lambda: outputs[0].fill_(1.0)

    def find(name: str, precision: str | None = None) -> Backend:
        backend = find_backend(name, precision)
        wrong = {} if name == "reference" else {"linear": Kernel(bind_wrong)}
        return replace(backend, kernels={**backend.kernels, **wrong})

    monkeypatch.setattr(ops, "find_backend", find)
    linear, norm = run_ops("--types", "Q4_K", "--only", "linear|norm")["cases"]
    assert not linear["green"]
    assert linear["error"] > linear["tolerance"]
    assert linear.keys() == {"case", "type", "green", "error", "tolerance"}
    assert norm["green"]
    assert norm["seconds"] > 0


def test_an_unwritten_result_is_an_infinite_error() -> None:
    want = {"out.0": np.ones(3, np.float32)}
    assert ops.largest_error({"out.0": np.array([1, np.nan, 1], np.float32)}, want) == float("inf")
    assert ops.largest_error({"out.0": np.array([1, 1, 2], np.float32)}, want) == pytest.approx(3**-0.5)


def test_weights_are_read_only_copies_of_one_draw() -> None:
    stock = ops.Stock({"w": (8, 256), "b": (8,)}, Q4_K, 4096)
    assert stock.n == -(-4096 // (8 * 144 + 8 * 4))
    first, last = stock.copies[0]["w"], stock.copies[-1]["w"]
    assert not first.data.flags.writeable
    assert not np.shares_memory(first.data, last.data)
    np.testing.assert_array_equal(first.data, last.data)
    np.testing.assert_array_equal(first.decode(), stock.decoded["w"].decode())
    assert stock.copies[0]["b"].format is F32


def flops_of(name: str) -> tuple[str, int]:
    (case,) = (c for c in MODEL_CASES if c.name == name)
    n_slots = case.filled + max((len(ints) for ints in case.ints.values()), default=0)
    work = op_work.count_work(case.graph(), {}, {}, n_slots)
    return work.bound, work.flops


def test_work_is_counted() -> None:
    assert flops_of("4b.gate_up gated_linear-8x2560x9728") == ("memory", 8 * 2 * 2 * 2560 * 9728)
    assert flops_of("4b.down linear-64x9728x2560") == ("compute", 64 * 2 * 2560 * 9728)
    assert flops_of("enc.stem conv2d-1x480x64x200-480") == ("compute", 2 * 480 * 32 * 100 * 480 * 9)
    assert flops_of("enc window_attention-4x50x20x64") == ("compute", 4 * 20 * 2 * 2 * 50 * 50 * 64)
    assert flops_of("llm kv_attention-1x32of8x128-after-200") == ("memory", 32 * 2 * 2 * 201 * 128)
    pairs = sum(range(1, 257))  # of a token and a slot it sees
    assert flops_of("llm kv_attention-256x32of8x128-after-0") == ("compute", 32 * 2 * 2 * pairs * 128)
    assert flops_of("4b.norm rms_norm-1x2560") == ("cache", 0)


def test_model_cases_can_be_planned() -> None:
    """They are run by the benchmark only; their names are all different, and every backend has kernels for them."""
    assert len({case.name for case in MODEL_CASES}) == len(MODEL_CASES)
    for case in MODEL_CASES:
        graph = case.graph()
        draft_graph(graph, find_backend("cpu", "exact"), list(graph.stages))


def test_tolerances() -> None:
    def allowed(case: Case, fmt: Any) -> float:
        return tolerance(case, materials(case, fmt).weights, {"Q8_0"})

    linear, narrow = (next(c for c in CASES if c.name == name) for name in ("linear-1x256x300", "linear-1x32x1"))
    assert allowed(linear, Q8_0) == 1.2e-2
    assert [allowed(linear, F16), allowed(narrow, Q8_0)] == [2e-6, 2e-6]
