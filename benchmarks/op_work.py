"""What an op has to do at least (bytes it must read, multiplications), and how fast this machine does such work.

The measures are one read of a large buffer and one matrix product of PyTorch, each short, so that they can be taken in
turns with what they are the measure of. Knows the shapes of ops, no kernel and no clock but the wall's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auricle.engine.graph import Graph, Node
from auricle.tools.machine import BUFFER_MAX, BUFFER_MIN, last_level_cache, read_cpuinfo

FEW = 8  # up to so many tokens a matrix or a cache is read once for all of them, and reading it is what takes the time
HAVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """`bound`: by what the time is bounded. `memory`: `nbytes` of weights or cache; `compute`: `flops`; `cache`: all
    operands and results, which fit a cache."""

    bound: str
    nbytes: int
    flops: int


def count_work(graph: Graph, weights: Mapping[str, Any], states: Mapping[str, Any], n_slots: int) -> Work:
    """The work of a graph of few ops. `n_slots`: those of each cache that are in use when the graph has run."""
    flops = sum(count_flops(node, n_slots) for node in graph.nodes)
    stored = sum(w.data.nbytes for w in weights.values())
    stored += sum(c.data.nbytes // c.shape[0] * n_slots for c in states.values())
    if not flops:
        leaves = graph.leaves_of("input") + graph.leaves_of("weight")
        return Work("cache", sum(v.nbytes for v in [*leaves, *graph.stages.values()]), 0)
    few = all(count_tokens(node) <= FEW for node in graph.nodes if count_flops(node, n_slots))
    return Work("memory" if few else "compute", stored, flops)


def count_tokens(node: Node) -> int:
    """Rows that meet the same weights or the same keys; all of them where there is neither."""
    x = node.inputs[0]
    return x.shape[0] if node.op == "kv_attention" else x.size // x.shape[-1]


def count_flops(node: Node, n_slots: int) -> int:
    """Two for each product that is summed; 0 for ops that do little with each number."""
    x = node.inputs[0]
    if node.op in ("linear", "linears", "gated_linear"):
        n_out = sum(v.shape[0] for v in node.operands if v.kind == "weight" and len(v.shape) == 2)
        return 2 * x.size * n_out
    if node.op == "conv2d":
        return 2 * node.outputs[0].size * math.prod(node.inputs[1].shape[1:])
    if node.op == "window_attention":  # of full windows
        return 4 * x.size * x.shape[1]
    if node.op == "kv_attention":  # token t of n sees all slots but the last n - 1 - t
        n = x.shape[0]
        return 4 * x.size // n * (n * n_slots - n * (n - 1) // 2)
    return 0


class Yardsticks:
    """How fast this machine reads and multiplies, measured anew at each call."""

    def __init__(self, n_bytes: int | None = None, n: int = 2048) -> None:
        """`n_bytes`: of the buffer that is read, by default four times the largest cache; `n`: size of the matrices."""
        size = n_bytes or min(max(4 * (last_level_cache() or 0), BUFFER_MIN), BUFFER_MAX)
        self._buffer = torch.ones(size // 4)
        self._matrices = {"float32": self._pair(n, "float32")}
        if HAVE_BF16 & set(read_cpuinfo()["instructions"] or ()):
            self._matrices["bfloat16"] = self._pair(n, "bfloat16")
        self.read()
        for dtype in self._matrices:
            self.multiply(dtype)

    @staticmethod
    def _pair(n: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(n // 4, n, dtype=DTYPES[dtype]), torch.ones(n, n, dtype=DTYPES[dtype])

    def read(self) -> float:
        """Bytes a second."""
        start = time.perf_counter()
        self._buffer.sum()
        return self._buffer.nbytes / (time.perf_counter() - start)

    def multiply(self, dtype: str) -> float:
        """Flops a second."""
        a, b = self._matrices[dtype]
        start = time.perf_counter()
        torch.mm(a, b)
        return 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)

    def take(self, bound: str) -> dict[str, float]:
        """The measures of a kind of work (see `Work`), by name."""
        if bound == "compute":
            return {f"gemm_{dtype}": self.multiply(dtype) for dtype in self._matrices}
        return {"read": self.read()} if bound == "memory" else {}
