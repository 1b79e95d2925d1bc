"""Configurations from GGUF keys: a frozen dataclass whose fields are the keys. Knows no model."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ...kernels.errors import AuricleError
from ...kernels.quote import quote

if TYPE_CHECKING:
    from ..gguf import GGUFFile

T = TypeVar("T")


class ModelError(AuricleError):
    """A model file that opens but cannot be run: a key, a tensor or a shape is not what the model needs."""


def absent_fields(cls: type, metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Keys of the dataclass `cls` that a file lacks and `read_config` fills with a default: with that."""
    defaults = {f"{prefix}.{f.name}": f.default for f in dataclasses.fields(cls)}
    return {k: v for k, v in defaults.items() if v is not dataclasses.MISSING and k not in metadata}


def read_config(cls: type[T], file: GGUFFile, prefix: str) -> T:
    """Fills the dataclass `cls` from the keys `prefix.<field>`. A field without a default must be in the file.

    Raises GGUFError for a missing key or a wrong kind, ModelError for a size below 1.
    """
    kinds = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        key, kind = f"{prefix}.{field.name}", kinds[field.name]
        if field.default is not dataclasses.MISSING and key not in file.metadata:
            continue
        values[field.name] = file.require(key, kind)
        if kind in (int, float) and not values[field.name] > 0:
            raise ModelError(f"{file.where}: {key} is {quote(values[field.name])}; it must be positive")
    return cls(**values)
