"""Launches that are bound once: compiled here, for a card that a stand-in driver claims to have, and started on it.

Nothing runs on a card: the stand-in keeps what Triton's launcher would have been called with. That interpreted programs
of bound launches give the right numbers is what `test_cuda_backend.py` looks at.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="GPU kernels are written in Triton, which is there for Linux on x86-64 only"
)

from auricle.kernels.gpu import norms, rope, rows  # noqa: E402
from auricle.kernels.gpu.launch import Launch, launch, record, together  # noqa: E402
from stand_in import StandInDriver  # noqa: E402


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDriver]:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with StandInDriver(arch=90) as driver:
        yield driver


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_bound_launch_asks_for_its_variant_once(driver: StandInDriver) -> None:
    x, weight, out = random(3, 64), random(64), random(3, 64)
    start = record(norms.rms_norm, x, weight, 1e-6, out)
    assert driver.asked == 1
    assert driver.started == []
    for _ in range(5):
        start()
    assert driver.asked == 1
    assert len(driver.started) == 5
    assert driver.loaded == 1


def test_the_launcher_gets_what_triton_itself_would_give_it(driver: StandInDriver) -> None:
    x, weight, out, total = random(40, 64), random(64), random(40, 64), random(40, 64)
    for function, arguments in (
        (norms.rms_norm, (x, weight, 1e-6, out)),  # two pointers are None
        (norms.add_rms_norm, (x, out, weight, 1e-6, total, out)),
        (rows.gelu, (x, out)),  # a function is an argument
    ):
        function(*arguments)
        record(function, *arguments)()
        plain, bound = driver.started[-2:]
        assert plain.kernel is bound.kernel
        assert plain.grid == bound.grid
        assert plain.stream == bound.stream
        assert bound.values == tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in plain.values)


def test_the_variant_follows_alignment_and_ones(driver: StandInDriver) -> None:
    memory, n = torch.zeros(4096), 1024
    kinds = {
        "aligned": (memory[:n], n),
        "shifted": (memory[1 : n + 1], n),
        "odd": (memory[: n - 1], n - 1),
        "one": (memory[:1], 1),
    }
    launches = {name: record(rows.gelu, x, x) for name, (x, _) in kinds.items()}
    again = record(rows.gelu, memory[n : 2 * n], memory[2 * n : 3 * n])
    kernels = {name: start._compiled for name, start in launches.items()}
    assert kernels["aligned"] is again._compiled
    assert kernels["aligned"] is not kernels["shifted"]
    for start in (*launches.values(), again):
        start()
    assert [s.values[0] % 16 for s in driver.started] == [0, 4, 0, 0, 0]


def test_several_launches_start_in_their_order(driver: StandInDriver) -> None:
    x, weight, out = random(8, 64), random(64), random(8, 64)

    def both() -> None:
        norms.rms_norm(x, weight, 1e-6, out)
        rows.gelu(out, x)

    record(both)()
    assert [s.name for s in driver.started] == ["_rms_norm", "_map"]


def test_arguments_live_as_long_as_the_launch(driver: StandInDriver) -> None:
    x = random(4, 64)
    storage = weakref.ref(x)
    start = record(rows.gelu, x, x)
    del x
    gc.collect()
    assert storage() is not None
    del start
    gc.collect()
    assert storage() is None


def test_the_stream_is_the_current_one(driver: StandInDriver) -> None:
    x = random(4, 64)
    start = record(rows.gelu, x, x)
    for stream in (7, 11):
        driver.stream = stream
        start()
    assert [s.stream for s in driver.started] == [7, 11]


def test_a_recording_that_fails_leaves_nothing_behind(driver: StandInDriver) -> None:
    def fail() -> None:
        launch(None, (1,))

    with pytest.raises(TypeError):
        record(fail)
    x = random(4, 64)
    rows.gelu(x, x)
    assert len(driver.started) == 1
    with pytest.raises(AssertionError, match="one recording"):
        record(lambda: record(rows.gelu, x, x))


def test_frequencies_are_no_part_of_a_variant(driver: StandInDriver) -> None:
    x, out, positions = random(3, 4, 32), random(3, 4, 32), torch.arange(3, dtype=torch.int32)
    a, b = (record(rope.rope, x, rope.rope_frequencies(32, theta), positions, out) for theta in (1e4, 1e6))
    assert isinstance(a, Launch)
    assert a._compiled is b._compiled


def test_kernels_that_are_bound_together_are_compiled_together(driver: StandInDriver) -> None:
    x, out, seen = random(4, 64), random(4, 64), []
    with together(lambda done, total: seen.append((done, total)), seconds=0.01):
        starts = [record(function, x, out) for function in (rows.gelu, rows.silu, rows.gelu)]
        assert not driver.started
    assert seen[-1] == (2, 2)
    for start in starts:
        start()
    assert [s.grid for s in driver.started] == [(1, 1, 1)] * 3
    assert driver.started[0].kernel is driver.started[1].kernel  # one function, of which there are two variants
    assert len(driver.variants["_map"]) == 2
    seen.clear()
    with together(lambda done, total: seen.append((done, total))):
        record(rows.gelu, x, out)
    assert seen == []
