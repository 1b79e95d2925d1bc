"""The seam to CUDA: all that only a GPU can do, through PyTorch. Tests put a plain CPU stand-in in its place.

Knows no op, no weight and no graph.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from . import BackendError

Tensor = torch.Tensor
LEAST_CAPABILITY = (8, 0)
CONTEXT_BYTES = 400 << 20  # about what CUDA itself and the compiled kernels take, beside what PyTorch counts
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
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.target)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{nbytes / 2**30:.2f} GiB more do not fit on {self.name}, where {self.free_bytes() / 2**30:.2f} GiB "
                "are free; see `auricle plan`, and say with --memory how much may be used"
            ) from error

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of this machine's memory that the card can read and write by itself."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        return torch.cuda.Event()

    def capture(self, call: Callable[[], None], warm_ups: int = WARM_UPS) -> Callable[[], None]:
        """Records the kernels that `call` starts; gives what starts them all at once. `call` runs so many times before.

        One thread records at a time, and what others do meanwhile does not disturb it.
        """
        with RECORDING:
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


def check_cuda(number: int = 0) -> None:
    """Raises BackendError with the remedy when the CUDA backend cannot run in this process."""
    if torch.version.cuda is None:
        raise BackendError(
            f"PyTorch {torch.__version__} is built without CUDA; install one that has it, or use --backend cpu"
        )
    if not torch.cuda.is_available():
        raise BackendError("PyTorch finds no CUDA device here; look at nvidia-smi and its driver, or use --backend cpu")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise BackendError("the CUDA backend needs triton; pip install triton, or use --backend cpu") from None
    capability = torch.cuda.get_device_capability(number)
    if capability < LEAST_CAPABILITY:
        raise BackendError(
            f"{torch.cuda.get_device_name(number)} has compute capability {capability[0]}.{capability[1]}; the CUDA "
            "backend needs 8.0 (Ampere) or later; use --backend cpu"
        )
