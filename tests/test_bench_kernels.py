"""`benchmarks/kernels.py` where there is no GPU: what it measures, and that a kernel which differs gets no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from auricle.engine.models.moss_audio import decoder_graph, encoder_graph
from auricle.kernels.formats import Q4_K
from auricle.kernels.gpu.tune import Config
from auricle.tools.synth import PlannedFile
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import kernel_times
import kernel_tune
import roofline

IN_THE_INTERPRETER = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import kernel_times
from auricle.kernels.formats import BY_NAME
from auricle.kernels.gpu.tune import pick

errors = {{}}
for product in (
    kernel_times.Product("one", (24,), 256, residual=True),
    kernel_times.Product("best", (24,), 256, norm="rms", best=True),
    kernel_times.Product("three", (24, 8, 8), 256, norm="layer"),
    kernel_times.Product("gated", (24, 24), 256, gated=True, norm="rms"),
):
    stock = kernel_times.Stock(product, BY_NAME["Q4_K"], "cpu", at_least=10_000)
    for n_tokens in (2, 17):
        errors[f"{{product.name}} {{n_tokens}}"] = kernel_times.Job(stock, n_tokens, "cpu").error(pick)
    job = kernel_times.Job(stock, 1, "cpu")
    stock.rows[0][0, :2] = 0x3C  # the reference alone sees another scale
    errors[f"{{product.name}} of other weights"] = job.error(pick)
    job._launch = lambda *_: None
    errors[f"{{product.name}} unwritten"] = job.error(pick)
    assert len(stock.copies) == -(-10_000 // stock.n_bytes), len(stock.copies)
print(json.dumps(errors))
"""


def test_a_case_is_compared_before_it_is_timed() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name, error in json.loads(done.stdout.splitlines()[-1]).items():
        if "unwritten" in name:
            assert error == float("inf")
        else:
            tolerance = kernel_times.TOLERANCE if name.endswith("17") else kernel_times.BYTE_TOLERANCE
            assert (error > tolerance) == ("other weights" in name), f"{name}: {error}"


def test_a_red_case_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise AssertionError("a red case was timed")

    monkeypatch.setattr(kernel_times, "time_launches", fail)
    product = kernel_times.Product("p", (8,), 256)
    job = SimpleNamespace(
        stock=SimpleNamespace(product=product, format=Q4_K), n_tokens=1, tolerance=1e-2, error=lambda pick: 1.0
    )
    row = kernel_times.measure(job, SimpleNamespace(), lambda *_: Config(8, 512, 1, 4, 2))
    assert not row["green"]
    assert "us" not in row
    assert "red" in kernel_times.format_row(row)


@pytest.mark.parametrize("shape", ["4b", "8b"])
def test_all_matrices_of_a_model_are_there(shape: str) -> None:
    """Against the graphs: the shapes of the decoder's matrices, and of the encoder's layers."""
    config = roofline.read_moss_audio(PlannedFile(kernel_times.SHAPES[shape], "q4_k"))
    decoder = decoder_graph(config, 1, 1, head="all", with_audio=False).leaves_of("weight")
    encoder = encoder_graph(config, 1, 400, 50).leaves_of("weight")
    wanted = {v.shape for v in decoder if len(v.shape) == 2 and "embed" not in v.name}
    wanted |= {v.shape for v in encoder if len(v.shape) == 2 and v.name.startswith("enc.blk.")}
    assert {(n, p.n_cols) for p in kernel_times.list_products(shape) for n in p.rows} == wanted


def test_the_head_meets_few_tokens_and_the_encoder_many() -> None:
    products = {p.name: p for p in kernel_times.list_products("4b")}
    assert [kernel_times.occurs(products["4b.head"], n) for n in (1, 16, 64)] == [True, True, False]
    assert [kernel_times.occurs(products["4b.enc.fc1"], n) for n in (1, 16, 64)] == [False, False, True]
    assert all(kernel_times.occurs(products["4b.down"], n) for n in (1, 16, 64))


def test_tuning_goes_downhill_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the least of a bowl, whose configurations are each timed once."""
    timed: list[Config] = []

    def bowl(job: object, config: Config, seconds: float) -> float:
        timed.append(config)
        return 1 + abs(config.rows - 32) + abs(config.warps - 2) + abs(config.stages - 4)

    monkeypatch.setattr(kernel_tune, "time_config", bowl)
    best, seconds = kernel_tune.find_best(None, "matvec", Config(4, 256, 1, 8, 2), 0.1)
    assert (best.rows, best.warps, best.stages, best.cols, seconds) == (32, 2, 4, 256, 1)
    assert len(timed) == len(set(timed)) < 40


def neighbours_of(config: Config, kernel: str) -> Iterator[str]:
    for other in kernel_tune.neighbours(config, kernel):
        yield from (name for name in kernel_tune.LIMITS if getattr(other, name) != getattr(config, name))


def test_neighbours_keep_to_the_limits() -> None:
    least = Config(**{name: low for name, (low, _) in kernel_tune.LIMITS.items()})
    for other in kernel_tune.neighbours(least, "matmul"):
        for name, (low, high) in kernel_tune.LIMITS.items():
            assert low <= getattr(other, name) <= high
    assert set(neighbours_of(least, "matvec")) == set(kernel_tune.CHANGED["matvec"])
