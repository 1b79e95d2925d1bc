"""A Hugging Face checkpoint folder: config.json and lazily read, possibly sharded safetensors.

Headers are parsed here and rows are fetched with pread: a mapped shard would count in the resident size.
Knows files, dtypes and offsets. Does not know what a tensor means, nor any GGUF name.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..kernels.errors import AuricleError
from ..kernels.formats import BF16, F16, F32, Format

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bytes of one element; the names are those of the safetensors format.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS: dict[str, Format] = {"F32": F32, "F16": F16, "BF16": BF16}

# The safetensors format's own limit: a longer header is refused before it is read.
MAX_HEADER_BYTES = 100_000_000


class ConversionError(AuricleError):
    """A checkpoint that cannot be converted: what was found, and what to do about it."""


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a shard: `offset` and `nbytes` locate its data in the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
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


@dataclass
class Checkpoint:
    """An opened folder. `config` is config.json; `shards` are in name order; files are opened on first read."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    shards: tuple[Path, ...]
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as stored: uint8 [stop - start, row bytes].

        Raises ConversionError when the file has become shorter than its header says, or cannot be read.
        """
        tensor = self.tensors[name]
        assert 0 <= start <= stop <= tensor.n_rows, f"rows {start}:{stop} of {tensor}"
        row_bytes = tensor.n_cols * DTYPE_BYTES[tensor.dtype]
        data = np.empty((stop - start, row_bytes), np.uint8)
        self._fill(memoryview(data).cast("B"), tensor.shard, tensor.offset + start * row_bytes)
        return data

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as float32 [stop - start, n_cols]; exact from bf16, f16 and f32."""
        return widen(self.read_bytes(name, start, stop), self.tensors[name].dtype)

    def read_shard(self, shard: Path, chunk_bytes: int) -> Iterator[memoryview]:
        """The whole file in order; each piece is valid until the next one is asked for."""
        buffer = memoryview(bytearray(chunk_bytes))
        size = shard.stat().st_size
        for offset in range(0, size, chunk_bytes):
            piece = buffer[: min(chunk_bytes, size - offset)]
            self._fill(piece, shard, offset)
            yield piece

    def _fill(self, view: memoryview, shard: Path, offset: int) -> None:
        try:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(shard, os.O_RDONLY)
            done = 0
            while done < len(view):
                count = os.preadv(self._descriptors[shard], [view[done:]], offset + done)
                if count == 0:
                    raise ConversionError(f"{shard} ends at byte {offset + done}: it was cut short while being read")
                done += count
        except OSError as error:
            raise ConversionError(f"{shard} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bytes uint8 [rows, row bytes] of a float dtype -> float32 [rows, n_cols], exactly."""
    stored = raw.view(FLOATS[dtype].layout)
    if dtype == "BF16":
        bits = stored.astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    return stored.astype("<f4", copy=False)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Read config.json and the headers of every shard; no tensor data is touched.

    Raises ConversionError for a missing folder, config.json or shard, a truncated shard, a header that
    contradicts itself or the file, an unknown dtype, and a tensor found twice.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConversionError(f"{directory} is not a folder: give the folder of a Hugging Face checkpoint")
    config = read_json(directory / CONFIG)
    if config is None:
        raise ConversionError(f"{directory} has no {CONFIG}: give the folder of a Hugging Face checkpoint")
    shards, listed = _find_shards(directory)
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        for tensor in _read_header(shard):
            if tensor.name in tensors:
                other = tensors[tensor.name].shard.name
                raise ConversionError(f"tensor {tensor.name} is in both {other} and {shard.name}: remove one of them")
            tensors[tensor.name] = tensor
    for name, shard_name in listed.items():
        if name not in tensors or tensors[name].shard.name != shard_name:
            raise ConversionError(f"{INDEX} puts tensor {name} in {shard_name}, which does not hold it")
    return Checkpoint(directory, config, tensors, shards)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None when there is no such file; ConversionError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON ({_first_line(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object: fetch it again")
    return content


def _find_shards(directory: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The shard files, and the index's {tensor name: file name} (empty for a single file)."""
    if (directory / SINGLE).exists():
        return (directory / SINGLE,), {}
    index = read_json(directory / INDEX)
    if index is None:
        raise ConversionError(f"{directory} has neither {SINGLE} nor {INDEX}: only safetensors weights are converted")
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ConversionError(f"{directory / INDEX} has no weight_map of names: fetch it again")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name:
            raise ConversionError(f"{INDEX} lists {name!r}: a shard must lie in the checkpoint's own folder")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ConversionError(f"{directory} lacks shards that {INDEX} lists: {', '.join(missing)}; fetch them")
    return tuple(directory / name for name in names), listed


def _read_header(shard: Path) -> list[SourceTensor]:
    """The tensors of one file, in file order; layout: u64 header length, JSON header, data without gaps."""
    try:
        with shard.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ConversionError(f"{shard} is no whole safetensors file: {size} bytes, header of {length}")
            text = file.read(length)
    except OSError as error:
        raise ConversionError(f"{shard} cannot be read: {error.strerror}") from error
    header = _parse_header(shard, text)
    tensors = [_parse_tensor(shard, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise ConversionError(f"{shard}: tensor {tensor.name} starts at byte {tensor.offset}, not at {end}")
        end += tensor.nbytes
    if end > size:
        raise ConversionError(f"{shard} is truncated: its header asks for {end} bytes, it has {size}; fetch it again")
    if end < size:
        raise ConversionError(f"{shard} has {size - end} bytes after its last tensor: fetch it again")
    return tensors


def _parse_header(shard: Path, text: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ConversionError(f"{shard}: {twice!r} is in the header twice")
        return content

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{shard} has a header that is not JSON ({_first_line(error)})") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{shard} has a header that is a {type(header).__name__}, not a JSON object")
    header.pop("__metadata__", None)
    return header


def _parse_tensor(shard: Path, name: str, entry: Any, data_start: int) -> SourceTensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2 or not isinstance(dtype, str):
        raise ConversionError(f"{shard}: tensor {name} has a damaged header entry: {str(entry)[:120]}")
    if dtype not in DTYPE_BYTES:
        raise ConversionError(f"{shard}: tensor {name} has the unknown dtype {dtype[:40]!r}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if span[1] - span[0] != nbytes:
        raise ConversionError(
            f"{shard}: tensor {name} ({dtype} {shape}) needs {nbytes} bytes, its header gives it {span[1] - span[0]}"
        )
    return SourceTensor(name, dtype, tuple(shape), shard, data_start + span[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
