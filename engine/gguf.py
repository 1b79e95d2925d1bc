"""A GGUF file over a memory map: metadata as Python values, tensors as views of the file.

A model may be split into several files, as llama.cpp's tools do: any part stands for the whole. Does not know what a
key means, what a model needs, or how weights are decoded. `gguf_header.py` reads one file, `gguf_write.py` writes one.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..kernels.quote import quote
from .fields import Fields
from .gguf_cursor import GGUFError, ValueType
from .gguf_header import (
    DEFAULT_ALIGNMENT,
    Header,
    TensorInfo,
    Typed,
    align,
    boolean,
    f32,
    f32s,
    i32,
    i32s,
    read_header,
    string,
    strings,
    u32,
    u32s,
    u64,
)

__all__ = [
    "DEFAULT_ALIGNMENT", "GGUFError", "GGUFFile", "SPLIT_KEYS", "TensorInfo", "Typed", "ValueType", "align", "boolean",
    "f32", "f32s", "i32", "i32s", "open_gguf", "string", "strings", "u32", "u32s", "u64",
]  # fmt: skip

SPLIT_KEYS = "split."  # begins the keys of a part
SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GGUFFile(Fields):
    """An open file, made by `open_gguf`. Several threads may read from it at once.

    `get` and `require` check the kind of a key's value. `metadata` has all values in file order: int, float, bool, str,
    list[str], read-only NumPy arrays of numbers (copies), lists of those for arrays inside arrays. `types` has the same
    keys with the types in the file. `paths` are all parts of a split file.
    """

    def __init__(self, path: Path, parts: Sequence[Header]) -> None:
        first = parts[0]
        self.path, self.paths = path, tuple(part.path for part in parts)
        self.version, self.alignment, self.types = first.version, first.alignment, first.types
        self.metadata: dict[str, Any] = {key: _plain(typed) for key, typed in first.types.items()}
        super().__init__(self.metadata, path, GGUFError, "the file is damaged or of another kind, convert it again")
        self.tensors: dict[str, TensorInfo] = {}
        for n, part in enumerate(parts):
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise GGUFError(f"{self.where}: tensor {quote(name)} is in two parts; split the file again")
                self.tensors[name] = replace(info, part=n) if n else info
        self._maps: tuple[mmap.mmap, ...] = tuple(part.map for part in parts)

    def tensor(self, name: str) -> TensorInfo:
        """The record of tensor `name`. Raises GGUFError where the file lacks it."""
        if name not in self.tensors:
            raise GGUFError(f"{self.where}: tensor {quote(name)} is missing; the file is cut short or of another model")
        return self.tensors[name]

    def data(self, name: str) -> np.ndarray:
        """The stored bytes of tensor `name`: uint8 [*shape[:-1], row_bytes], a read-only view of the file.

        Raises GGUFError where the file lacks the tensor.
        """
        assert self._maps, f"{self.path} is closed"
        info = self.tensor(name)
        flat = np.frombuffer(self._maps[info.part], np.uint8, info.nbytes, info.offset)
        return flat.reshape(*info.shape[:-1], info.format.row_bytes(info.shape[-1]))

    def forget(self, name: str) -> None:
        """Tensor `name` will not be read soon: its pages leave this process's memory. They stay in the system's cache
        while there is room, and a later read maps them again."""
        assert self._maps, f"{self.path} is closed"
        info = self.tensor(name)
        first, end = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE, info.offset + info.nbytes
        n_bytes = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if n_bytes > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[info.part].madvise(mmap.MADV_DONTNEED, first, n_bytes)

    def check_size(self) -> None:
        """Raises GGUFError where the file on disk is shorter than it was when it was opened: to read what it lacks now
        ends the process with SIGBUS, and the rest of the last page reads as zeros."""
        assert self._maps, f"{self.path} is closed"
        for path, data in zip(self.paths, self._maps, strict=True):
            size = data.size()  # of the file that was opened, whatever its name stands for now
            if size < len(data):
                raise GGUFError(
                    f"{path} was cut from {len(data):,} to {size:,} bytes while it was in use; fetch it again"
                )

    def close(self) -> None:
        """Let go of the map. Views handed out before stay valid: the last of them to die unmaps the file."""
        maps, self._maps = self._maps, ()
        for data in maps:
            try:
                data.close()
            except BufferError:
                continue  # views are alive, and each holds a reference to the map

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and read its header; tensor data stays on disk until it is looked at. Of a split file any part
    may be named: all are opened.

    Raises GGUFError, with the field at fault, for a file that is missing, empty, of another kind or version,
    truncated, or inconsistent, and for a part whose companions are missing or of another file. A file must not shrink
    while it is open: the system answers that with SIGBUS.
    """
    path = Path(path)
    header = read_header(path)
    count, number = _read_place(header)
    if count < 2:  # a file that was merged again has a count of 0
        return GGUFFile(path, [header])
    parts = [
        header if n == number else _read_companion(companion, n, count)
        for n, companion in enumerate(_find_parts(header, count, number))
    ]
    file = GGUFFile(path, parts)
    stated = Fields(file.metadata, path, GGUFError, "split the file again").get(SPLIT_TENSORS, int)
    if stated is not None and stated != len(file.tensors):
        raise GGUFError(f"{file.where}: its {count} parts hold {len(file.tensors)} tensors, {stated} were split")
    return file


def _read_place(header: Header) -> tuple[int, int]:
    """How many files a model is split into, and the number of this one, from 0."""
    fields = Fields({key: t.value for key, t in header.types.items()}, header.path, GGUFError, "split the file again")
    count = fields.get(SPLIT_COUNT, int, 0, within=(0, 99_999))
    return count, fields.require(SPLIT_NO, int, within=(0, count - 1)) if count > 1 else 0


def _find_parts(header: Header, count: int, number: int) -> list[Path]:
    """The paths of all parts, all of which exist."""
    this = f"{header.path} is part {number + 1} of {count} of a split file"
    found = _PART_NAME.fullmatch(header.path.name)
    if found is None or (int(found[2]), int(found[3])) != (number + 1, count):
        raise GGUFError(
            f"{this}, and its name does not say so; name the parts NAME-{1:05d}-of-{count:05d}.gguf and so on, or join "
            "them with llama-gguf-split --merge"
        )
    names = [f"{found[1]}-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count)]
    missing = next((name for name in names if not header.path.with_name(name).is_file()), None)
    if missing is not None:
        raise GGUFError(f"{this}; missing {header.path.with_name(missing)}: put all parts into one folder")
    return [header.path.with_name(name) for name in names]


def _read_companion(path: Path, number: int, count: int) -> Header:
    """Another part. Raises GGUFError where it does not say that it is that."""
    header = read_header(path)
    if _read_place(header) != (count, number):
        raise GGUFError(f"{path} does not say that it is part {number + 1} of {count}; split the file again")
    return header


def _plain(typed: Typed) -> Any:
    return [_plain(inner) for inner in typed.value] if typed.item is ValueType.ARRAY else typed.value
