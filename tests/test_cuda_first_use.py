"""What a machine may lack when the CUDA backend is first used: one line each, with what to do; PyTorch's and Triton's
pieces are put in the state in which they would be there."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from auricle.engine.backends import BackendError, find_backend, tell_left_alone
from auricle.tools.sample import SampleShape, write_checkpoint

pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton
import triton.runtime.build

from auricle.engine.backends import cuda_device, cuda_torch

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version.\nAlternatively, go to: https://pytorch.org to install a PyTorch version."
)


def fail(error: Exception) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a card on which all is well; tests take something away."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "Made-Up 9",
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (8 << 30, 10 << 30),
        "memory_reserved": lambda *_: 0,
    }
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=None)))
    tell_left_alone.cache_clear()
    return monkeypatch


class Building:
    """Triton's driver where nothing is in its cache: it builds its launcher."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def active(self) -> None:
        if hasattr(triton.runtime.build, "_find_compiler"):  # later than Triton 3.6, which does not keep what it found
            triton.runtime.build._find_compiler.cache_clear()
        source = self._folder / "launcher.c"
        source.write_text("#include <Python.h>\n")
        triton.runtime.build._build("launcher", str(source), str(self._folder), [], [], [], [])


def without_driver(machine: pytest.MonkeyPatch, reason: str) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(torch.cuda, "init", fail(RuntimeError(reason)))


def break_old_driver(machine: pytest.MonkeyPatch, folder: Path) -> None:
    without_driver(machine, TOO_OLD)


def break_no_driver(machine: pytest.MonkeyPatch, folder: Path) -> None:
    without_driver(machine, "Found no NVIDIA driver on your system.")


def break_old_card(machine: pytest.MonkeyPatch, folder: Path) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))


def break_full_card(machine: pytest.MonkeyPatch, folder: Path) -> None:
    machine.setattr(torch.cuda, "mem_get_info", fail(RuntimeError("CUDA error: out of memory\nCUDA kernel errors ...")))


def break_busy_card(machine: pytest.MonkeyPatch, folder: Path) -> None:
    reason = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be"
    machine.setattr(torch.cuda, "mem_get_info", fail(RuntimeError(reason)))


def break_no_compiler(machine: pytest.MonkeyPatch, folder: Path) -> None:
    machine.setenv("PATH", str(folder))
    machine.delenv("CC", raising=False)
    machine.setattr(triton.runtime, "driver", Building(folder))


def break_wrong_compiler(machine: pytest.MonkeyPatch, folder: Path) -> None:
    machine.setenv("CC", str(folder / "no-such-cc"))
    machine.setattr(triton.runtime, "driver", Building(folder))


def break_no_headers(machine: pytest.MonkeyPatch, folder: Path) -> None:
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("no C compiler here")
    paths = sysconfig.get_paths() | {"include": str(folder / "include")}
    machine.setattr(sysconfig, "get_paths", lambda *_, **__: paths)
    machine.delenv("C_INCLUDE_PATH", raising=False)
    machine.delenv("CPATH", raising=False)
    machine.setattr(triton.runtime, "driver", Building(folder))


