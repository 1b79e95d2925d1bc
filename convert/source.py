"""Where weights come from: files, and where in them each tensor lies and in which type.

A checkpoint folder and a GGUF file are both this. Rows are fetched with pread, never mapped: mapped pages would count
in the resident size. Does not know what a tensor means or becomes.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from ..engine.gguf import GGUFFile
from ..kernels.errors import AuricleError
from ..kernels.formats import Format


class ConversionError(AuricleError):
    """A file that cannot be converted: what was found, and what to do about it."""


@dataclass(frozen=True)
class SourceTensor:
    """One stored tensor: `offset` and `nbytes` locate its data in `file`; `format` is None for integers and the like,
    which `dtype` names."""

    name: str
    dtype: str
    format: Format | None
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def n_rows(self) -> int:
        """Length of the first axis; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def n_cols(self) -> int:
        """Elements of a row: every axis but the first."""
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)


class Source:
    """Tensors by name and the files they lie in. Files are opened on first read; any thread may read."""

    def __init__(self, tensors: Mapping[str, SourceTensor], files: tuple[Path, ...]) -> None:
        self.tensors = tensors
        self.files = files
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as stored: uint8 [stop - start, row bytes].

        Raises ConversionError when the file has become shorter than its header says, or cannot be read.
        """
        tensor = self.tensors[name]
        assert 0 <= start <= stop <= tensor.n_rows, f"rows {start}:{stop} of {tensor}"
        row_bytes = tensor.nbytes // max(1, tensor.n_rows)
        data = np.empty((stop - start, row_bytes), np.uint8)
        self._fill(memoryview(data.reshape(-1)), tensor.file, tensor.offset + start * row_bytes)
        return data

    def read_file(self, file: Path, chunk_bytes: int) -> Iterator[memoryview]:
        """The whole file in order; each piece is valid until the next one is asked for."""
        yield from self.read_span(file, 0, file.stat().st_size, chunk_bytes)

    def read_span(self, file: Path, start: int, stop: int, chunk_bytes: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of a file in order; each piece is valid until the next one is asked for."""
        buffer = memoryview(bytearray(min(chunk_bytes, stop - start)))
        for offset in range(start, stop, chunk_bytes):
            piece = buffer[: min(chunk_bytes, stop - offset)]
            self._fill(piece, file, offset)
            yield piece

    def _fill(self, view: memoryview, file: Path, offset: int) -> None:
        try:
            descriptor = self._open(file)
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise ConversionError(f"{file} ends at byte {offset + done}: it was cut short while being read")
                done += count
        except OSError as error:
            raise ConversionError(f"{file} cannot be read: {error.strerror}") from error

    def _open(self, file: Path) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def source_of_gguf(file: GGUFFile) -> Source:
    """The tensors of an open GGUF file, in the order of its table. Reads it anew: the map may be closed."""
    tensors = {
        info.name: SourceTensor(
            info.name, info.format.name, info.format, info.shape, file.paths[info.part], info.offset, info.nbytes
        )
        for info in file.tensors.values()
    }
    return Source(tensors, file.paths)
