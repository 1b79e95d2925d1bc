"""A whole decode step taken apart: how long each kind of op takes in it, and what is not the multiplying of matrices.

The decoder has the 4B shape, all its layers, and random weights in the types of a recipe. A second decoder of as many
ops has matrices of one tile: what it takes is nearly all calls, clocks and threads that wake up, a bound for overhead.
"""

from __future__ import annotations

import argparse
import mmap
import time
from collections import Counter
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from op_work import Yardsticks
from turns import wait_for_quiet

from auricle.engine.backends.backend import Backend, Kernel
from auricle.engine.executor import Program, draft_graph
from auricle.engine.graph import Graph
from auricle.engine.kv_cache import KV_FORMATS, CacheTensor
from auricle.engine.models.qwen3 import DecoderConfig, build_decoder
from auricle.engine.weights import Weight
from auricle.kernels.formats import Format
from auricle.tools.synth import SHAPES, RandomWeights, plan_synth

SHAPE = "moss-audio-4b"
MATRIX_OPS = ("linear", "linears", "gated_linear")
TILE = 256
MIN_ROUNDS = 5


def measure_step(recipe: str, backend: Backend, a: argparse.Namespace) -> dict[str, Any]:
    """Uses `context`, `seconds` and `patience` of the arguments."""
    values = SHAPES[SHAPE].values
    config = DecoderConfig(**{name: values[f"llm.{name}"] for name in DecoderConfig.__dataclass_fields__})
    tiny = replace(config, hidden_size=TILE, intermediate_size=TILE, num_heads=2, num_kv_heads=1, vocab_size=TILE)
    formats = {name: info.format for name, info in plan_synth(SHAPE, recipe).layout.tensors.items()}
    step, small = (Step(c, formats, backend, a.context) for c in (config, tiny))
    yardsticks = Yardsticks()
    wait_for_quiet(0.05, a.patience)
    rounds = []
    end = time.perf_counter() + max(a.seconds, 2.0)
    while len(rounds) <= MIN_ROUNDS or time.perf_counter() < end:
        read = yardsticks.read()
        rounds.append({"read": read, "whole": step.run(), "apart": step.run_apart(), "small": small.run()})
        rounds[-1]["small_apart"] = small.run_apart()
    return {"recipe": recipe, "context": a.context} | summarise(rounds[1:], step)


def summarise(rounds: list[dict[str, Any]], step: Step) -> dict[str, Any]:
    """`others_share`: of the step, without the calls of matrix kernels."""
    whole, small = (median(r[key] for r in rounds) for key in ("whole", "small"))
    ops = {
        op: {
            "calls": step.n_calls[op],
            "seconds": median(r["apart"][op] for r in rounds),
            "one_tile_seconds": median(r["small_apart"][op] for r in rounds),
        }
        for op in step.n_calls
    }
    matrices = median(sum(r["apart"][op] for op in MATRIX_OPS) / r["whole"] for r in rounds)
    n_bytes = step.weight_bytes + step.cache_bytes
    return {
        "seconds": whole,
        "weight_bytes": step.weight_bytes,
        "cache_bytes": step.cache_bytes,
        "bytes_per_s": n_bytes / whole,
        "share_of_reading": median(n_bytes / r["whole"] / r["read"] for r in rounds),
        "not_matrices": 1 - matrices,
        "one_tile_seconds": small,
        "ops": ops,
    }


class Step:
    """A decoder bound twice over the same operands: as it is, and with a clock around each call."""

    def __init__(self, config: DecoderConfig, formats: dict[str, Format], backend: Backend, context: int) -> None:
        graph = Graph()
        build_decoder(graph, config, 1, context + 1, inject=None, tied=False, head="last")
        random = RandomWeights(0)
        weights = {v.name: draw(random, v.name, v.shape, formats[v.name]) for v in graph.leaves_of("weight")}
        states = {v.name: CacheTensor(v.shape, KV_FORMATS[backend.kv_type]) for v in graph.leaves_of("state")}
        for cache in states.values():
            cache.data.zero_()
        self.weight_bytes = sum(w.data.nbytes for name, w in weights.items() if "embed" not in name)
        self.cache_bytes = sum(cache.data.nbytes for cache in states.values())
        self.spent: Counter[str] = Counter()
        draft = draft_graph(graph, backend, ["logits"])
        self.n_calls = Counter(node.op for node in draft.graph.nodes if node.op in backend.kernels)
        self._program = Program(draft, weights.__getitem__, states)
        clocked = draft_graph(graph, self._with_clocks(backend), ["logits"])
        self._clocked = Program(clocked, weights.__getitem__, states, self._program.arena)
        self._feed = {"input_ids": np.ones(1), "positions": np.full(1, context), "last_row": np.zeros(1)}

    def _with_clocks(self, backend: Backend) -> Backend:
        def clocked(op: str, kernel: Kernel) -> Kernel:
            def bind(*operands: Any) -> Any:
                call = kernel.bind(*operands)

                def timed() -> None:
                    start = time.perf_counter()
                    call()
                    self.spent[op] += time.perf_counter() - start

                return timed

            return replace(kernel, bind=bind)

        return replace(backend, kernels={op: clocked(op, kernel) for op, kernel in backend.kernels.items()})

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self._program.run(self._feed)
        return time.perf_counter() - start

    def run_apart(self) -> dict[str, float]:
        """Seconds of one step by op."""
        self.spent.clear()
        self._clocked.run(self._feed)
        return dict(self.spent)


def draw(random: RandomWeights, name: str, shape: tuple[int, ...], fmt: Format) -> Weight:
    """Random weights in pages like those of a mapped file."""
    if len(shape) == 1:
        return Weight(name, fmt, shape, random.draw_vector(shape[0], 1.0).view(np.uint8))
    n_bytes, at = fmt.tensor_bytes(shape), 0
    data = np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8)
    for part in random.draw_blocks(fmt, n_bytes // fmt.block_bytes, shape[-1] ** -0.5):
        data[at : at + part.nbytes] = part.reshape(-1)
        at += part.nbytes
    data.flags.writeable = False
    return Weight(name, fmt, shape, data.reshape(*shape[:-1], -1))


def print_step(step: dict[str, Any]) -> None:
    n_bytes = step["weight_bytes"] + step["cache_bytes"]
    print(
        f"\n### A decode step of the 4B, {step['recipe']}, after {step['context']} tokens\n\n"
        f"{step['seconds'] * 1e3:.1f} ms, {n_bytes / 1e9:.2f} GB, {step['bytes_per_s'] / 1e9:.1f} GB/s "
        f"({step['share_of_reading']:.0%} of reading); {step['not_matrices']:.1%} is not in the matrix kernels; "
        f"with matrices of one tile {step['one_tile_seconds'] * 1e3:.2f} ms\n\n"
        "| op | calls | ms | share | us a call | of one tile |\n| --- | --- | --- | --- | --- | --- |"
    )
    for op, row in sorted(step["ops"].items(), key=lambda item: -item[1]["seconds"]):
        calls, seconds, tile = row["calls"], row["seconds"], row["one_tile_seconds"]
        print(
            f"| {op} | {calls} | {seconds * 1e3:.2f} | {seconds / step['seconds']:.1%} | "
            f"{seconds / calls * 1e6:.1f} | {tile / calls * 1e6:.1f} |"
        )
