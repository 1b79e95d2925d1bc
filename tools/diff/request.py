"""What both sides of a comparison are asked: clips as samples, a prompt, and how many tokens to go on for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...engine import Model, load
from ...engine.audio import load_audio
from ...engine.session import AudioSource
from ...kernels.errors import AuricleError

BLOCK_ROWS = 128  # of logits at a time
Part = Literal["all", "first window", "last row"]

IDS, MEL = "input_ids", "mel"
GENERATED = "generated_ids"  # greedy, no id ends it: int32 [n_new]
FORCED = "decode.logits"  # row i: the logits that generated id i was taken from [n_new, n_vocab]


class DiffError(AuricleError):
    """Two sides cannot be compared."""


class Enough(Exception):
    """Raised by the taker of stages when it wants no more; a source passes it on and cleans up."""


@dataclass(frozen=True)
class Request:
    """`clips`: mono float32 at 16 kHz. `time_markers`: None takes what the model file says."""

    clips: tuple[np.ndarray, ...]
    prompt: str
    n_new: int = 0
    time_markers: bool | None = None


@dataclass(frozen=True)
class Blocks:
    """An array of `shape` that comes in blocks of rows, in order, once."""

    shape: tuple[int, ...]
    blocks: Iterator[np.ndarray]


Array = np.ndarray | Blocks
Emit = Callable[[str, Array, Part], None]


def make_request(audio: Sequence[AudioSource], prompt: str, n_new: int, time_markers: bool | None = None) -> Request:
    """Reads the clips. Raises AudioError, or DiffError for a negative number of tokens."""
    if n_new < 0:
        raise DiffError(f"--tokens is {n_new}; it must be 0 or more")
    return Request(tuple(load_audio(clip) for clip in audio), prompt, n_new, time_markers)


def open_model(
    path: Any,
    request: Request,
    *,
    backend: str,
    kv_type: str = "f32",
    precision: str | None = None,
    lora: Sequence[str] = (),
) -> Model:
    """The model with a context that holds the request, and a quarter more for a reference's longer prompt."""
    with load(path, backend="reference") as model:
        n_prompt = len(model.build_prompt(request.prompt, hear(model, request), request.time_markers).ids)
        n_max = model.config.decoder.max_position_embeddings
    n_ctx = n_prompt + n_prompt // 4 + 64 + request.n_new
    return load(path, backend=backend, n_ctx=min(n_ctx, n_max), kv_type=kv_type, precision=precision, lora=lora)


def hear(model: Model, request: Request) -> Any:
    return model.listen(list(request.clips), 16_000)


def blocks_of(array: Array) -> Iterator[np.ndarray]:
    """The rows of an array, a few at a time."""
    if isinstance(array, Blocks):
        yield from array.blocks
    else:
        for start in range(0, len(array), BLOCK_ROWS):
            yield array[start : start + BLOCK_ROWS]
