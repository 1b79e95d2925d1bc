"""A Hugging Face checkpoint folder: config.json and possibly sharded safetensors, whose headers are parsed here.

Knows files, dtypes and offsets. Does not know what a tensor means, nor any GGUF name.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..kernels.formats import BF16, F16, F32, Format
from .source import ConversionError, Source, SourceTensor

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


class Checkpoint(Source):
    """An opened folder. `config` is config.json; `files` are the shards, in name order."""

    def __init__(
        self, directory: Path, config: dict[str, Any], tensors: dict[str, SourceTensor], shards: tuple[Path, ...]
    ) -> None:
        super().__init__(tensors, shards)
        self.directory = directory
        self.config = config


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
        for tensor in read_header(shard):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise ConversionError(f"tensor {tensor.name} is in both {other} and {shard.name}: remove one of them")
            tensors[tensor.name] = tensor
    for name, shard_name in listed.items():
        if name not in tensors or tensors[name].file.name != shard_name:
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


def read_header(shard: Path) -> list[SourceTensor]:
    """The tensors of one safetensors file, in file order; layout: u64 header length, JSON header, data without gaps.

    Raises ConversionError for a file that is none, is cut short or contradicts itself.
    """
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
    return SourceTensor(name, dtype, FLOATS.get(dtype), tuple(shape), shard, data_start + span[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
