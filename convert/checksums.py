"""SHA-256 of every tensor of a GGUF file, and manifests of them: to see which tensor of a copy is not the original's.

A manifest is text, a line a tensor: `<hex>  <name>`, and one for all that stands before the tensors. Two files with the
same weights and other metadata differ in that line only. Does not know what a tensor means.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ..engine.gguf import GGUFError, open_gguf
from ..engine.outputs import write_text
from ..kernels.display import show
from .source import Source, source_of_gguf
from .threads import Meter, Progress, count_cores, run_in_order

METADATA = "(metadata)"
_CHUNK_BYTES = 4 << 20


class ChecksumError(GGUFError):
    """A file that is not the one its manifest describes, or no manifest."""


def hash_tensors(path: str | Path, jobs: int | None = None, progress: Progress | None = None) -> dict[str, str]:
    """{tensor name: SHA-256 in hex} in the order of the file, the metadata's first. Raises GGUFError."""
    with open_gguf(path) as file:
        source = source_of_gguf(file)
    spans = {}
    for n, part in enumerate(source.files):
        first = min((t.offset for t in source.tensors.values() if t.file == part), default=part.stat().st_size)
        spans[METADATA if n == 0 else f"{METADATA[:-1]} of part {n + 1})"] = part, 0, first
    spans |= {name: (t.file, t.offset, t.offset + t.nbytes) for name, t in source.tensors.items()}
    meter = Meter("verifying", sum(stop - start for _, start, stop in spans.values()), progress)
    with source:
        tasks = (partial(_hash_span, source, *span, meter) for span in spans.values())
        return dict(zip(spans, run_in_order(tasks, jobs or count_cores()), strict=True))


def write_manifest(path: str | Path, digests: Mapping[str, str]) -> None:
    """The whole file, or what was there before. Raises OutputError where it cannot be written."""
    write_text(path, format_manifest(digests))


def format_manifest(digests: Mapping[str, str]) -> str:
    """Backslashes and characters that cannot be seen are escapes in a name, as in JSON."""
    return "".join(f"{digest}  {_escape(name)}\n" for name, digest in digests.items())


def read_manifest(path: str | Path) -> dict[str, str]:
    """{escaped name: SHA-256 in hex}. Raises ChecksumError for a file that is no manifest, or cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ChecksumError(f"{path} cannot be read: {reason}; give what --write-manifest wrote") from error
    found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if not lines or not all(found):
        number = found.index(None) + 1 if lines else 1
        raise ChecksumError(f"{path}, line {number}, is not '<SHA-256>  <tensor>'; give what --write-manifest wrote")
    return {match[2]: match[1] for match in found}


def compare_manifest(digests: Mapping[str, str], manifest: Mapping[str, str]) -> dict[str, str]:
    """{escaped name: what is wrong with it} of the tensors that are not as the manifest says, in its order."""
    here = {_escape(name): digest for name, digest in digests.items()}
    wrong = {name: "missing" for name in manifest if name not in here}
    wrong |= {name: "different" for name, digest in manifest.items() if here.get(name, digest) != digest}
    return wrong | {name: "not in the manifest" for name in here if name not in manifest}


def _hash_span(source: Source, file: Path, start: int, stop: int, meter: Meter) -> str:
    digest = hashlib.sha256()
    for piece in source.read_span(file, start, stop, _CHUNK_BYTES):
        digest.update(piece)
        meter.advance(len(piece))
    return digest.hexdigest()


def _escape(name: str) -> str:
    return show(json.dumps(name, ensure_ascii=False)[1:-1], limit=sys.maxsize)
