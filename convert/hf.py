"""Plans the GGUF file of a Hugging Face checkpoint: its names, its metadata, its tokenizer.

Knows a checkpoint and the name table. Reads headers and small files only; `stream.py` writes what is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..engine.gguf import Typed, boolean, string, u32
from ..engine.lora import LoraSpec, parse_lora
from ..engine.mel import hann_window, mel_filters
from ..kernels.quote import quote
from .checkpoint import CONFIG, FLOATS, Checkpoint, open_checkpoint
from .documents import REMEDY, Document, read_document
from .hyperparameters import Hyperparameters, check_mel, read_hyperparameters
from .merge import plan_merge
from .names import moss_audio as names
from .names.table import Target, compare, evaluate_shape, expand, fold
from .plan import ConversionPlan, Wanted, describe_types, make_plan
from .provenance import describe_shards, describe_source
from .recipes import DEFAULT, Rule, find_recipe
from .source import ConversionError
from .stream import convert
from .vocabulary import Vocabulary, read_vocabulary

__all__ = ["convert", "find_audio_ids", "plan_conversion", "read_processor", "read_world"]

PROCESSOR, GENERATION = "processor_config.json", "generation_config.json"


def plan_conversion(
    checkpoint_dir: str | Path,
    type_name: str = DEFAULT,
    overrides: Sequence[Rule] = (),
    importance: Mapping[str, np.ndarray] | None = None,
    *,
    lora: Sequence[LoraSpec] = (),
) -> ConversionPlan:
    """Plan the conversion of a Hugging Face folder to a GGUF file of the recipe `type_name`.

    `overrides` go before the recipe's rules; `importance` is {GGUF name: float32 [n_cols]}; the adapters `lora` are
    merged into the weights.
    Raises ConversionError for a checkpoint that does not match the name table exactly (both lists in the message),
    wrong shapes and dtypes, a configuration or tokenizer that is missing, wrong or unsupported, importances of another
    width and overrides that match nothing; LoraError as `read_loras` does.
    """
    recipe = find_recipe(type_name)
    checkpoint = open_checkpoint(checkpoint_dir)
    settings, targets, dropped = read_world(checkpoint)
    processor = read_processor(checkpoint.directory)
    check_mel(processor, int(settings.values["enc.num_mel_bins"]))
    audio_ids = find_audio_ids(processor, checkpoint.config, int(settings.values["llm.vocab_size"]))
    placeholders = {text: audio_ids[key] for key, _, text in names.AUDIO_TOKENS}
    vocabulary = read_vocabulary(checkpoint.directory, int(settings.values["llm.vocab_size"]), placeholders)
    time_markers = _read_time_markers(processor, vocabulary)
    metadata = {
        "general.architecture": string(names.ARCHITECTURE),
        **describe_source(checkpoint),
        **describe_types(recipe),
        **describe_shards(checkpoint.files),
        **settings.metadata(),
        f"{names.ARCHITECTURE}.time_markers": boolean(time_markers),
        **_describe_tokens(checkpoint, vocabulary, audio_ids),
    }
    metadata |= _complete_tokenizer(vocabulary.metadata(), metadata)
    shapes = {target.name: target.shape for target in targets.values()}
    adapters, merged = plan_merge(lora, names.ARCHITECTURE, shapes, checkpoint.directory)
    wanted = [Wanted(target.name, target.shape, source) for source, target in targets.items()]
    computed = _compute(settings)
    wanted += [Wanted(name, values.shape) for name, values in computed.items()]
    notes = settings.assumed + vocabulary.notes + tuple(f"{name} is left out: {why}" for name, why in dropped.items())
    choices = {"overrides": overrides, "importance": importance, "adapters": adapters, "notes": notes}
    plan = make_plan(checkpoint, wanted, recipe, metadata | merged, **choices)
    inputs = (checkpoint.directory, *(parse_lora(spec)[0] for spec in lora))
    return replace(plan, computed=computed, dropped=dropped, hash_source=True, inputs=inputs)


def read_world(checkpoint: Checkpoint) -> tuple[Hyperparameters, dict[str, Target], dict[str, str]]:
    """What config.json says, what each tensor becomes, and {dropped tensor: why}.

    Raises ConversionError unless the checkpoint holds exactly the tensors that config.json describes, in its shapes.
    """
    settings = read_hyperparameters(checkpoint)
    targets = expand(names.TENSORS, settings.values, settings.flags)
    return settings, targets, _check_world(checkpoint, targets, settings)


def read_processor(directory: Path) -> Document:
    """processor_config.json; one that says nothing where there is none."""
    path = directory / PROCESSOR
    return read_document(path) or Document({}, path, ConversionError, REMEDY)


def _compute(settings: Hyperparameters) -> dict[str, np.ndarray]:
    """The front end's constants, from the code that uses them."""
    shapes = {name: evaluate_shape(formula, settings.values) for name, formula in names.DERIVED}
    window, filters = shapes["audio.mel_window"], shapes["audio.mel_filters"]
    computed = {"audio.mel_filters": mel_filters(filters[1]), "audio.mel_window": hann_window(*window)}
    computed = {name: np.ascontiguousarray(computed[name], "<f4") for name in shapes}
    assert all(computed[name].shape == shape for name, shape in shapes.items()), f"{shapes}"
    return computed


