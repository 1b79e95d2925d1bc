"""Programs that a device records: when, what of them, and that the results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.engine.backends import find_backend
from auricle.engine.backends.backend import Backend, Kernel
from auricle.engine.device import Device
from auricle.engine.executor import Draft, compile_graph
from auricle.engine.graph import Graph
from auricle.engine.sampling import Sampler
from auricle.tools.sample import write_checkpoint


class Recorder(Device):
    """Keeps how many calls each recording is of, and how often it was started."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.started: list[int] = []

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        number = len(self.recorded)
        self.recorded.append(len(call.args[0]))

        def start() -> None:
            self.started.append(number)
            call()

        return start


def recording_backend(device: Device, *fleeting: str) -> Backend:
    """The reference; only the ops `fleeting` allocate while they run, it says."""
    exact = find_backend("reference")
    kernels = {
        op: Kernel(kernel.bind, kernel.scratch, (lambda node: 8) if op in fleeting else (lambda node: 0))
        for op, kernel in exact.kernels.items()
    }
    return replace(exact, kernels=kernels, device=device)


def chain() -> Graph:
    """silu, gelu, mul, silu, add, gelu: six calls."""
    g = Graph()
    x = g.input("x", (2, 4))
    x = g.mul(g.gelu(g.silu(x)), x)
    g.stage("out", g.gelu(g.add(g.silu(x), x)))
    return g


def run_thrice(device: Device, *fleeting: str) -> list[np.ndarray]:
    program = compile_graph(chain(), recording_backend(device, *fleeting), {}.get, capture=["out"], poison=True)
    rng = np.random.default_rng(0)
    feeds = [rng.standard_normal((2, 4), dtype=np.float32) for _ in range(3)]
    return [program.run({"x": feed})["out"].numpy().copy() for feed in feeds]


def test_the_second_run_records_and_later_ones_start_what_was_recorded() -> None:
    device = Recorder()
    program = compile_graph(chain(), recording_backend(device), {}.get, capture=["out"])
    x = np.ones((2, 4), np.float32)
    for recorded, started in (([], []), ([6], [0]), ([6], [0, 0])):
        program.run({"x": x})
        assert (device.recorded, device.started) == (recorded, started)


def test_calls_that_allocate_stay_outside() -> None:
    device = Recorder()
    run_thrice(device, "mul")
    assert device.recorded == [2, 3]
    assert device.started == [0, 1, 0, 1]
    device = Recorder()
    run_thrice(device, "silu")  # what stands alone between two of them is not worth a recording
    assert device.recorded == [2, 2]


def test_results_are_those_of_plain_runs() -> None:
    for fleeting in ((), ("mul",), ("silu", "gelu", "mul", "add")):
        for got, want in zip(run_thrice(Recorder(), *fleeting), run_thrice(Device()), strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_program_that_runs_once_is_not_recorded() -> None:
    device = Recorder()
    program = compile_graph(chain(), recording_backend(device), {}.get, capture=["out"])
    program.run({"x": np.ones((2, 4), np.float32)})
    assert device.recorded == []


def test_steps_are_bound_before_the_first_token_is_known(tmp_path: Path) -> None:
    """So that what must be compiled for them is not in the midst of an answer."""
    write_checkpoint(tmp_path / "checkpoint")
    convert(plan_conversion(tmp_path / "checkpoint", "f32"), tmp_path / "model.gguf")
    happened: list[str] = []

    class Steps:
        def __init__(self, draft: Draft, *_: object) -> None:
            happened.append(f"bound {draft.capture[0]}")

        def run(self, token: int, position: int, n_steps: int, sampler: Sampler) -> Iterator[int]:
            happened.append("started")
            return iter([3] * n_steps)

    with load(tmp_path / "model.gguf", backend="cpu", n_ctx=200) as model:
        model.runtime.backend = replace(model.backend, bind_steps=Steps)
        for chosen in ({}, {"temperature": 0.7, "seed": 1}):
            list(model.stream("What?", max_new_tokens=3, **chosen))
        model.generate("What?", max_new_tokens=1, top_k=3, temperature=1.0)  # its one token needs no step
        pieces = iter(model.stream("What?", max_new_tokens=3))
        next(pieces, None)
    assert happened[:4] == ["bound token", "started", "bound logits", "started"]
    assert happened.count("bound token") == happened.count("bound logits") == 1
