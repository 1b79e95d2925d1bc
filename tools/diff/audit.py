"""Compares the tensors of a model file with what they were made from, block by block.

Finds what activations average away: one damaged block. Knows types and files, runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...engine.gguf import GGUFFile
from ...kernels.dequantize import dequantize
from .metrics import divide
from .thresholds import NOISE, WORST

SLAB_WEIGHTS = 1 << 22
SPAN = 32  # weights that are looked at together in types without blocks

# The most an element may be off, over the largest of its block, where the type bounds it: half a step, and the
# rounding of the step itself.
BOUNDS = {"F32": 0.0, "F16": 6e-4, "BF16": 4e-3, "Q8_0": 4.6e-3, "Q5_1": 0.04, "Q5_0": 0.07, "Q4_1": 0.08, "Q4_0": 0.13}
EXACT_BF16 = {"F32", "BF16"}  # types that hold a BF16 number as it is

ReadRows = Callable[[str, int, int], np.ndarray]  # tensor, elements of its first axis -> float32 [n, …]


@dataclass
class TensorResult:
    """`error`: relative, of all weights; `worst`: the largest error of an element over the largest of its block, and
    where: [row of the first axis, first element of the block in it]."""

    name: str
    type: str
    reference_type: str
    nbytes: int
    error: float
    worst: float
    worst_at: list[int]
    limits: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def audit(file: GGUFFile, types: dict[str, str], read: ReadRows) -> Iterator[TensorResult]:
    """Each tensor that both sides have; `types` are those of the other side."""
    for name in file.tensors:
        if name in types:
            yield _audit_tensor(file, name, types[name], read)


def _audit_tensor(file: GGUFFile, name: str, other: str, read: ReadRows) -> TensorResult:
    info, own = file.tensors[name], file.tensors[name].format.name
    length = info.format.length if info.format.length > 1 else SPAN
    step = max(1, SLAB_WEIGHTS // max(1, int(np.prod(info.shape[1:]))))
    total, squares, worst, worst_at = 0.0, 0.0, -1.0, [0, 0]
    for start in range(0, info.shape[0], step):
        stop = min(start + step, info.shape[0])
        data = file.data(name)
        a = data.view("<f4") if len(info.shape) == 1 and own == "F32" else None
        a = a[start:stop] if a is not None else _decode(data, info, start, stop)
        b = read(name, start, stop).reshape(a.shape)
        difference = np.abs(a.astype(np.float64) - b)
        if not np.isfinite(difference).all():
            difference[~np.isfinite(difference)] = np.inf
        total, squares = total + float(np.square(difference).sum()), squares + float(np.square(b, dtype=float).sum())
        ratio = _by_block(difference, b, length)
        if ratio.max() > worst:
            worst, at = float(ratio.max()), int(ratio.argmax())
            per_row = ratio.size // (stop - start) if len(info.shape) > 1 else ratio.size
            worst_at = [start + at // per_row, at % per_row * length] if len(info.shape) > 1 else [0, at * length]
    error = float(np.sqrt(divide(total, squares)))
    result = TensorResult(name, own, other, info.nbytes, error, worst, worst_at)
    result.limits = {"error": _noise(own, other), "worst": _bound(own, other)}
    for metric, limit in result.limits.items():
        value = getattr(result, metric)
        if not value <= limit:
            result.failures.append(f"{metric} {value:.6g} > {limit:.6g}")
    return result


def _decode(data: np.ndarray, info: object, start: int, stop: int) -> np.ndarray:
    if len(info.shape) == 1:
        return dequantize(data, info.format)[start:stop]
    return dequantize(np.ascontiguousarray(data[start:stop]), info.format)


def _by_block(difference: np.ndarray, reference: np.ndarray, length: int) -> np.ndarray:
    """Largest difference over largest reference of each block along the last axis; flat."""
    width = difference.shape[-1]
    length = length if width % length == 0 else width
    shape = (-1, length)
    return divide(difference.reshape(shape).max(-1), np.abs(reference).reshape(shape).max(-1))


def _lossless(own: str, other: str) -> bool:
    return own == other or (other == "BF16" and own in EXACT_BF16)


def _noise(own: str, other: str) -> float:
    if _lossless(own, other):
        return 0.0
    return 2 * max(NOISE.get(own, WORST), NOISE.get(other, WORST) if other not in EXACT_BF16 else 0.0)


def _bound(own: str, other: str) -> float:
    if _lossless(own, other):
        return 0.0
    bounds = [own] if other in EXACT_BF16 else [own, other]
    return sum(BOUNDS.get(t, min(1.0, 5 * NOISE.get(t, WORST))) for t in bounds)


def read_gguf(file: GGUFFile) -> ReadRows:
    return lambda name, start, stop: _decode(file.data(name), file.tensors[name], start, stop)


def read_checkpoint(directory: Path) -> ReadRows:
    from ...convert.hf import plan_conversion

    plan = plan_conversion(directory)
    rows = {row.target: row for row in plan if row.source}

    def read(name: str, start: int, stop: int) -> np.ndarray:
        row = rows[name]
        first, last = (start, stop) if len(row.shape) > 1 else (0, 1)  # a vector is one row of the source
        values = dequantize(plan.source.read_bytes(row.source, first, last), row.source_format)
        return values if len(row.shape) > 1 else values.reshape(-1)[start:stop]

    return read
