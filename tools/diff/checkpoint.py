"""A Hugging Face checkpoint as the other side, computed by our PyTorch model; needs the extra `oracle`.

The spectrogram is transformers' own; the ids of the prompt are this side's, for the model has no tokenizer, and so
they are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...convert.checkpoint import open_checkpoint
from .request import BLOCK_ROWS, FORCED, GENERATED, IDS, MEL, Blocks, DiffError, Emit, Request
from .walk import Walk

RESIDENT_BYTES = 4 << 30  # of float32 weights that stay in memory


class Checkpoint:
    """`walk` gives the ids of the prompt."""

    has_ops = True
    rounds = frozenset()

    def __init__(self, directory: Path, walk: Walk) -> None:
        try:
            import transformers
        except ImportError:
            raise DiffError("--checkpoint needs transformers; install auricle[oracle]") from None
        from ..oracle.model import load_oracle

        self._oracle = load_oracle(directory, RESIDENT_BYTES)
        self._walk = walk
        self.formats = checkpoint_formats(directory)
        self.about: dict[str, Any] = {
            "kind": "checkpoint",
            "path": str(directory),
            "transformers": transformers.__version__,
        }

    def trace(self, request: Request, wanted: Sequence[str], emit: Emit) -> None:
        from ..oracle.probes import probe

        model, ids = self._oracle.model, self._walk.prompt.ids
        mels = [extract_mel(clip, model.audio_encoder.n_mels) for clip in request.clips]
        if mels:
            emit(MEL, np.concatenate(mels, axis=1), "all")
        n_windows = len(self._walk.lengths)

        def on_stage(name: str, value: Any) -> None:
            if name in wanted and not (name.startswith("enc.conv") and len(value) != n_windows):
                dtype = np.float32 if value.is_floating_point() else np.int32
                emit(name, value.numpy().astype(dtype, copy=False), "all")
            if name == "llm.final_norm" and "logits" in wanted:
                emit("logits", self._logits(value), "all")

        n_new = request.n_new if GENERATED in wanted else 0
        if any(name not in self._walk.outline.stages and name not in (MEL, IDS, GENERATED, FORCED) for name in wanted):
            with probe(model, on_stage):
                self._oracle.trace(mels, ids, self._walk.prompt.audio_rows >= 0, on_stage, 0, all_logits=False)
        else:
            self._oracle.trace(mels, ids, self._walk.prompt.audio_rows >= 0, on_stage, n_new, all_logits=False)

    def _logits(self, hidden: Any) -> Blocks:
        head = self._oracle.model.lm_head

        def blocks() -> Iterator[np.ndarray]:
            for rows in hidden.split(BLOCK_ROWS):
                yield head(rows).numpy()

        return Blocks((len(hidden), head.out_features), blocks())


def extract_mel(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """The log-mel [n_mels, n_frames] by transformers' Whisper feature extractor, without padding."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=n_mels, sampling_rate=16_000, hop_length=160, n_fft=400)
    return extractor._np_extract_fbank_features(samples[None], device="cpu")[0].astype(np.float32)


def checkpoint_formats(directory: Path) -> dict[str, str]:
    """{our tensor name: type} of a checkpoint."""
    from ...convert.hf import plan_conversion

    with open_checkpoint(directory) as source:
        return {row.target: source.tensors[row.source].dtype for row in plan_conversion(directory) if row.source}
