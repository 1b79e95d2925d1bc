"""Importance matrices: how much energy each input column of a weight sees on real data, and files of that.

A file holds, for each weight, the sums of squares of its inputs by column and the number of rows summed, in the GGUF
layout that llama.cpp's tools write and read. Does not know how the sums came about, nor what a quantiser does with
their means.

Source of the layout: tools/imatrix of llama.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..engine.gguf import GGUFFile, open_gguf, string, strings, u32
from ..engine.gguf_write import GGUFWriter, plan_layout
from ..engine.kinds import COUNT_KEYS, IMATRIX, expect_kind
from ..kernels.formats import F32
from .source import ConversionError

SQUARES, COUNTS = ".in_sum2", ".counts"
CHUNK_ROWS = 512  # readers want the rows in chunks of some size; this is llama.cpp's default


@dataclass(frozen=True)
class ColumnSums:
    """`squares` float64 [n_cols]: the squares of a weight's inputs, summed over `n_rows` rows."""

    squares: np.ndarray
    n_rows: int


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums by weight, and the names of the data they were taken on."""

    sums: dict[str, ColumnSums] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()

    def importance(self) -> dict[str, np.ndarray]:
        """By weight, the mean square of each input column: float32 [n_cols]."""
        return {name: (s.squares / s.n_rows).astype(np.float32) for name, s in self.sums.items()}


def read_importance(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """By weight, the mean square of each input column: float32 [n_cols]. Raises as `read_matrix` does."""
    return read_matrix(path).importance()


def read_matrix(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """An importance matrix of ours, of llama.cpp's tools or of CrispASR; tensors that are no sums and counts are passed
    over.

    Raises GGUFError for what is no GGUF file, ConversionError for one that is something else or does not make sense.
    """
    with open_gguf(path) as file:
        expect_kind(file, IMATRIX, ConversionError, "give the output of auricle imatrix")
        names = sorted({n.removesuffix(end) for n in file.tensors for end in (SQUARES, COUNTS) if n.endswith(end)})
        counted = [name for name in file.tensors if COUNT_KEYS + name in file.metadata]
        if not names and not counted:
            raise ConversionError(f"{file.where}: holds no sums of any weight; collect it again")
        datasets = file.get("imatrix.datasets", list[str], [])
        sums = {n: _read_sums(file, n) for n in names} if names else {n: _read_counted(file, n) for n in counted}
        return ImportanceMatrix(sums, tuple(datasets))


def _read_sums(file: GGUFFile, name: str) -> ColumnSums:
    squares, counts = (_read_floats(file, name + end) for end in (SQUARES, COUNTS))
    if len(squares) != 1 or counts.size != 1:
        raise ConversionError(
            f"{file.where}: {name} is {max(len(squares), counts.size)} matrices in one; collect it on a model without"
        )
    n_rows = counts.item()
    if not 1 <= n_rows < np.inf:
        raise ConversionError(f"{file.where}: {name} was seen {n_rows:g} times; collect it on more data")
    _check_squares(squares[0], f"{file.where}: {name}", "collect it again")
    return ColumnSums(squares[0], round(n_rows))


def _read_counted(file: GGUFFile, name: str) -> ColumnSums:
    """As CrispASR writes it: the sums under the weight's own name, the count in a key."""
    squares = _read_floats(file, name)
    n_rows = file.require(COUNT_KEYS + name, int, within=(1, np.inf))
    if len(squares) != 1:
        raise ConversionError(f"{file.where}: {name} is {len(squares)} rows of sums; collect it again")
    _check_squares(squares[0], f"{file.where}: {name}", "collect it again")
    return ColumnSums(squares[0], n_rows)


def _read_floats(file: GGUFFile, name: str) -> np.ndarray:
    """A float32 tensor as float64 [n_rows, n_cols]; ggml drops outer dimensions of 1."""
    info = file.tensors.get(name)
    if info is None:
        raise ConversionError(f"{file.where}: {name} is missing beside its counterpart; collect it again")
    if info.format is not F32:
        raise ConversionError(f"{file.where}: {name} is {info.format}, not F32; collect it again")
    return file.data(name).view("<f4").reshape(-1, info.shape[-1]).astype(np.float64)


def _check_squares(squares: np.ndarray, what: str, remedy: str) -> None:
    bad = ~(np.isfinite(squares) & (squares >= 0))
    if bad.any():
        column = int(bad.argmax())
        raise ConversionError(f"{what}: the sum of squares of column {column} is {squares[column]:g}; {remedy}")


def merge(matrices: Iterable[ImportanceMatrix]) -> ImportanceMatrix:
    """One matrix for the data of all. Raises ConversionError for a weight that is not of one size in all of them."""
    sums: dict[str, ColumnSums] = {}
    datasets: list[str] = []
    for matrix in matrices:
        datasets += matrix.datasets
        for name, new in matrix.sums.items():
            old = sums.setdefault(name, ColumnSums(np.zeros_like(new.squares), 0))
            if old.squares.shape != new.squares.shape:
                raise ConversionError(
                    f"{name} has {old.squares.size} columns in one importance matrix and {new.squares.size} in "
                    "another; merge only those of one model"
                )
            sums[name] = ColumnSums(old.squares + new.squares, old.n_rows + new.n_rows)
    return ImportanceMatrix(sums, tuple(datasets))


def write_matrix(path: str | os.PathLike[str], matrix: ImportanceMatrix) -> int:
    """Writes a matrix; `path` appears when it is complete. Gives the size of the file in bytes.

    Raises ConversionError for sums that are not finite or no sums at all, OutputError when the file cannot be written.
    """
    if not matrix.sums:
        raise ConversionError(f"{path}: there are no sums to write; collect some first")
    stored: dict[str, np.ndarray] = {}
    for name, sums in sorted(matrix.sums.items()):
        with np.errstate(over="ignore"):
            stored[name + SQUARES] = sums.squares.astype("<f4")
        _check_squares(stored[name + SQUARES], name, "the model computes nonsense, convert it again")
        stored[name + COUNTS] = np.array([sums.n_rows], "<f4")
    n_rows = max(sums.n_rows for sums in matrix.sums.values())
    metadata = {
        "general.type": string(IMATRIX),
        "imatrix.datasets": strings(matrix.datasets),
        "imatrix.chunk_count": u32(-(-n_rows // CHUNK_ROWS)),
        "imatrix.chunk_size": u32(CHUNK_ROWS),
    }
    layout = plan_layout(metadata, [(name, array.shape, F32) for name, array in stored.items()])
    with GGUFWriter(path, layout) as writer:
        for name, array in stored.items():
            writer.write(name, array)
    return layout.total_bytes
