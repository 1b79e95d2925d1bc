"""The seam to CUDA: all that only a GPU can do, through PyTorch. Tests put a plain CPU stand-in in its place.

Knows no op, no weight and no graph.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from . import BackendError

Tensor = torch.Tensor
LEAST_CAPABILITY = (8, 0)
CONTEXT_BYTES = 400 << 20  # about what CUDA itself and the compiled kernels take, beside what PyTorch counts
OTHERS = 200 << 20  # bytes that other processes have, below which they are not worth a word
REMEDY = "see `auricle plan`, and say with --memory how much may be used"
SIGNS = ("/dev/nvidia0", "/proc/driver/nvidia/version")  # of a card of NVIDIA's, and of its driver
RECORDING = threading.Lock()
WARM_UPS = 1  # runs of a call before it is recorded: kernels are brought to the card in the first


class Event(Protocol):
    """A mark in the order of work: `synchronize` waits until all work before the last `record` is done."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Card:
    """One GPU. Work is queued in one order; nothing here waits unless it says so."""

    def __init__(self, number: int = 0) -> None:
        """Raises BackendError, one line, when this process cannot compute there."""
        check_cuda(number)
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as ever; Triton 3.9 wants it said
        self.target = torch.device("cuda", number)
        self.name = torch.cuda.get_device_name(number)
        self.capability = torch.cuda.get_device_capability(number)
        self.processors = torch.cuda.get_device_properties(number).multi_processor_count

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the card. Raises BackendError when there is not as much."""
        with memory_told(f"{nbytes / 2**30:.2f} GiB more"):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.target)

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of this machine's memory that the card can read and write by itself."""
        with memory_told(f"{nbytes / 2**20:.0f} MiB of this machine's memory for copies"):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        return torch.cuda.Event()

    def capture(self, call: Callable[[], None], warm_ups: int = WARM_UPS) -> Callable[[], None]:
        """Records the kernels that `call` starts; gives what starts them all at once. `call` runs so many times before.

        One thread records at a time, and what others do meanwhile does not disturb it.
        """
        with RECORDING, memory_told("the recording of a step"):
            aside = torch.cuda.Stream(self.target)
            aside.wait_stream(torch.cuda.current_stream(self.target))
            with torch.cuda.stream(aside):
                for _ in range(warm_ups):
                    call()
            torch.cuda.current_stream(self.target).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
        return graph.replay

    def release(self) -> None:
        """Hands memory that PyTorch keeps for later back to the card."""
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.target)[0]

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.target)[1]

    def peak_bytes(self) -> int:
        """The most that was allocated at a time so far, as PyTorch counts."""
        return torch.cuda.max_memory_allocated(self.target)


# What a user's machine may lack.


def check_cuda(number: int = 0) -> None:
    """Raises BackendError, one line with the remedy, when the CUDA backend cannot run in this process."""
    if torch.version.cuda is None:
        raise BackendError(
            f"PyTorch {torch.__version__} is built without CUDA; install one that has it, or use --backend cpu"
        )
    if not is_available():
        raise BackendError(f"{why_unavailable()}, or use --backend cpu")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise BackendError("the CUDA backend needs triton; pip install triton, or use --backend cpu") from None
    name, capability = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
    if capability < LEAST_CAPABILITY:
        raise BackendError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; the CUDA backend needs 8.0 (Ampere) or "
            "later; use --backend cpu"
        )
    try:
        torch.cuda.mem_get_info(number)  # begins to work there
    except RuntimeError as error:
        raise BackendError(f"{why_busy(name, str(error))}, or use --backend cpu") from error
    check_launcher()


def is_available() -> bool:
    """Whether PyTorch finds a card; what it says beside that is asked for by `why_unavailable`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def machine_has_card() -> bool:
    """Whether there is a card of NVIDIA's that nobody hid from this process, whatever PyTorch makes of it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return is_available() or any(Path(sign).exists() for sign in SIGNS)


def why_unavailable() -> str:
    """Why PyTorch finds no card, and what to do."""
    try:
        torch.cuda.init()
        reason = ""
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    if "too old" in reason:
        version = re.search(r"found version (\d+)", reason)
        has = f" (it knows CUDA {int(version[1]) // 1000}.{int(version[1]) % 1000 // 10})" if version else ""
        return (
            f"the NVIDIA driver is too old{has} for PyTorch {torch.__version__}, which is built for CUDA "
            f"{torch.version.cuda}; update the driver, or install a PyTorch for an older CUDA"
        )
    return "PyTorch finds no CUDA device here; look at nvidia-smi and its driver"


def why_busy(name: str, reason: str) -> str:
    """Why work cannot begin on a card that is there, and what to do."""
    if "out of memory" in reason:
        return f"{name} has no memory left to begin with; end one of the processes that nvidia-smi lists"
    if "busy or unavailable" in reason:
        return (
            f"{name} serves another process alone; end it, or set the card's compute mode to default (nvidia-smi -c 0)"
        )
    return f"{name} cannot be used ({reason.strip().splitlines()[0]}); look at nvidia-smi and its driver"


def check_launcher() -> None:
    """Triton starts kernels through a C module that it compiles once on a machine. Raises BackendError if it cannot."""
    from triton.runtime import driver

    failures = (RuntimeError, ImportError, OSError, AssertionError, subprocess.CalledProcessError)
    try:
        with quiet_compiler():
            driver.active.utils  # noqa: B018  (made when it is asked for)
    except failures as error:
        raise BackendError(f"{why_no_launcher(error)}, or use --backend cpu") from error


def why_no_launcher(error: Exception) -> str:
    """Why Triton cannot start kernels, and what to do."""
    if "Failed to find C compiler" in str(error) or isinstance(error, FileNotFoundError):
        return "Triton finds no C compiler, with which it makes its launcher; install gcc, or name one in CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        version = ".".join(map(str, sys.version_info[:2]))
        return f"Triton's launcher needs Python's headers, and there is no {header}; install python{version}-dev"
    if "libcuda" in str(error):
        return "Triton does not find libcuda.so.1, a part of the driver; run ldconfig, or set TRITON_LIBCUDA_PATH"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"Triton cannot make its launcher ({reason}); look at the C compiler and the driver"


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keeps what a compiler prints to stderr for itself: the error says what it is about."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextmanager
def memory_told(what: str) -> Iterator[None]:
    """Turns the end of a card's memory into a BackendError that says how it is and what to do."""
    try:
        yield
    except RuntimeError as error:  # PyTorch's OutOfMemoryError is one, and so are CUDA's and Triton's own
        if "out of memory" not in str(error):
            raise
        raise BackendError(f"no room for {what}: {describe_memory()}; {REMEDY}") from error


def describe_memory() -> str:
    """How much of the current card is free, and who has the rest."""
    name = torch.cuda.get_device_name()
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # after some failures CUDA answers nothing any more
        return f"{name} has none left"
    others = total - free - torch.cuda.memory_reserved() - CONTEXT_BYTES
    text = f"of {total / 2**30:.2f} GiB on {name}, {free / 2**30:.2f} are free"
    return text + (f" and {others / 2**30:.2f} other processes have (nvidia-smi lists them)" if others > OTHERS else "")
