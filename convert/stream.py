"""Writes the file of a plan in one pass: slabs are read, encoded on all cores, and put in place in order.

Memory does not grow with the model: a few slabs a core are under way at a time, and nothing is held besides. Knows
plans and bytes; which tensor gets which name and type was decided before.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ..engine.gguf_write import GGUFWriter, Layout
from ..engine.outputs import OutputError, PathLike, check_outputs
from .journal import Journal
from .plan import ConversionPlan, PlanRow
from .provenance import hash_files
from .slabs import encode_slab, split_rows
from .threads import Meter, Progress, count_cores, run_in_order

MAX_JOBS = 64  # unless more are asked for; each takes about 15 MB

CHECKING, VERIFYING, WRITING = "checking", "verifying", "writing"  # bytes of the source; weights; weights


def convert(
    plan: ConversionPlan,
    out_path: PathLike,
    progress: Progress | None = None,
    *,
    inputs: Iterable[PathLike | None] = (),
    jobs: int | None = None,
    resume: bool = False,
) -> None:
    """Write the file a plan describes; `out_path` appears when it is complete, or not at all.

    `jobs` threads encode (None: one a core); the file does not depend on their number. An interruption, a crash or a
    full disk leaves `out_path.part` and its journal, and `resume` goes on from there after checking what is there.
    `progress(what, done, total)` counts bytes while "checking" the source, then weights while "verifying" and
    "writing". Nothing that the plan was made from is written over, nor `inputs`: what else the caller has read.
    Raises ConversionError for weights that are not finite or do not fit the type, a source that changes and an
    interrupted conversion that `resume` does not continue, OutputError for an output that is one of the inputs and a
    file that cannot be written (a full disk: with the bytes needed).
    """
    out_path = Path(os.path.realpath(out_path) if os.path.islink(out_path) else out_path)
    jobs = jobs or min(count_cores(), MAX_JOBS)
    journal = Journal(out_path, resume)
    check_outputs((out_path, journal.part, journal.path), (*plan.source.files, *plan.inputs, *inputs))
    try:
        with plan.source, journal:
            layout = plan.lay_out(_hash_source(plan, jobs, progress))
            journal.begin(_fingerprint(plan, layout))
            with GGUFWriter(out_path, layout, part=journal.part, resume=journal.continues) as writer:
                finished = _verify(plan, journal.recorded, writer, progress)
                _write(plan, finished, writer, journal, jobs, progress)
    except OutputError as error:
        if not journal.part.exists():
            raise
        raise OutputError(f"{error}; --resume goes on from {journal.part}") from error


def _hash_source(plan: ConversionPlan, jobs: int, progress: Progress | None) -> dict[str, str]:
    if not plan.hash_source:
        return {}
    meter = Meter(CHECKING, sum(file.stat().st_size for file in plan.source.files), progress)
    return hash_files(plan.source, jobs, meter.advance)


def _fingerprint(plan: ConversionPlan, layout: Layout) -> str:
    """Of all that decides a byte of the file: what it is to be, what it is made from, how weights are weighed."""
    digest = hashlib.sha256(layout.header)
    if not plan.hash_source:  # else the header states the source's own checksums
        states = (file.stat() for file in plan.source.files)
        digest.update(repr([(state.st_size, state.st_mtime_ns) for state in states]).encode())
    for name, importance in sorted(plan.importance.items()):
        digest.update(name.encode() + importance.tobytes())
    for name, adapter in sorted(plan.adapters.items()):
        digest.update(name.encode() + adapter.a.tobytes() + adapter.b.tobytes())
    return digest.hexdigest()


def _verify(plan: ConversionPlan, recorded: dict[str, int], writer: GGUFWriter, progress: Progress | None) -> set[str]:
    """The tensors that an interrupted conversion finished and that are still as it left them."""
    rows = [row for row in plan if row.target in recorded]
    meter = Meter(VERIFYING, sum(_n_weights(row) for row in rows), progress)
    finished = set()
    for row in rows:
        crc = 0
        for piece in writer.read(row.target):
            crc = zlib.crc32(piece, crc)
        if crc == recorded[row.target]:
            writer.accept(row.target)
            finished.add(row.target)
        meter.advance(_n_weights(row))
    return finished


def _write(
    plan: ConversionPlan,
    finished: set[str],
    writer: GGUFWriter,
    journal: Journal,
    jobs: int,
    progress: Progress | None,
) -> None:
    meter = Meter(WRITING, sum(_n_weights(row) for row in plan), progress)
    meter.advance(sum(_n_weights(row) for row in plan if row.target in finished))
    tasks = (task for row in plan if row.target not in finished for task in _tasks(plan, row))
    crc = 0
    for row, at, data in run_in_order(tasks, jobs):
        writer.write(row.target, data, at)
        crc = zlib.crc32(data, crc)
        if at + data.nbytes == row.nbytes:
            journal.record(row.target, crc, row.nbytes, writer.sync)
            crc = 0
        meter.advance(data.nbytes // row.format.block_bytes * row.format.length)


def _tasks(plan: ConversionPlan, row: PlanRow) -> Iterator[Callable[[], tuple[PlanRow, int, np.ndarray]]]:
    """What gives a tensor's bytes in order: (row, offset inside the tensor, uint8 array)."""
    if row.source is None:
        values = plan.computed[row.target].reshape(-1).view(np.uint8)
        yield lambda: (row, 0, values)
        return
    row_bytes = row.nbytes // plan.source.tensors[row.source].n_rows
    for start, stop in split_rows(plan.source, row):
        yield partial(_encode, plan, row, start, stop, start * row_bytes)


def _encode(plan: ConversionPlan, row: PlanRow, start: int, stop: int, at: int) -> tuple[PlanRow, int, np.ndarray]:
    importance, adapter = plan.importance.get(row.target), plan.adapters.get(row.target)
    return row, at, encode_slab(plan.source, row, importance, start, stop, adapter)


def _n_weights(row: PlanRow) -> int:
    return row.nbytes // row.format.block_bytes * row.format.length
