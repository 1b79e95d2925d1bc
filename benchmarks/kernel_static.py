"""The table of `kernels.py --static`: what the GPU kernels become, case by case, and what is wrong with it.

A module of kernels/gpu lists its kernels in a function `static_cases()`. Knows what a good kernel looks like from
outside: nothing is spilled, it fits, weights are loaded widely, matrices are multiplied on tensor cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from synthetic import RESULTS

from auricle.engine.outputs import write_text
from auricle.kernels.gpu.static import ARCHS, Case, compile_case
from auricle.kernels.gpu.tune import WARP, find_processor, resident_blocks

ROOT = Path(__file__).parent.parent
PACKAGE = "auricle.kernels.gpu"
KEYS = ("kernel", "type", "arch", "config", "registers", "stack", "local", "shared", "load_bits", "tensor_core")
KEYS += ("spills", "moves", "activation_bits", "instructions")
SPILL_BYTES = 32  # of a thread that may be put aside around a loop
SPILLS = 4  # times that a loop may do so, which has hundreds of instructions
IN_FLIGHT = 24 << 10  # bytes a multiprocessor must have on their way: 4.3 TB/s for 0.7 us, by 132 of them
MATVEC_BITS = 64  # of a load of weights at least
ACTIVATION_BITS = 128  # of a load of activations at least, in the mat-vec
INSTRUCTIONS = {1: 2.5, 2: 3.0, 4: 4.1, 8: 6.0}  # of the mat-vec for a weight at most, by tokens


def table_path(triton: str) -> Path:
    """Where the table of a version of Triton is kept, such as that for "3.9.0": one for each minor version."""
    return RESULTS / f"kernels-static-{'.'.join(triton.split('.')[:2])}.json"


def list_modules() -> list[str]:
    """Modules of kernels/gpu that list cases."""
    folder = import_module(PACKAGE).__path__
    names = sorted(f"{PACKAGE}.{module.name}" for module in pkgutil.iter_modules(folder))
    return [name for name in names if hasattr(import_module(name), "static_cases")]


def list_tasks(only: str, archs: Sequence[int] | None) -> list[tuple[str, int, int]]:
    """Module, number of the case in it, and processor."""
    return [
        (name, n, arch)
        for name in list_modules()
        for n, case in enumerate(list_cases(name, ARCHS[0]))
        if re.search(only, f"{case.kernel} {case.type}")
        for arch in archs or ARCHS
    ]


def compile_task(task: tuple[str, int, int]) -> dict[str, Any]:
    """The row of a case; in any process."""
    name, n, arch = task
    return asdict(compile_case(list_cases(name, arch)[n], arch))


def list_cases(module: str, arch: int) -> list[Case]:
    """Some cases depend on the processor: then `static_cases` takes its capability."""
    cases = import_module(module).static_cases
    return list(cases(divmod(arch, 10)) if signature(cases).parameters else cases())


def compile_tasks(tasks: Sequence[tuple[str, int, int]], n_jobs: int) -> Iterator[dict[str, Any]]:
    """Rows in order, as they come. What has not changed comes out of Triton's cache."""
    if n_jobs == 1:
        yield from map(compile_task, tasks)
        return
    with ProcessPoolExecutor(n_jobs, get_context("spawn")) as pool:
        yield from pool.map(compile_task, tasks)


def hash_sources() -> dict[str, str]:
    """sha256 of each source that a kernel is made from."""
    paths = sorted([*ROOT.glob("kernels/gpu/*.py"), ROOT / "kernels/layouts.py", ROOT / "kernels/formats.py"])
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def find_faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong, a line each."""
    return [f"{name_row(row)}: {fault}" for row in rows for fault in row_faults(row)]


def row_faults(row: dict[str, Any]) -> Iterator[str]:
    capability = divmod(row["arch"], 10)
    n_resident = resident_warps(row)
    if row["spills"] > SPILLS or row["stack"] + row["local"] > SPILL_BYTES:
        n_bytes = row["stack"] + row["local"]
        yield f"spills: {n_bytes} bytes of stack and local memory, {row['spills']} times in loops"
    if row["shared"] > find_processor(capability).shared:
        yield f"{row['shared']} bytes of shared memory; a block may have {find_processor(capability).shared}"
    elif n_resident == 0:
        yield f"{row['registers']} registers: not one block fits"
    if row["kernel"].startswith("matvec"):
        if row["load_bits"] < MATVEC_BITS:
            yield f"weights are loaded {row['load_bits']} bits at a time"
        in_flight = n_resident * WARP * row["config"]["in_flight"]
        if 0 < in_flight < IN_FLIGHT:
            yield f"{in_flight} bytes on their way from {n_resident} warps; {IN_FLIGHT} hide what memory takes"
        yield from work_faults(row)
    if row["kernel"].startswith(("matmul", "conv")) and not row["tensor_core"]:
        yield "no tensor core instructions"
    if row["moves"]:
        yield f"a loop lays an accumulator out anew {row['moves']} times"


def work_faults(row: dict[str, Any]) -> Iterator[str]:
    """Of a mat-vec: activations that are loaded in small pieces, and too many instructions."""
    most = INSTRUCTIONS[row["config"]["tokens"]]
    if row["activation_bits"] < ACTIVATION_BITS:
        yield f"activations are loaded {row['activation_bits']} bits at a time"
    if row["instructions"] > most:
        yield f"{row['instructions']} instructions a weight, at most {most}"


def resident_warps(row: dict[str, Any]) -> int:
    """Warps that a multiprocessor keeps at once."""
    warps = row["config"]["warps"]
    return warps * resident_blocks(divmod(row["arch"], 10), row["registers"], row["shared"], warps)


def name_row(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['type']} sm_{row['arch']} {format_config(row['config'])}"


def format_config(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in config.items())


HEAD = ("kernel", "type", "sm", "configuration", "registers", "stack", "local", "shared", "load", "tensor", "warps")
HEAD += ("instructions a weight",)


def format_row(row: dict[str, Any]) -> str:
    cells = [row["kernel"], row["type"], row["arch"], format_config(row["config"]), row["registers"], row["stack"]]
    cells += [row["local"], row["shared"], row["load_bits"], "yes" if row["tensor_core"] else "", resident_warps(row)]
    cells.append(row["instructions"] or "")
    return f"| {' | '.join(map(str, cells))} |"


def run(a: argparse.Namespace) -> int:
    """Prints the table and what is wrong; 1 when something is."""
    print(f"| {' | '.join(HEAD)} |\n" + "| --- " * len(HEAD) + "|")
    rows = []
    for row in compile_tasks(list_tasks(a.only, a.archs), a.jobs):
        rows.append({key: row[key] for key in KEYS})
        print(format_row(row), flush=True)
    faults = find_faults(rows)
    for fault in faults:
        print(fault, file=sys.stderr)
    if a.save:
        save_table(rows, faults)
    if a.json:
        print(json.dumps(rows))
    return 1 if faults else 0


def save_table(rows: Sequence[dict[str, Any]], faults: Sequence[str]) -> None:
    """A row a line, so that a diff shows what a change does to a kernel."""
    head = {"benchmark": "kernels-static", "triton": version("triton"), "sources": hash_sources(), "faults": faults}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    write_text(table_path(version("triton")), f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
