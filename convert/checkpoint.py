"""A Hugging Face checkpoint folder: config.json and possibly sharded safetensors, whose headers are parsed here.

Knows files, dtypes and offsets. Does not know what a tensor means, nor any GGUF name.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..engine.fields import Fields
from ..kernels.formats import BF16, F16, F32, Format
from ..kernels.quote import quote
from .documents import Document, parse_json, read_document
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
MAX_DIMS, MAX_NAME = 8, 256
ENTRY = {"dtype": str, "shape": list[int], "data_offsets": list[int]}
_SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)


class Checkpoint(Source):
    """An opened folder. `config` is config.json; `files` are the shards, in name order."""

    def __init__(
        self, directory: Path, config: Document, tensors: dict[str, SourceTensor], shards: tuple[Path, ...]
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
    config = read_document(directory / CONFIG)
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


def _find_shards(directory: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The shard files, and the index's {tensor name: file name} (empty for a single file)."""
    if (directory / SINGLE).exists():
        return (directory / SINGLE,), {}
    index = read_document(directory / INDEX)
    if index is None:
        raise ConversionError(f"{directory} has neither {SINGLE} nor {INDEX}: only safetensors weights are converted")
    listed = index.require("weight_map", dict)
    for name in listed.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ConversionError(
                f"{INDEX} lists {quote(name)}: a shard is a .safetensors file in the checkpoint's own folder"
            )
    names = sorted(set(listed.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConversionError(f"{directory} lacks shards that {INDEX} lists: {first}; fetch them")
    return tuple(directory / name for name in names), listed


def read_header(shard: Path) -> list[SourceTensor]:
    """The tensors of one safetensors file, in file order; layout: u64 header length, JSON header, data without gaps.

    Raises ConversionError for a file that is none, is cut short or contradicts itself.
    """
    if not shard.is_file():
        raise ConversionError(f"{shard} is not a regular file; fetch it again")
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
            raise ConversionError(f"{shard}: {quote(twice)} is in the header twice")
        return content

    header = parse_json(text, f"{shard}, header", pairs=refuse_duplicates)
    if not isinstance(header, dict):
        raise ConversionError(f"{shard} has a header that is a {type(header).__name__}, not a JSON object")
    header.pop("__metadata__", None)
    return header


def _parse_tensor(shard: Path, name: str, entry: Any, data_start: int) -> SourceTensor:
    if not name.isprintable() or len(name) > MAX_NAME:
        raise ConversionError(f"{shard} has a tensor of the name {quote(name)}: no model has such")
    where = f"{shard}: tensor {name}"
    if not isinstance(entry, dict):
        raise ConversionError(f"{where} has a damaged header entry: {quote(entry)}")
    fields = Fields(entry, where, ConversionError, "fetch it again")
    dtype, shape, span = (fields.require(key, kind) for key, kind in ENTRY.items())
    if len(shape) > MAX_DIMS or len(span) != 2 or not all(0 <= n < 1 << 63 for n in (*shape, *span)):
        raise ConversionError(f"{where} has a damaged header entry: {quote(entry)}")
    if dtype not in DTYPE_BYTES:
        raise ConversionError(f"{where} has the unknown dtype {quote(dtype)}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if span[1] - span[0] != nbytes:
        raise ConversionError(
            f"{where} ({dtype} {shape}) needs {nbytes} bytes, its header gives it {span[1] - span[0]}"
        )
    return SourceTensor(name, dtype, FLOATS.get(dtype), tuple(shape), shard, data_start + span[0], nbytes)
