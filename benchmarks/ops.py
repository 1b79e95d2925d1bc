"""Ops of the models one by one on the cpu backend: the cases of `tests/op_cases.py`, compared and then timed.

    python benchmarks/ops.py --quick
    python benchmarks/ops.py --only "4b.* linear" --types Q4_K Q6_K --seconds 1 --save
    python benchmarks/ops.py --only nothing --step

A case is first compared with the reference backend in the tests' tolerances; one that differs is red and gets no time.
Weights and caches rotate through at least four times the last-level cache, in mapped memory as a file's; inputs lie in
the arena. In turns with the calls the machine's own speed is measured: reading memory where weights or a cache are what
is read (up to eight tokens), PyTorch's matrix product where multiplying takes the time. Shares are medians of ratios.
`--step` takes a whole decode step of the 4B apart (it needs the memory of the model). Prints tables; the last line is
one JSON document.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from op_step import measure_step, print_step
from op_work import Yardsticks, count_work
from synthetic import save_result
from turns import busy_seconds, process_seconds, wait_for_quiet

from auricle.engine.backends import find_backend
from auricle.engine.backends.backend import Backend
from auricle.engine.executor import Program, draft_graph
from auricle.engine.kv_cache import CacheTensor
from auricle.engine.weights import Weight
from auricle.kernels.formats import BY_NAME, F16, F32, Q8_0, Format
from auricle.tools.machine import describe_machine, last_level_cache, usable_cores
from auricle.tools.synth import RandomWeights

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from op_cases import MODEL_CASES, Case, Materials, materials, tolerance

TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16")
KV_FORMATS = (F16, Q8_0)
QUICK = r"^(4b|llm|enc)\S* \w+-(1|8|200|256|4)x"
ALIGNMENT = 32  # of tensors in a file
SLICE_S = 0.05  # of calls between two looks at the machine's own speed
MIN_SLICES = 3
MAX_COPIES = 4096  # small operands stay in a cache in any case
DISTURBED = 0.05  # of the processors taken by others: then it is measured again
TRIES = 3


@dataclass(frozen=True)
class Job:
    case: Case
    fmt: Format
    kv_format: Format

    @property
    def label(self) -> str:
        """What the case is run on: the type of its matrices, or of its cache."""
        return str(self.kv_format if self.case.graph().leaves_of("state") else self.fmt)


def list_jobs(cases: Sequence[Case], types: Sequence[Format], only: str) -> Iterator[Job]:
    """Cases that match, in each type that makes a difference to them; those of the same weights one after another."""
    parts: dict[str, list[Case]] = {}
    for case in cases:
        if re.search(only, case.name):
            parts.setdefault(case.name.split(" ")[0], []).append(case)
    for part in parts.values():
        jobs = [(n, job) for case in part for n, job in enumerate(vary(case, types))]
        yield from (job for _, job in sorted(jobs, key=lambda item: item[0]))


def vary(case: Case, types: Sequence[Format]) -> list[Job]:
    graph = case.graph()
    if graph.leaves_of("state"):
        return [Job(case, F32, fmt) for fmt in KV_FORMATS]
    ranks = {len(v.shape) for v in graph.leaves_of("weight")}
    if 2 in ranks:
        return [Job(case, fmt, F32) for fmt in types]
    return [Job(case, F16 if 4 in ranks else F32, F32)]  # convolutions are F16 in every file


# Operands.


class Stock:
    """Weights of some shapes in one type: copies in mapped memory, and the same decoded for the reference."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], fmt: Format, cache_bytes: int) -> None:
        """`cache_bytes`: what the copies together must be larger than."""
        self.key = (shapes, fmt)
        random = RandomWeights(0)
        drawn = {name: draw_weight(random, name, shape, fmt) for name, shape in shapes.items()}
        n_bytes = sum(w.data.nbytes for w in drawn.values())
        self.n = n_copies(n_bytes, cache_bytes) if any(len(shape) > 1 for shape in shapes.values()) else 1
        self.copies = [
            {name: Weight(name, w.format, w.shape, map_bytes(w.data)) for name, w in drawn.items()}
            for _ in range(self.n)
        ]
        self.decoded = {
            name: Weight(name, F32, w.shape, w.decode().numpy().view(np.uint8).reshape(*w.shape[:-1], -1))
            for name, w in drawn.items()
        }


