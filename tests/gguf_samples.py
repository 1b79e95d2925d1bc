"""A small GGUF file with one key of each kind, for the tests of the reader and of the writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from auricle.engine.gguf import Typed, ValueType, boolean, f32, f32s, i32, i32s, string, strings, u32, u32s, u64
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.kernels.formats import F16, F32, Q4_K, Q8_0

METADATA = {
    "general.architecture": string("test"),
    "z.first": u32(7),
    "a.second": f32(0.1),
    "flag": boolean(True),
    "negative": i32(-5),
    "wide": u64(2**64 - 1),
    "tokens": strings(["a", "", "ñ", "日本", "\n", "🙂"]),
    "scores": f32s([0.5, -1.0]),
    "ids": i32s([-1, 2]),
    "counts": u32s([1, 2, 2**32 - 1]),
    "flags": Typed(ValueType.ARRAY, [True, False], ValueType.BOOL),
}
TENSORS = [("w", (3, 256), Q4_K), ("norm", (5,), F32), ("conv", (2, 3, 4, 7), F16), ("head", (2, 64), Q8_0)]


def fill(path: Path, metadata: dict[str, Typed], tensors: list, alignment: int = 32) -> dict[str, bytes]:
    """Write a file with random tensor bytes, and return those."""
    layout = plan_layout(metadata, tensors, alignment)
    rng = np.random.default_rng(0)
    contents = {name: rng.bytes(info.nbytes) for name, info in layout.tensors.items()}
    with GGUFWriter(path, layout) as writer:
        for name, raw in contents.items():
            writer.write(name, raw)
    assert path.stat().st_size == layout.total_bytes
    return contents