def _check_world(checkpoint: Checkpoint, targets: dict[str, Target], settings: Hyperparameters) -> dict[str, str]:
    """Raise ConversionError unless the checkpoint holds exactly the tensors of the table; {dropped name: why}."""
    missing, surplus, dropped = compare(checkpoint.tensors, targets, names.DROPS, settings.flags)
    if missing or surplus:
        raise ConversionError(
            f"{checkpoint.directory} does not hold the tensors its {CONFIG} describes; nothing was written",
            f"missing ({len(missing)}): {', '.join(fold(missing)) or 'none'}",
            f"surplus ({len(surplus)}): {', '.join(fold(surplus)) or 'none'}",
        )
    wrong = [name for name, target in targets.items() if checkpoint.tensors[name].shape != target.shape]
    if wrong:
        found, target = checkpoint.tensors[wrong[0]], targets[wrong[0]]
        others = f"; {len(wrong) - 1} more tensors differ" if len(wrong) > 1 else ""
        raise ConversionError(
            f"tensor {found.name} has shape {list(found.shape)}, {CONFIG} asks for {list(target.shape)} "
            f"[{target.formula}]{others}"
        )
    for name in targets:
        if checkpoint.tensors[name].dtype not in FLOATS:
            raise ConversionError(
                f"tensor {name} is stored as {checkpoint.tensors[name].dtype}: use a checkpoint in {', '.join(FLOATS)}"
            )
    return dropped


def find_audio_ids(processor: Document, config: Document, n_vocab: int) -> dict[str, int]:
    """{key: token id} of the three audio placeholders: from the processor, the configuration, or the family's own."""
    ids = {}
    for key, usual, text in names.AUDIO_TOKENS:
        stated = processor.get(key, int, config.get(key, int))
        ids[key] = usual if stated is None else stated
        if not 0 <= ids[key] < n_vocab:
            where = f"{PROCESSOR} and {CONFIG} lack {key}, and the usual" if stated is None else f"{key} ="
            raise ConversionError(
                f"{where} {quote(ids[key])} is no row of the embedding (0 to {n_vocab - 1}) for {text}"
            )
    return ids


def _read_time_markers(processor: Document, vocabulary: Vocabulary) -> bool:
    enabled = processor.get("enable_time_marker", bool, True)
    lacking = [digit for digit in "0123456789" if digit not in vocabulary.ids]
    if enabled and lacking:
        raise ConversionError(f"time markers are digits, and the tokenizer has no token {lacking[0]!r}")
    return enabled


def _describe_tokens(checkpoint: Checkpoint, vocabulary: Vocabulary, audio_ids: dict[str, int]) -> dict[str, Typed]:
    """`moss_audio.*_id`: every token id the model itself relies on."""
    generation = read_document(checkpoint.directory / GENERATION)
    ids = {
        key: _find_token(checkpoint.config, generation, vocabulary, key, text) for key, text in names.TEXT_TOKENS
    } | audio_ids
    return {f"{names.ARCHITECTURE}.{key}": u32(i) for key, i in ids.items()}


def _find_token(config: Document, generation: Document | None, vocabulary: Vocabulary, key: str, text: str) -> int:
    """The id under `key` (of a list, the first) in the configuration files, else that of the token `text`."""
    places = [(config, key), (config, f"language_config.{key}")] + [(generation, key)] * (generation is not None)
    for document, path in places:
        stated = document.look_up(path)
        ids = document.get(path, list[int] if isinstance(stated, list) else int)
        i = ids[0] if isinstance(ids, list) and ids else ids
        if i is None or i == []:
            continue
        if not 0 <= i < len(vocabulary.tokens):
            raise document.complaint(path, f"the vocabulary has {len(vocabulary.tokens)} tokens")
        return i
    if text not in vocabulary.ids:
        raise ConversionError(f"{CONFIG} lacks {key}, and the tokenizer has no {text}: add the id to {CONFIG}")
    return vocabulary.ids[text]


def _complete_tokenizer(tokenizer: dict[str, Typed], metadata: dict[str, Typed]) -> dict[str, Typed]:
    """The tokenizer's keys; what its own files leave open (Qwen's name no first token) as the model has it."""
    model = {name: metadata[f"{names.ARCHITECTURE}.{name}_token_id"] for name in ("bos", "eos")}
    usual = {"bos": model["bos"], "eos": model["eos"], "padding": model["bos"]}
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in usual.items()} | tokenizer