def n_copies(n_bytes: int, cache_bytes: int) -> int:
    return min(MAX_COPIES, max(1, -(-cache_bytes // max(1, n_bytes))))


def draw_weight(random: RandomWeights, name: str, shape: tuple[int, ...], fmt: Format) -> Weight:
    if len(shape) == 1:
        data = random.draw_vector(shape[0], 1.0).view(np.uint8)
        return Weight(name, F32, shape, data)
    stored = fmt if shape[-1] % fmt.length == 0 else F32
    n_in = int(np.prod(shape[1:]))
    blocks = random.draw_blocks(stored, stored.tensor_bytes(shape) // stored.block_bytes, n_in**-0.5)
    return Weight(name, stored, shape, np.concatenate([b.reshape(-1) for b in blocks]).reshape(*shape[:-1], -1))


def map_bytes(data: np.ndarray) -> np.ndarray:
    """A read-only copy in shared pages of the usual size, as those of a mapped file are; numpy's own may be larger."""
    memory = np.frombuffer(mmap.mmap(-1, data.nbytes + ALIGNMENT), np.uint8)[ALIGNMENT : ALIGNMENT + data.nbytes]
    memory[:] = data.reshape(-1)
    memory.flags.writeable = False
    return memory.reshape(data.shape)


def copy_caches(states: dict[str, CacheTensor]) -> dict[str, CacheTensor]:
    copies = {name: CacheTensor(cache.shape, cache.format) for name, cache in states.items()}
    for name, cache in copies.items():
        cache.data.copy_(states[name].data)
    return copies


# One case.


def run_once(job: Job, backend: Backend, weights: dict[str, Weight]) -> dict[str, np.ndarray]:
    """Results on random operands, in an arena that was full of NaN."""
    m = take_materials(job, weights)
    graph = job.case.graph()
    draft = draft_graph(graph, backend, list(graph.stages))
    program = Program(draft, weights.__getitem__, m.states, poison=True)
    return {name: value.numpy().copy() for name, value in program.run(m.feed).items()}


def take_materials(job: Job, weights: dict[str, Weight]) -> Materials:
    return materials(job.case, job.fmt, job.kv_format, make=lambda name, *_: weights[name])


def largest_error(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """Relative, over all results; infinite where a result was not written."""
    if not all(np.isfinite(value).all() for value in got.values()):
        return float("inf")
    return max(float(np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])) for name in want)


def measure_case(job: Job, backend: Backend, stock: Stock, yardsticks: Yardsticks, a: argparse.Namespace) -> dict:
    """The row of a case: compared, and timed when it is green."""
    want = run_once(job, find_backend("reference"), stock.decoded)
    error = largest_error(run_once(job, backend, stock.copies[0]), want)
    allowed = tolerance(job.case, stock.copies[0], backend.rounds)
    row = {"case": job.case.name, "type": job.label, "green": error <= allowed, "error": error, "tolerance": allowed}
    if not row["green"]:
        return row
    m = take_materials(job, stock.copies[0])
    n_slots = job.case.filled + max((len(ints) for ints in job.case.ints.values()), default=0)
    work = count_work(job.case.graph(), m.weights, m.states, n_slots)
    n = max(stock.n, n_copies(work.nbytes, a.cache_bytes) if m.states else 1)
    calls = bind_calls(job, backend, stock, m, n)
    tries: list[dict[str, Any]] = []
    while len(tries) < TRIES and (not tries or tries[-1]["others"] > DISTURBED):
        if tries:
            wait_for_quiet(DISTURBED, a.patience)
        tries.append(watch(lambda: take_turns(calls, work.bound, yardsticks, a.seconds)))
    best = min(tries, key=lambda t: t["others"])
    row |= {"bound": work.bound, "bytes": work.nbytes, "flops": work.flops, "copies": n} | best
    amount = work.flops if work.bound == "compute" else work.nbytes
    return row | {
        "per_s": amount / best["seconds"],
        "shares": {key: amount * share for key, share in best["shares"].items()},
    }


def bind_calls(job: Job, backend: Backend, stock: Stock, m: Materials, n: int) -> list[Callable[[], object]]:
    """The same case on `n` sets of weights and caches, over one arena that holds the inputs."""
    graph = job.case.graph()
    draft = draft_graph(graph, backend, list(graph.stages))
    arena, calls = None, []
    for i in range(n):
        weights = stock.copies[i % stock.n]
        program = Program(draft, weights.__getitem__, copy_caches(m.states) if m.states else {}, arena)
        if arena is None:
            arena = program.arena
            program.run(m.feed)
        calls.append(lambda program=program: program.run(program.inputs))  # inputs that are in place are not copied
    return calls


def take_turns(
    calls: Sequence[Callable[[], object]], bound: str, yardsticks: Yardsticks, seconds: float
) -> dict[str, Any]:
    """Slices of calls, each after a look at the machine's own speed. `shares`: by yardstick, for one byte or flop."""
    rotation = cycle(calls)
    next(rotation)()
    start = time.perf_counter()
    next(rotation)()
    n = max(1, round(min(SLICE_S, seconds) / (time.perf_counter() - start)))
    times, speeds = [], []
    end = time.perf_counter() + seconds
    while len(times) < MIN_SLICES or time.perf_counter() < end:
        speeds.append(yardsticks.take(bound))
        next(rotation)()  # the threads that compute now may be others
        start = time.perf_counter()
        for _ in range(n):
            next(rotation)()
        times.append((time.perf_counter() - start) / n)
    shares = {key: median(1 / (t * s[key]) for t, s in zip(times, speeds, strict=True)) for key in speeds[0]}
    return {"seconds": median(times), "slices": len(times), "calls_a_slice": n, "shares": shares}


def watch(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, with the share of the processors that others took meanwhile."""
    pid, start = os.getpid(), time.perf_counter()
    others = busy_seconds() - process_seconds(pid)
    found = measure()
    others = busy_seconds() - process_seconds(pid) - others
    return found | {"others": max(0.0, others / (time.perf_counter() - start) / (os.cpu_count() or 1))}


# What is printed.

HEAD = "| case | type | time | GB/s | of reading | GFLOP/s | of float32 | of bf16 | |\n" + "| --- " * 9 + "|"


def format_row(row: dict[str, Any]) -> str:
    if not row["green"]:
        cells = [""] * 6 + [f"red: error {row['error']:.1e}, at most {row['tolerance']:.1e}"]
    else:
        shares = {key: f"{share:.0%}" for key, share in row["shares"].items()}
        rate, computes = f"{row['per_s'] / 1e9:.1f}", row["bound"] == "compute"
        cells = [
            format_time(row["seconds"]),
            "" if computes else rate,
            shares.get("read", ""),
            rate if computes else "",
            shares.get("gemm_float32", ""),
            shares.get("gemm_bfloat16", ""),
            f"others took {row['others']:.0%}" if row["others"] > DISTURBED else "",
        ]
    return f"| {' | '.join([row['case'], row['type'], *cells])} |"


def format_time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def measure_cases(jobs: Iterator[Job], backend: Backend, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all jobs, printed as they come."""
    rows: list[dict[str, Any]] = []
    stock: Stock | None = None
    yardsticks = Yardsticks()
    for job in jobs:
        shapes = {v.name: v.shape for v in job.case.graph().leaves_of("weight")}
        if stock is None or stock.key != (shapes, job.fmt):
            stock = None  # before the next one is made
            stock = Stock(shapes, job.fmt, a.cache_bytes)
        if not rows:
            print(HEAD)
        rows.append(measure_case(job, backend, stock, yardsticks, a))
        print(format_row(rows[-1]), flush=True)
    return rows


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression for names of cases")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="of matrices")
    parser.add_argument("--precision", choices=("auto", "exact", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seconds", type=float, default=0.6, help="for a case")
    parser.add_argument("--quick", action="store_true", help="few cases in two types, briefly")
    parser.add_argument("--step", nargs="*", metavar="RECIPE", help="a decode step of the 4B, too (q4_k_all, q4_k)")
    parser.add_argument("--context", type=int, default=200, help="tokens before that step")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for others")
    parser.add_argument("--save", action="store_true", help="keep the document in benchmarks/results/ops.json")
    a = parser.parse_args(arguments)
    if a.quick:
        a.only, a.seconds = a.only or QUICK, min(a.seconds, 0.15)
        a.types = ("Q4_K", "Q6_K") if a.types is TYPES else a.types
    a.cache_bytes = 4 * (last_level_cache() or 32 << 20)
    return a


def main(arguments: Sequence[str] | None = None) -> None:
    a = parse_arguments(arguments)
    torch.set_num_threads(a.threads)
    backend = find_backend("cpu", a.precision)
    wait_for_quiet(DISTURBED, a.patience)
    rows = measure_cases(list_jobs(MODEL_CASES, [BY_NAME[name] for name in a.types], a.only), backend, a)
    document: dict[str, Any] = {"benchmark": "ops", "threads": a.threads, "precision": a.precision, "cases": rows}
    if a.step is not None:
        document["steps"] = [measure_step(recipe, backend, a) for recipe in a.step or ("q4_k_all", "q4_k")]
        for step in document["steps"]:
            print_step(step)
    document["machine"] = describe_machine()
    if a.save:
        save_result("ops.json", document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
