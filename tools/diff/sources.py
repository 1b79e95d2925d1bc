"""Where the other side's stages come from: files of activations, another model file, and models in PyTorch.

A source has one method, `trace`: it hands each wanted stage it has to `emit`, in an order in which stages can be
computed, and keeps none. Stages of the encoder come by window or as rows of valid tokens. `official.py` and
`checkpoint.py` hold the two that run PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...engine import Model
from ...engine.gguf import open_gguf
from ...engine.weights import load_weight
from .request import FORCED, GENERATED, IDS, MEL, DiffError, Emit, Part, Request, open_model
from .walk import Walk


class Source(Protocol):
    """`has_ops`: whether it can give values inside stages. `formats`: the type of each of its tensors, {} if exact.
    `rounds`: types whose activations it rounds.
    `about`: facts for the report."""

    has_ops: bool
    formats: Mapping[str, str]
    rounds: frozenset[str]
    about: dict[str, Any]

    def trace(self, request: Request, wanted: Sequence[str], emit: Emit) -> None:
        """Hands over the wanted stages; ends early with `Enough` when `emit` raises it."""


@dataclass
class StoredStages:
    """Stages in a file: no values inside them, and no weights."""

    rounds = frozenset()
    path: Path
    has_ops: bool = False
    formats: Mapping[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageFile(StoredStages):
    """Stages in a safetensors file, under their own names."""

    def __post_init__(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "np") as file:
                self._names = set(file.keys())
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise DiffError(f"{self.path} is no safetensors file: {error}") from None
        self.about = {"kind": "stages", "path": str(self.path), "metadata": metadata}
        self.prompt = metadata.get("text")

    def trace(self, request: Request, wanted: Sequence[str], emit: Emit) -> None:
        from safetensors import safe_open

        if not self._names.intersection(wanted):
            raise DiffError(f"{self.path} holds none of the stages; it has {', '.join(sorted(self._names)[:5])} …")
        with safe_open(self.path, "np") as file:
            for name in wanted:
                if name in self._names:
                    emit(name, file.get_tensor(name), "all")


# Names in activation archives of the C++ peer -> stages here, and which rows of a stage it stores.
ARCHIVE: dict[str, tuple[str, Part]] = {
    "mel_spectrogram": (MEL, "all"),
    "enc_post_stem_proj": ("enc.stem_proj", "first window"),
    "enc_layer_{}": ("enc.blk.{}", "first window"),
    "encoder_output": ("enc.out", "all"),
    "adapter_output": ("adapter", "all"),
    "deepstack_proj_{}": ("deepstack.{}", "all"),
    "prefill_inputs_embeds": ("llm.embed", "all"),
    "prefill_lm_layer_{}": ("llm.blk.{}", "all"),
    "prefill_last_hidden": ("llm.final_norm", "last row"),
    "prefill_logits_step0": ("logits", "last row"),
    "prefill_argmax_step0": (GENERATED, "all"),
}


def from_archive(name: str) -> tuple[str, Part] | None:
    """The stage that a tensor of an archive is; our own names are taken, too."""
    stem, _, number = name.rpartition("_")
    if name in ARCHIVE:
        return ARCHIVE[name]
    if number.isdigit() and f"{stem}_{{}}" in ARCHIVE:
        stage, part = ARCHIVE[f"{stem}_{{}}"]
        return stage.format(number), part
    return None


@dataclass
class StageArchive(StoredStages):
    """Stages in a GGUF file, as the C++ peer archives them, or under their own names."""

    def __post_init__(self) -> None:
        with open_gguf(self.path) as file:
            self._stages = {(from_archive(name) or (name, "all"))[0]: name for name in file.tensors}
            metadata = {k: v for k, v in file.metadata.items() if isinstance(v, (str, int, float, bool))}
        self.about = {"kind": "archive", "path": str(self.path), "metadata": metadata}
        self.prompt = None

    def trace(self, request: Request, wanted: Sequence[str], emit: Emit) -> None:
        if not self._stages.keys() & set(wanted):
            raise DiffError(f"{self.path} holds none of the stages; it has {', '.join(sorted(self._stages)[:5])} …")
        with open_gguf(self.path) as file:
            for stage in wanted:
                if stage not in self._stages:
                    continue
                name = self._stages[stage]
                _, part = from_archive(name) or (stage, "all")
                value = load_weight(file, name).decode().numpy()
                emit(stage, value.astype(np.int32) if stage in (IDS, GENERATED) else value, _first(part, value))


def _first(part: Part, value: np.ndarray) -> Part:
    """A stage by window is whole; only an array of rows can be a part of one."""
    return "all" if part == "first window" and value.ndim > 2 else part


class ModelFile:
    """A model file on a backend, run stage by stage as the other side is."""

    has_ops = True

    def __init__(self, path: Path, request: Request, backend: str, kv_type: str = "f32") -> None:
        self._model: Model = open_model(path, request, backend=backend, kv_type=kv_type)
        self.formats = {name: t.format.name for name, t in self._model.file.tensors.items()}
        self.rounds = self._model.backend.rounds
        self.about = {"kind": "model", "path": str(path), "backend": backend, "kv_type": kv_type}

    def trace(self, request: Request, wanted: Sequence[str], emit: Emit) -> None:
        Walk(self._model, request).emit_all(wanted, emit)

    def close(self) -> None:
        self._model.close()


def open_stages(path: Path) -> StageFile | StageArchive:
    """A file of activations, by what its first bytes say."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DiffError(f"cannot read {path}: {error.strerror}") from None
    return StageArchive(path) if magic == b"GGUF" else StageFile(path)


__all__ = ["ARCHIVE", "FORCED", "ModelFile", "Source", "StageArchive", "StageFile", "open_stages"]
