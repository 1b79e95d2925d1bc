"""Writes the GGUF file of a Hugging Face checkpoint, streamed in slabs of rows.

Memory does not grow with the checkpoint: one slab is read, checked, encoded and placed at a time. Knows plans and
bytes; which tensor gets which name and type was decided in `plan.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..engine.gguf_write import GGUFWriter, plan_layout
from ..engine.mel import hann_window, mel_filters
from ..kernels.formats import BF16, F16, Format
from ..kernels.quantize import QuantizationError, quantize
from .checkpoint import FLOATS, Checkpoint, ConversionError, widen
from .plan import ConversionPlan, PlanRow, plan_conversion
from .provenance import describe_shards, hash_shards

__all__ = ["convert", "plan_conversion"]

Progress = Callable[[int, int], None]

SLAB_BYTES = 16 << 20  # of float32 weights; the encoders need about five times as much beside it

# Exponent bits that are all set in infinities and NaN, by stored dtype.
_EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
# The least magnitude that rounds to infinity.
_OVERFLOW = {F16: 65520.0, BF16: 2.0**128 - 2.0**119}


def convert(plan: ConversionPlan, out_path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Write the file a plan describes; `out_path` appears when it is complete, or not at all.

    `progress(done, total)` counts bytes: first the source as its checksums are taken, then the file as it is written.
    Raises ConversionError for weights that are not finite or do not fit the type, and for a source that changes;
    GGUFError when the file cannot be written (a full disk: with the bytes needed).
    """
    _check_output(plan.checkpoint, Path(out_path))
    source_bytes = sum(shard.stat().st_size for shard in plan.checkpoint.shards)
    meter = _Meter(source_bytes + sum(row.nbytes for row in plan.rows), progress)
    with plan.checkpoint:
        metadata = plan.metadata | describe_shards(plan.checkpoint, hash_shards(plan.checkpoint, meter.advance))
        layout = plan_layout(metadata, [(row.target, row.shape, row.format) for row in plan.rows])
        assert layout.total_bytes == plan.total_bytes, f"{layout.total_bytes=} {plan.total_bytes=}"
        with GGUFWriter(out_path, layout) as writer:
            for row in plan.rows:
                for at, data in _encode(plan.checkpoint, row):
                    writer.write(row.target, data, at)
                    meter.advance(data.nbytes)


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress:
            self.progress(self.done, self.total)


def _check_output(checkpoint: Checkpoint, out_path: Path) -> None:
    """What the writer would notice only after the checksums, or not at all."""
    if not out_path.parent.is_dir():
        raise ConversionError(f"{out_path.parent} is not a folder: make it first, or write elsewhere")
    for shard in checkpoint.shards:
        if out_path.exists() and out_path.samefile(shard):
            raise ConversionError(f"{out_path} is a shard of the checkpoint itself: write to another path")


def _encode(checkpoint: Checkpoint, row: PlanRow) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor's bytes in order: (offset inside the tensor, uint8 array) a slab."""
    if row.source is None:
        yield 0, np.ascontiguousarray(_compute(row), "<f4").reshape(-1).view(np.uint8)
        return
    tensor = checkpoint.tensors[row.source]
    step = max(1, SLAB_BYTES // (4 * tensor.n_cols))
    row_bytes = row.nbytes // tensor.n_rows
    for start in range(0, tensor.n_rows, step):
        raw = checkpoint.read_bytes(tensor.name, start, min(start + step, tensor.n_rows))
        _check_finite(raw, row, start)
        yield start * row_bytes, raw if FLOATS[tensor.dtype] is row.format else _quantize(raw, row, start)


def _compute(row: PlanRow) -> np.ndarray:
    """The front end's constants, from the code that uses them."""
    if row.target == "audio.mel_window":
        return hann_window(*row.shape)
    assert row.target == "audio.mel_filters", row
    return mel_filters(row.shape[1])


def _quantize(raw: np.ndarray, row: PlanRow, start: int) -> np.ndarray:
    values = widen(raw, row.source_dtype)
    _check_range(values, row, start)
    try:
        return quantize(values, row.format)
    except QuantizationError as error:
        raise ConversionError(f"tensor {row.source}, rows from {start} on: {error}") from error


def _check_finite(raw: np.ndarray, row: PlanRow, start: int) -> None:
    kind, mask = _EXPONENT[row.source_dtype]
    bad = (raw.view(kind) & mask) == mask
    if bad.any():
        values = widen(raw, row.source_dtype)
        where, value = _locate(bad, values, row, start)
        raise ConversionError(f"tensor {row.source}{where} is {value}: the checkpoint is damaged, fetch it again")


def _check_range(values: np.ndarray, row: PlanRow, start: int) -> None:
    limit = _OVERFLOW.get(row.format)
    if limit is None or max(values.max(), -values.min()) < limit:
        return
    where, value = _locate(np.abs(values) >= limit, values, row, start)
    raise ConversionError(f"tensor {row.source}{where} is {value}, beyond {row.format}'s range: {_remedy(row.format)}")


def _remedy(fmt: Format) -> str:
    return "use --type bf16" if fmt is F16 else "use --type f32"


def _locate(bad: np.ndarray, values: np.ndarray, row: PlanRow, start: int) -> tuple[str, np.float32]:
    """Position in the whole tensor, and value, of the first weight that is `bad` in a slab beginning at row `start`."""
    first = int(np.argmax(bad))
    position = np.unravel_index(start * values.shape[1] + first, row.shape)
    return str([int(i) for i in position]), values.reshape(-1)[first]
