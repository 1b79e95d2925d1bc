"""From config.json to the numbers a GGUF file states, checked so that the model they describe can run.

Knows MOSS-Audio's configuration through the tables of `names/moss_audio.py`. Does not know tensors' data
or the tokenizer's files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.gguf import Typed, ValueType, f32, u32
from ..kernels.quote import quote
from .checkpoint import CONFIG, Checkpoint, ConversionError
from .documents import Document
from .names import moss_audio as names
from .names.table import KeyRow

MAX_F32 = 3.4e38
MEL_STRIDE = 8  # three convolutions of stride 2
_PATHS = {row.key: row.paths[0] for row in names.KEYS}


@dataclass(frozen=True)
class Hyperparameters:
    """`values` by GGUF key (after the architecture's name), `flags` for the name table's conditions."""

    values: dict[str, int | float]
    taps: tuple[int, ...]
    flags: frozenset[str]
    assumed: tuple[str, ...] = ()  # what the configuration leaves open, in words

    def metadata(self) -> dict[str, Typed]:
        """The keys as a GGUF file holds them; the window and the taps included."""
        types = {row.key: row.type for row in names.KEYS}
        entries = {key: (f32 if types.get(key) is ValueType.FLOAT32 else u32)(v) for key, v in self.values.items()}
        entries["deepstack.num_taps"] = u32(len(self.taps))
        entries |= {f"deepstack.tap.{k}": u32(tap) for k, tap in enumerate(self.taps)}
        return {f"{names.ARCHITECTURE}.{key}": value for key, value in entries.items()}


def read_hyperparameters(checkpoint: Checkpoint) -> Hyperparameters:
    """Read and check config.json.

    Raises ConversionError for another model, a missing or wrong value (named), and shapes the engine does not run.
    """
    config = checkpoint.config
    _check_family(config)
    _check_fixed(config, names.FIXED)
    values = {row.key: _read_value(config, row) for row in names.KEYS}
    taps, n_injected = _read_taps(config, values)
    values["deepstack.num_inject_layers"] = n_injected
    _check_window(values)
    _check_heads(values)
    _check_counts(values, len(checkpoint.tensors))
    flags = {"tied" if read_tied(config) else "untied"}
    if values["enc.output_dim"] != values["enc.d_model"]:
        flags.add("out_proj")
    assumed = tuple(
        f"{CONFIG} lacks {row.paths[0]}: {row.default} is assumed, as in the official code"
        for row in names.KEYS
        if row.default is not None and all(config.look_up(path) is None for path in row.paths)
    )
    return Hyperparameters(values, taps, frozenset(flags), assumed)


def check_mel(processor: Document, n_mels: int) -> None:
    """Raise ConversionError when a processor's mel settings differ from the front end's only ones."""
    fixed = names.FIXED_MEL | {"mel_dim": (n_mels,)}
    _check_fixed(processor, {f"mel_config.{key}": allowed for key, allowed in fixed.items()})


def _check_family(config: Document) -> None:
    model_type, architectures = config.get("model_type", str), config.get("architectures", list[str], [])
    known = [] if model_type is None else [model_type in names.MODEL_TYPES]
    known += [any(name in names.ARCHITECTURES for name in architectures)] if architectures else []
    if not known or not all(known):
        raise ConversionError(
            f"{config.where} describes model_type {quote(model_type)}, architectures {quote(architectures)}: only "
            f"{names.MODEL_TYPES[0]} ({names.ARCHITECTURES[0]}) checkpoints are converted"
        )


def _check_fixed(document: Document, fixed: Mapping[str, tuple]) -> None:
    for path, allowed in fixed.items():
        found = document.look_up(path)
        if found is not None and found not in allowed:
            raise document.complaint(path, f"the engine runs {allowed[0]!r} only")


def _read_value(config: Document, row: KeyRow) -> int | float:
    path = next((path for path in row.paths if config.look_up(path) is not None), row.paths[0])
    if row.type is not ValueType.FLOAT32:
        value = config.get(path, int, row.default, within=(1, (1 << 32) - 1))
    else:
        value = config.get(path, float, row.default)
        if value is not None and not 0 < value < MAX_F32:
            raise config.complaint(path, "it must be a positive number")
    return config.require(path, int) if value is None else value


def _read_taps(config: Document, values: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """The tapped encoder layers, and how many of them are injected: one decoder layer each."""
    taps = config.get(names.TAPS, list[int], [])
    n_layer = values["enc.encoder_layers"]
    if not all(0 <= tap < n_layer for tap in taps):
        raise config.complaint(names.TAPS, f"the encoder has layers 0 to {n_layer - 1}")
    if len(set(taps)) != len(taps):
        raise config.complaint(names.TAPS, "a layer may be tapped only once")
    n_injected = min(len(taps), config.get(names.INJECTED, int, len(taps), within=(0, math.inf)))
    if n_injected > values["llm.num_layers"]:
        raise ConversionError(
            f"{CONFIG} injects {n_injected} taps into {values['llm.num_layers']} decoder layers: one layer takes one"
        )
    return tuple(taps), n_injected


def read_tied(config: Document) -> bool:
    """Whether the embedding serves as head too; the checkpoint's own statement goes before its decoder's."""
    found = (config.get(path, bool) for path in names.TIED)
    return next((tied for tied in found if tied is not None), False)


def _check_window(values: Mapping[str, Any]) -> None:
    n_frames, n_mels = 2 * values["enc.n_window"], values["enc.num_mel_bins"]
    if n_frames % MEL_STRIDE:
        raise ConversionError(
            f"{CONFIG} says audio_config.n_window = {values['enc.n_window']}: "
            f"a window of {n_frames} frames is no multiple of {MEL_STRIDE}, and such a model does not run"
        )
    if n_mels % MEL_STRIDE:
        raise ConversionError(f"{CONFIG} says audio_config.num_mel_bins = {n_mels}: no multiple of {MEL_STRIDE}")


def _check_heads(values: Mapping[str, Any]) -> None:
    for whole, parts in (("enc.d_model", "enc.encoder_attention_heads"), ("llm.num_heads", "llm.num_kv_heads")):
        if values[whole] % values[parts]:
            raise ConversionError(
                f"{CONFIG} says {_PATHS[whole]} = {values[whole]}: no multiple of {_PATHS[parts]} = {values[parts]}"
            )
    for even in ("enc.d_model", "llm.head_dim"):
        if values[even] % 2:
            raise ConversionError(f"{CONFIG} says {_PATHS[even]} = {values[even]}: positions need an even number")


def _check_counts(values: Mapping[str, Any], n_tensors: int) -> None:
    for key in names.LAYER_COUNTS:
        if values[key] > n_tensors:
            raise ConversionError(
                f"{CONFIG} says {_PATHS[key]} = {values[key]}: the checkpoint has only {n_tensors} tensors in all"
            )
