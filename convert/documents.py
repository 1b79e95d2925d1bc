"""JSON that others wrote, as fields that are asked for with their kind: the sibling of a GGUF file's metadata.

Checked once, when it is read: a regular file of a sane size, UTF-8, whole numbers of a sane length, texts without half
characters. Knows no key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..engine.fields import Fields
from ..kernels.errors import AuricleError
from .source import ConversionError

REMEDY = "fetch it again"
MAX_BYTES = 1 << 27  # a tokenizer.json of 250k tokens has 35 MB
MAX_DIGITS = 100  # of a whole number; tokenizers write 10**30 for "no limit"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a pair, or all of one


class Document(Fields):
    """A JSON object. A key is a path: `audio_config.d_model`; null counts as absent."""

    def look_up(self, key: str) -> Any:
        """Raises the error of the document where the path leads through something that is no object."""
        node: Any = self.values
        parts = key.split(".")
        for n, part in enumerate(parts):
            if not isinstance(node, Mapping):
                raise self.complaint(".".join(parts[:n]), "it must be an object")
            node = node.get(part)
            if node is None:
                return None
        return node

    def inside(self, values: Mapping[str, Any], place: str) -> Document:
        """An object in a list of this one; `place` says where."""
        return Document(values, f"{self.where}, {place}", self.error, self.remedy)


def read_document(path: Path, error: type[AuricleError] = ConversionError, remedy: str = REMEDY) -> Document | None:
    """The JSON object in `path`, None when there is no such file; `error` for anything else."""
    data = read_whole(path, error, remedy)
    return None if data is None else parse_document(data, path, error, remedy)


def parse_document(
    data: bytes, where: object, error: type[AuricleError] = ConversionError, remedy: str = REMEDY
) -> Document:
    """The JSON object that `data` is; `error` for anything else."""
    content = parse_json(data, where, error, remedy)
    if not isinstance(content, dict):
        raise error(f"{where} holds a {type(content).__name__}, not a JSON object; {remedy}")
    return Document(content, where, error, remedy)


def parse_json(
    data: bytes,
    where: object,
    error: type[AuricleError] = ConversionError,
    remedy: str = REMEDY,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """What `data` says; `pairs` makes something else of an object than a dict, as for `json.loads`."""
    try:
        content = json.loads(data.decode("utf-8"), parse_int=_parse_int, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as problem:
        reason = str(problem).partition("\n")[0] or type(problem).__name__
        raise error(f"{where} is not JSON ({reason}); {remedy}") from None
    if _SURROGATE.search(data) and not all(_is_unicode(text) for text in _texts(content)):
        raise error(f"{where} has half a character in a text (a lone surrogate); {remedy}")
    return content


def read_whole(path: Path, error: type[AuricleError] = ConversionError, remedy: str = REMEDY) -> bytes | None:
    """The bytes of a small file, None when there is none; `error` for what cannot be read, or is too large."""
    try:
        if not path.exists():
            return None
        if not path.is_file():  # reading a pipe could wait for ever
            raise error(f"{path} is not a regular file; {remedy}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be read: {reason}; {remedy}") from None
    if len(data) > MAX_BYTES:
        raise error(f"{path} has more than {MAX_BYTES:,} bytes, which no such file has; {remedy}")
    return data


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _texts(content: Any) -> Iterator[str]:
    """Every text in a document, keys too."""
    waiting = [content]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            waiting += [*node, *node.values()]
        elif isinstance(node, (list, tuple)):
            waiting += node
