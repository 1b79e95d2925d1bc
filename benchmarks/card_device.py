"""The card that is measured, and the pretence of one on which the whole command is rehearsed where there is none.

The pretence computes on the processor under Triton's interpreter: its times mean nothing, its results do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu import describe_gpu, measure_copy, measure_matmul, time_launches

from auricle.kernels.gpu.tune import slug
from auricle.tools.machine import package_version, usable_cores

GIB = 1 << 30


class Gpu:
    """The first GPU of this machine. Raises NoGPU where there is none."""

    device, rehearsal = "cuda", False

    def __init__(self) -> None:
        from gpu import require_gpu

        require_gpu()

    def describe(self) -> dict[str, Any]:
        return describe_gpu()

    def copy_bytes_per_s(self) -> float:
        return measure_copy(0.3)

    def matmul_flops_per_s(self) -> float:
        return measure_matmul(0.3)

    def time_launches(self, calls: Sequence[Callable[[], object]], seconds: float) -> float:
        return time_launches(calls, seconds)

    def backend(self, pick: Callable[..., Any] | None = None) -> Any:
        """The CUDA backend; with products cut as `pick` says."""
        from auricle.engine.backends.cuda import first_card, make_backend
        from auricle.engine.backends.cuda_device import Card

        return first_card() if pick is None else make_backend(Card(), pick=pick)

    @property
    def name(self) -> str:
        import torch

        return torch.cuda.get_device_name()

    @property
    def capability(self) -> tuple[int, int]:
        import torch

        return torch.cuda.get_device_capability()

    def l2_bytes(self) -> int:
        import torch

        return torch.cuda.get_device_properties(0).L2_cache_size

    def wait(self) -> float:
        """Waits until all work is done; the time then."""
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def forget_peak(self) -> int:
        """Counts the peak anew from what is allocated now, which it gives."""
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()

    def free_bytes(self) -> int:
        """As the driver counts, whoever has the rest."""
        import torch

        return torch.cuda.mem_get_info()[0]


class Pretence(Gpu):
    """No card: the stand-in of the tests, interpreted."""

    device, rehearsal = "cpu", True
    name, capability = "rehearsal", (8, 9)

    def __init__(self) -> None:
        from stand_in import StandIn

        self._card = StandIn()

    def describe(self) -> dict[str, Any]:
        import torch

        versions = {name: package_version(name) for name in ("torch", "triton", "numpy", "transformers", "numba")}
        facts = {"gpu": self.name, "capability": list(self.capability), "gpu_memory_bytes": 16 * GIB, "l2_bytes": 1024}
        return facts | {"versions": versions, "threads": torch.get_num_threads(), "cores": usable_cores()}

    def copy_bytes_per_s(self) -> float:
        return 1e9

    def matmul_flops_per_s(self) -> float:
        return 1e9

    def time_launches(self, calls: Sequence[Callable[[], object]], seconds: float) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def backend(self, pick: Callable[..., Any] | None = None) -> Any:
        from auricle.engine.backends.cuda import make_backend
        from cuda_worker import cut

        return make_backend(self._card, pick=pick or cut)

    def l2_bytes(self) -> int:
        return 1024

    def wait(self) -> float:
        return time.perf_counter()

    def forget_peak(self) -> int:
        self._card.peak = self._card.allocated
        return self._card.allocated

    def peak_bytes(self) -> int:
        return self._card.peak

    def free_bytes(self) -> int:
        return (16 << 30) - self._card.allocated


def find_device(rehearse: bool) -> Gpu:
    return Pretence() if rehearse else Gpu()


def table_name(device: Gpu) -> str:
    """Of the tuned table of a card."""
    return f"{slug(device.name)}.json"
