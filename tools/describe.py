"""What a GGUF file holds, as plain data: metadata, tensors, and bytes by part and by type."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from ..engine.gguf import GGUFFile
from ..engine.models.moss_audio import assumed_keys, part_of

SHOWN_ITEMS = 6  # of an array in the metadata


def describe_file(file: GGUFFile) -> dict[str, Any]:
    """All of a file that can be said in a page: long arrays are shortened to their first items and their length."""
    parts, types = Counter(), Counter()
    for info in file.tensors.values():
        parts[part_of(info.name)] += info.nbytes
        types[info.format.name] += info.nbytes
    return {
        "path": str(file.path),
        "version": file.version,
        "alignment": file.alignment,
        "metadata": {key: shorten(value) for key, value in file.metadata.items()},
        "assumed": assumed_keys(file.metadata),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.format.name, "offset": t.offset, "bytes": t.nbytes}
            | ({"part": t.part + 1} if len(file.paths) > 1 else {})
            for t in file.tensors.values()
        ],
        "bytes_by_part": dict(parts),
        "bytes_by_type": dict(types),
        "tensor_bytes": sum(types.values()),
        "n_weights": sum(math.prod(t.shape) for t in file.tensors.values()),
    }


def shorten(value: Any) -> Any:
    """A value JSON can hold; of a long array its length and first items."""
    if isinstance(value, (list, tuple, np.ndarray)):
        items = [shorten(v) for v in value[:SHOWN_ITEMS]]
        return {"length": len(value), "first": items} if len(value) > SHOWN_ITEMS else items
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
