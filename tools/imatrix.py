"""Collects an importance matrix: runs a model over recordings and sums up what its matrices see.

The engine's observers do the summing (`rewrite.observe`); here is what is run: each clip through the encoder, its
prompt through the decoder, and the answer token by token, greedily. Knows nothing of the file the sums go to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ..convert.importance import ColumnSums, ImportanceMatrix, merge
from ..convert.source import ConversionError
from ..engine import Model
from ..engine.finite import check_logits
from ..engine.prompts import TASKS, Prompt
from ..engine.rewrite import observed_weights
from ..engine.runtime import Runtime
from ..engine.sampling import OptionError
from ..engine.session import ContextError, Heard

MAX_NEW_TOKENS = 64

Progress = Callable[[int, int], None]


def collect_importance(
    model: Model,
    clips: Sequence[str],
    text: str = TASKS["transcribe"],
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """The energy each matrix of `model` sees at its input, over one request a clip with the question `text`.

    The prompt and up to `max_new_tokens` tokens of the answer count; of the head's input only the rows that choose
    a token, since it reads no others. `progress(done, total)` counts clips.
    Raises AudioError, PromptError and ContextError, for any of the clips before the first one is run, and OptionError;
    ModelError for weights that are NaN or infinite.
    """
    if max_new_tokens < 0:
        raise OptionError(f"max_new_tokens is {max_new_tokens}; it must not be negative")
    for clip in clips:
        read_request(model, clip, text)
    sums: dict[str, torch.Tensor] = {}
    runtime = Runtime(
        model.file, model.config, model.backend, n_ctx=model.n_ctx, kv_format=model.kv_format, observers=sums
    )
    for n, clip in enumerate(clips):
        heard, prompt = read_request(model, clip, text)
        with model.blaming():
            run_request(runtime, heard, prompt, max_new_tokens, model.stop_ids)
        if progress:
            progress(n + 1, len(clips))
    return ImportanceMatrix(merge(by_weight(sums)).sums, tuple(clips))


def read_request(model: Model, clip: str, text: str) -> tuple[Heard, Prompt]:
    """A clip's spectrogram, and the prompt that asks `text` about it."""
    heard = model.listen(clip)
    prompt = model.build_prompt(text, heard)
    if len(prompt.ids) >= model.n_ctx:
        raise ContextError(
            f"{clip}: the prompt is {len(prompt.ids)} tokens and the context holds {model.n_ctx}; cut the recording"
        )
    return heard, prompt


def run_request(runtime: Runtime, heard: Heard, prompt: Prompt, max_new_tokens: int, stop_ids: frozenset[int]) -> None:
    """Runs the prompt and then the likeliest tokens through the decoder, as far as the budget and the context reach.
    Raises NonFiniteError for logits that are no numbers."""
    logits = runtime.prefill(prompt, runtime.encode(heard.mels))
    check_logits(logits)
    first = len(prompt.ids)
    for position in range(first, min(first + max_new_tokens, runtime.n_ctx)):
        token = int(np.argmax(logits))
        if token in stop_ids:
            break
        logits = runtime.decode(token, position)


def check_columns(model: Model, matrix: ImportanceMatrix, path: str) -> None:
    """Raises ConversionError for a matrix from `path` that names no weight of `model`, or one of another width."""
    if not matrix.sums.keys() & model.file.tensors.keys():
        first = next(iter(matrix.sums))
        raise ConversionError(
            f"{path} names no weight of this model ({first} and {len(matrix.sums) - 1} others); merge only "
            "what was collected on this model"
        )
    for name, sums in matrix.sums.items():
        info = model.file.tensors.get(name)
        if info is not None and info.shape[-1] != sums.squares.size:
            raise ConversionError(
                f"{path}: {name} has {sums.squares.size} columns, in the model {info.shape[-1]}; "
                "merge only what was collected on this model"
            )


def by_weight(sums: Mapping[str, torch.Tensor]) -> list[ImportanceMatrix]:
    """What each observer's state says about each weight that shares it, apart."""
    return [
        ImportanceMatrix({weight: ColumnSums(state[:-1].numpy(), int(state[-1]))})
        for name, state in sums.items()
        for weight in observed_weights(name)
    ]
