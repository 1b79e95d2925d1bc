"""The GPU that a benchmark runs on: what it is, a stopwatch for it, and how fast it copies and multiplies.

Knows PyTorch's view of a card and no kernel of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from auricle.kernels.errors import AuricleError
from auricle.tools.machine import describe_machine, package_version

BUFFER_BYTES = 1 << 30  # copied to see how fast that goes; more than any cache
MATRIX = 8192  # rows and columns of the matrices that are multiplied
ROUNDS = 5  # the median of so many
WARM_UPS = 2


class NoGPU(AuricleError):
    """A benchmark of the GPU on a machine that has none that PyTorch can use."""


def require_gpu() -> None:
    """Raises NoGPU, one line, when PyTorch finds no GPU here."""
    import torch

    if not torch.cuda.is_available():
        raise NoGPU("PyTorch finds no GPU here: times need one; --static looks at the kernels without")


def describe_gpu() -> dict[str, Any]:
    """The machine with its GPU: what it is called, how large it is, and the versions of what drives it; plain data."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    machine = describe_machine()
    versions = {name: package_version(name) for name in ("triton", "transformers")} | {"cuda": torch.version.cuda}
    return machine | {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "versions": machine["versions"] | versions,
    }


def time_launches(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """Seconds of one call: all of `calls` are recorded as one graph, in turns, and its runs are timed on the card.

    So the time that Python takes to launch is left out, and what one call reads the next one does not.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in list(calls) * WARM_UPS:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    once = time_replays(graph.replay, 1)
    n = max(1, round(seconds / ROUNDS / once))
    return median(time_replays(graph.replay, n) for _ in range(ROUNDS)) / len(calls)


def time_replays(replay: Callable[[], object], n: int) -> float:
    """Seconds of one of `n` runs one after another, by events on the card."""
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(n):
        replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / n


def measure_copy(seconds: float) -> float:
    """Bytes a second that a copy inside the card moves, reading and writing counted."""
    import torch

    source = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * BUFFER_BYTES / time_launches([lambda: target.copy_(source)], seconds)


def measure_matmul(seconds: float) -> float:
    """Operations a second of PyTorch's product of two large bfloat16 matrices."""
    import torch

    a, b = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * MATRIX**3 / time_launches([lambda: torch.mm(a, b, out=out)], seconds)


def wait() -> float:
    """Waits until the card has done all it was asked; the time then."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()