def break_no_libcuda(machine: pytest.MonkeyPatch, folder: Path) -> None:
    class Driver:
        active = property(fail(AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up")))

    machine.setattr(triton.runtime, "driver", Driver())


BROKEN = [
    (break_old_driver, r"driver is too old \(it knows CUDA 11\.4\) for PyTorch .* CUDA 12\.8; update the driver"),
    (break_no_driver, "no CUDA device here; look at nvidia-smi"),
    (break_old_card, r"Made-Up 9 has compute capability 7\.5; the CUDA backend needs 8\.0"),
    (break_full_card, "Made-Up 9 has no memory left to begin with; end one of the processes"),
    (break_busy_card, "Made-Up 9 serves another process alone"),
    (break_no_compiler, "no C compiler.*install gcc"),
    (break_wrong_compiler, "no C compiler.*name one in CC"),
    (break_no_headers, r"no .*/include/Python\.h; install python3\.\d+-dev"),
    (break_no_libcuda, r"does not find libcuda\.so\.1.*run ldconfig"),
]


@pytest.mark.parametrize(("broken", "line"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_missing_is_said_with_the_remedy(
    machine: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    broken: Callable,
    line: str,
) -> None:
    broken(machine, tmp_path)
    with pytest.raises(BackendError, match=line) as caught:
        find_backend("cuda")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("use --backend cpu")
    machine.setattr(cuda_device, "SIGNS", (str(tmp_path),))  # there is a card, whatever PyTorch makes of it
    with caplog.at_level(logging.WARNING, "auricle"):
        assert find_backend("auto").name == find_backend("auto").name == "cpu"
    (record,) = caplog.records
    assert record.getMessage().startswith("the GPU is left alone and the processor computes: ")
    assert record.getMessage()[-30:] not in message[-20:]
    assert capfd.readouterr().err == ""  # not a word of a compiler's either


def test_nothing_is_said_where_there_is_no_card(
    machine: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_no_driver(machine, tmp_path)
    machine.setattr(cuda_device, "SIGNS", (str(tmp_path / "absent"),))
    assert find_backend("auto").name == "cpu"
    machine.setattr(cuda_device, "SIGNS", (str(tmp_path),))
    machine.setenv("CUDA_VISIBLE_DEVICES", "")  # it was hidden on purpose
    assert find_backend("auto").name == "cpu"
    assert not caplog.records


def test_a_healthy_machine_passes(machine: pytest.MonkeyPatch) -> None:
    cuda_device.check_cuda()


# Memory that ends.


def card_of(machine: pytest.MonkeyPatch) -> cuda_device.Card:
    machine.setattr(torch.cuda, "get_device_name", lambda *_: "Made-Up 9")
    machine.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=1))
    return cuda_device.Card()


OUT = "CUDA out of memory. Tried to allocate 3.00 GiB.\nSee documentation for Memory Management"


@pytest.mark.parametrize(("others", "said"), [(4 << 30, r"and 3\.61 other processes have"), (0, "are free; see")])
def test_memory_that_does_not_suffice(machine: pytest.MonkeyPatch, others: int, said: str) -> None:
    card = card_of(machine)
    machine.setattr(torch.cuda, "mem_get_info", lambda *_: ((10 << 30) - others, 10 << 30))
    machine.setattr(torch, "empty", fail(torch.OutOfMemoryError(OUT)))
    with pytest.raises(BackendError, match=said) as caught:
        card.empty(3 << 30)
    assert str(caught.value).startswith("no room for 3.00 GiB more: of 10.00 GiB on Made-Up 9, ")
    assert "--memory" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match="no room for 16 MiB of this machine's memory for copies"):
        card.pinned(16 << 20)


def test_memory_that_ends_within_an_op(machine: pytest.MonkeyPatch) -> None:
    node = SimpleNamespace(op="argmax")
    machine.setattr(cuda_torch, "argmax", fail(torch.OutOfMemoryError(OUT)))
    call = cuda_torch.KERNELS["argmax"].bind(node, (torch.zeros(1, 3),), (torch.zeros(1),), None)
    with pytest.raises(BackendError, match="no room for the work space of argmax"):
        call()
    machine.setattr(torch.cuda, "mem_get_info", fail(RuntimeError("CUDA error: out of memory")))
    with pytest.raises(BackendError, match="Made-Up 9 has none left"):
        call()


def test_other_errors_stay_what_they_are(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="illegal address") as caught, cuda_device.memory_told("anything"):
        raise RuntimeError("an illegal address")
    assert not isinstance(caught.value, BackendError)


# Through the program.


PROGRAM = f"""
import sys, torch
torch.version.cuda = "12.8"
torch.cuda.is_available = lambda: False
def init():
    raise RuntimeError({TOO_OLD!r})
torch.cuda.init = init
from auricle.engine.backends import cuda_device
cuda_device.SIGNS = ("/",)
from auricle.tools.cli.main import run
run()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from auricle.convert.hf import convert, plan_conversion

    folder = tmp_path_factory.mktemp("model")
    convert(plan_conversion(write_checkpoint(folder / "checkpoint", SampleShape()), "f16"), folder / "m.gguf")
    return folder / "m.gguf"


def plan_with(model: Path, backend: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "plan", "-m", str(model), "--audio", "3", "--backend", backend]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_program_ends_with_one_line_and_a_status(model: Path) -> None:
    done = plan_with(model, "cuda")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("auricle: the NVIDIA driver is too old")
    assert done.stderr.count("\n") == 1


def test_the_program_goes_on_without_the_card_and_says_so(model: Path) -> None:
    done = plan_with(model, "auto")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "GPU" in line]
    assert len(lines) == 1
    assert "the GPU is left alone and the processor computes: the NVIDIA driver is too old" in lines[0]
