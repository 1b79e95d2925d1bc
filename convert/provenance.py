"""Where a checkpoint comes from: its name, licence, hub repository and revision, and its shards' checksums.

States what the folder itself says and guesses nothing else. Does not know the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..engine.fields import as_kind
from ..engine.gguf import Typed, string
from .checkpoint import Checkpoint
from .source import Source
from .threads import run_in_order

CARD = "README.md"
UNKNOWN_DIGEST = "0" * 64  # as long as a real one, so that a file's size is known before its source is read
_CHUNK_BYTES = 4 << 20
_CARD_BYTES = 1 << 16


def describe_source(checkpoint: Checkpoint) -> dict[str, Typed]:
    """The `general.*` keys that name a checkpoint: name, and where known licence, repository and revision."""
    directory = checkpoint.directory.resolve()
    repository, revision = _find_origin(directory)
    entries = {"general.name": string(_find_name(checkpoint, repository))}
    if licence := _read_licence(directory / CARD):
        entries["general.license"] = string(licence)
    if repository:
        entries["general.source.repository"] = string(repository)
    if revision:
        entries["general.source.revision"] = string(revision)
    return entries


def describe_shards(shards: Sequence[Path], digests: dict[str, str] | None = None) -> dict[str, Typed]:
    """`general.source.shard.N.{name,sha256}`; without `digests` ({file name: hex}) the checksums are zeros."""
    entries = {}
    for n, shard in enumerate(shards):
        entries[f"general.source.shard.{n}.name"] = string(shard.name)
        entries[f"general.source.shard.{n}.sha256"] = string((digests or {}).get(shard.name, UNKNOWN_DIGEST))
    return entries


def hash_files(source: Source, jobs: int, advance: Callable[[int], None]) -> dict[str, str]:
    """{file name: SHA-256 in hex} of every file of a source, `jobs` at a time; `advance` is told bytes as they pass."""

    def hash_file(file: Path) -> str:
        digest = hashlib.sha256()
        for piece in source.read_file(file, _CHUNK_BYTES):
            digest.update(piece)
            advance(len(piece))
        return digest.hexdigest()

    digests = run_in_order((partial(hash_file, file) for file in source.files), jobs)
    return {file.name: digest for file, digest in zip(source.files, digests, strict=True)}


def _find_origin(directory: Path) -> tuple[str, str]:
    """Repository and revision of a folder inside the hub's cache, or the revision of a `hf download --local-dir`.

    A configuration's `_name_or_path` is no witness: fine-tuned checkpoints keep that of the model they began as.
    """
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$", directory.as_posix())
    if cached:
        return f"{cached[1]}/{cached[2]}", cached[3]
    note = directory / ".cache" / "huggingface" / "download" / "config.json.metadata"
    first_line = _read_head(note).partition("\n")[0].strip()
    return "", first_line if re.fullmatch(r"[0-9a-f]{40}", first_line) else ""


def _find_name(checkpoint: Checkpoint, repository: str) -> str:
    stated = as_kind(checkpoint.config.look_up("_name_or_path"), str)
    if not repository and stated and re.fullmatch(r"[\w.-]+/[\w.-]+", stated):
        repository = stated
    return repository.rpartition("/")[2] or checkpoint.directory.resolve().name or "model"


def _read_licence(card: Path) -> str:
    """`license` of a model card's front matter: a word, or a list of one."""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", _read_head(card), re.DOTALL)
    found = re.search(r"^license:\s*(?:-\s*)?([^\s#]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("\"'[]") if found else ""


def _read_head(path: Path) -> str:
    """The beginning of a text file that may be absent or unreadable: what it says is a courtesy."""
    try:
        with path.open("rb") as file:
            return file.read(_CARD_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return ""
