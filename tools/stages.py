"""Every named value of a request, whole: for tests and benchmarks.

Runs a model with any of its stages captured, and reads stages that others stored. How near two of them are is the
matter of `diff/metrics.py`. Does not know where the other side comes from.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..engine import Model
from ..engine.models.moss_audio import EncoderConfig, clip_windows, token_count
from ..engine.prompts import Prompt
from ..engine.session import Heard
from .diff.metrics import mean_divergence, row_cosines


def read_stages(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A safetensors file of stages: {name: array} and its text metadata."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def trace_stages(model: Model, heard: Heard, prompt: Prompt, names: Collection[str]) -> dict[str, np.ndarray]:
    """Stages of one request: `mel`, of the encoder for all windows, of the decoder for all prompt tokens."""
    decoder = [name for name in names if name.startswith("llm.") or name == "logits"]
    encoder = [name for name in names if name not in decoder and name != "mel"]
    stages = {"mel": np.concatenate(heard.mels, axis=1)} if "mel" in names else {}
    rows = model.runtime.encode(heard.mels) if heard.mels else []
    if encoder:
        stages |= model.runtime.trace_encoder(heard.mels, encoder, {})
    if decoder:
        stages |= model.runtime.trace_decoder(prompt, rows, decoder, {})
    return stages


def window_lengths(c: EncoderConfig, clip_frames: Collection[int]) -> list[int]:
    """Valid tokens of each window of a request."""
    return [token_count(n) for frames in clip_frames for n in clip_windows(c, frames)]


def drop_padding(stage: np.ndarray, lengths: Collection[int]) -> np.ndarray:
    """The valid tokens of a [windows, tokens, d] stage as [n, d]; a stage without windows as it is."""
    if stage.ndim == 2:
        return stage
    return np.concatenate([window[:n] for window, n in zip(stage, lengths, strict=True)])


__all__ = ["drop_padding", "mean_divergence", "read_stages", "row_cosines", "trace_stages", "window_lengths"]
