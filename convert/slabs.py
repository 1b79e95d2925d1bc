"""One slab of rows of a planned tensor: read, checked, encoded. Knows no output file and no order of work.

Slabs are independent of one another and a slab's bytes do not depend on where tensors are cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..engine.lora import LowRank
from ..kernels.dequantize import dequantize
from ..kernels.formats import BF16, F16, F32
from ..kernels.quantize import QuantizationError, quantize
from .plan import PlanRow
from .source import ConversionError, Source

SLAB_WEIGHTS = 1 << 20  # encoding takes about 16 bytes a weight beside the reading

# Exponent bits that are all set in infinities and NaN.
_EXPONENT = {F32: ("<u4", 0x7F800000), F16: ("<u2", 0x7C00), BF16: ("<u2", 0x7F80)}
# The least magnitude that rounds to infinity, and the type that has room for it.
_OVERFLOW = {F16: (65520.0, "bf16"), BF16: (2.0**128 - 2.0**119, "f32")}


def split_rows(source: Source, row: PlanRow) -> Iterator[tuple[int, int]]:
    """The slabs of a tensor of the source: (first row, the row after the last)."""
    tensor = source.tensors[row.source]
    step = max(1, SLAB_WEIGHTS // tensor.n_cols)
    for start in range(0, tensor.n_rows, step):
        yield start, min(start + step, tensor.n_rows)


def encode_slab(
    source: Source, row: PlanRow, importance: np.ndarray | None, start: int, stop: int, adapter: LowRank | None = None
) -> np.ndarray:
    """Rows `start` to `stop` in the row's type, `adapter` added: uint8, flat. Rows that have the type already are
    copied to the bit, unless something is added.

    Raises ConversionError, with name and position, for weights that are not finite or do not fit the type.
    """
    raw = source.read_bytes(row.source, start, stop)
    if row.source_format is row.format and adapter is None:
        _check_stored(raw, source, row, start)
        return raw.reshape(-1)
    values = dequantize(raw, row.source_format).reshape(-1, row.shape[-1])
    if adapter is not None:
        values = values + adapter.rows(start, stop)
    try:
        encoded = quantize(values, row.format, importance)
    except QuantizationError as error:
        raise _not_finite(source, row, start, values, ~np.isfinite(values)) from error
    _check_range(values, row, start)
    return encoded.reshape(-1)


def _check_stored(raw: np.ndarray, source: Source, row: PlanRow, start: int) -> None:
    """Plain numbers that are copied; quantised blocks are taken as they are."""
    if row.format in _EXPONENT:
        kind, mask = _EXPONENT[row.format]
        bad = (raw.view(kind) & mask) == mask
        if bad.any():
            raise _not_finite(source, row, start, dequantize(raw, row.format), bad)


def _check_range(values: np.ndarray, row: PlanRow, start: int) -> None:
    if row.format not in _OVERFLOW:
        return
    limit, remedy = _OVERFLOW[row.format]
    if max(values.max(), -values.min()) >= limit:
        where, value = _locate(np.abs(values) >= limit, values, row, start)
        raise ConversionError(
            f"tensor {row.source}{where} is {value}, beyond {row.format}'s range: use --type {remedy}"
        )


def _not_finite(source: Source, row: PlanRow, start: int, values: np.ndarray, bad: np.ndarray) -> ConversionError:
    where, value = _locate(bad, values, row, start)
    file = source.tensors[row.source].file
    return ConversionError(f"tensor {row.source}{where} is {value}: {file} is damaged, fetch it again")


def _locate(bad: np.ndarray, values: np.ndarray, row: PlanRow, start: int) -> tuple[str, np.float32]:
    """Position in the whole tensor, and value, of the first weight that is `bad` in a slab beginning at row `start`."""
    first = int(np.argmax(bad))
    n_cols = int(np.prod(row.shape[1:])) if len(row.shape) > 1 else row.shape[0]
    position = np.unravel_index(start * n_cols + first, row.shape)
    return str([int(i) for i in position]), values.reshape(-1)[first]
