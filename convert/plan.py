"""A conversion before it is made: every tensor with its type and size, the metadata, and the exact file size.

Knows a checkpoint, a recipe and the name table. Reads headers and small files only, writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..engine.gguf import Typed, boolean, string, u32
from ..engine.gguf_write import Layout, plan_layout
from ..engine.models.moss_audio import PART_NAMES, part_of
from ..kernels.formats import F32, Format
from .checkpoint import CONFIG, FLOATS, Checkpoint, ConversionError, open_checkpoint, read_json
from .hyperparameters import Hyperparameters, check_mel, look_up, read_hyperparameters
from .names import moss_audio as names
from .names.table import Target, compare, evaluate_shape, expand, fold
from .provenance import describe_shards, describe_source
from .recipes import Recipe, choose_format, find_recipe
from .vocabulary import Vocabulary, read_vocabulary

PROCESSOR, GENERATION = "processor_config.json", "generation_config.json"
QUANTIZATION_VERSION = 2  # of the block layouts; has been 2 since GGUF exists
DERIVED = "computed"


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the file to be: `source` is None for a computed one, `note` why the type is not the recipe's."""

    source: str | None
    target: str
    shape: tuple[int, ...]
    source_dtype: str
    format: Format
    nbytes: int
    part: str
    note: str = ""


@dataclass(frozen=True)
class ConversionPlan:
    """What `hf.convert` will do. Iterating gives the rows; `notes` are what a user should be told."""

    checkpoint: Checkpoint
    recipe: Recipe
    metadata: dict[str, Typed]
    rows: tuple[PlanRow, ...]
    layout: Layout
    dropped: dict[str, str]
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Exact size of the file: metadata, tensors, alignment."""
        return self.layout.total_bytes

    @property
    def metadata_bytes(self) -> int:
        """Bytes before the first tensor."""
        return len(self.layout.header)

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def bytes_by_part(self) -> dict[str, int]:
        """Tensor bytes of each part of the model, every part named."""
        totals = dict.fromkeys(PART_NAMES, 0)
        for row in self.rows:
            totals[row.part] += row.nbytes
        return totals

    def bytes_by_type(self) -> dict[str, int]:
        """Tensor bytes of each type used."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.format.name] = totals.get(row.format.name, 0) + row.nbytes
        return totals


def plan_conversion(checkpoint_dir: str | Path, type_name: str) -> ConversionPlan:
    """Plan the conversion of a Hugging Face folder to a GGUF file of the recipe `type_name`.

    Raises ConversionError for a checkpoint that does not match the name table exactly (both lists in the message),
    wrong shapes and dtypes, a configuration or tokenizer that is missing, wrong or unsupported.
    """
    recipe = find_recipe(type_name)
    checkpoint = open_checkpoint(checkpoint_dir)
    settings = read_hyperparameters(checkpoint)
    targets = expand(names.TENSORS, settings.values, settings.flags)
    dropped = _check_world(checkpoint, targets, settings)
    processor = read_json(checkpoint.directory / PROCESSOR) or {}
    check_mel(processor, int(settings.values["enc.num_mel_bins"]), PROCESSOR)
    audio_ids = _find_audio_ids(processor, checkpoint.config, int(settings.values["llm.vocab_size"]))
    placeholders = {text: audio_ids[key] for key, _, text in names.AUDIO_TOKENS}
    vocabulary = read_vocabulary(checkpoint.directory, int(settings.values["llm.vocab_size"]), placeholders)
    time_markers = _read_time_markers(processor, vocabulary)
    rows = _plan_rows(checkpoint, recipe, targets, settings)
    metadata = {
        "general.architecture": string(names.ARCHITECTURE),
        **describe_source(checkpoint),
        "general.file_type": u32(recipe.file_type),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
        **describe_shards(checkpoint),
        **settings.metadata(),
        f"{names.ARCHITECTURE}.time_markers": boolean(time_markers),
        **_describe_tokens(checkpoint, vocabulary, audio_ids),
    }
    metadata |= _complete_tokenizer(vocabulary.metadata(), metadata)
    layout = plan_layout(metadata, [(row.target, row.shape, row.format) for row in rows])
    notes = vocabulary.notes + tuple(f"{row.target}: {row.format}, {row.note}" for row in rows if row.note)
    notes += tuple(f"{name} is left out: {why}" for name, why in dropped.items())
    return ConversionPlan(checkpoint, recipe, metadata, rows, layout, dropped, notes)


def _check_world(checkpoint: Checkpoint, targets: dict[str, Target], settings: Hyperparameters) -> dict[str, str]:
    """Raise ConversionError unless the checkpoint holds exactly the tensors of the table; {dropped name: why}."""
    missing, surplus, dropped = compare(checkpoint.tensors, targets, names.DROPS, settings.flags)
    if missing or surplus:
        raise ConversionError(
            f"{checkpoint.directory} does not hold the tensors its {CONFIG} describes; nothing was written\n"
            f"missing ({len(missing)}): {', '.join(fold(missing)) or 'none'}\n"
            f"surplus ({len(surplus)}): {', '.join(fold(surplus)) or 'none'}"
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


def _plan_rows(
    checkpoint: Checkpoint, recipe: Recipe, targets: dict[str, Target], settings: Hyperparameters
) -> tuple[PlanRow, ...]:
    rows = []
    for source, target in targets.items():
        fmt, note = choose_format(recipe, target.name, target.shape)
        rows.append(_make_row(source, target.name, target.shape, checkpoint.tensors[source].dtype, fmt, note))
    for name, formula in names.DERIVED:
        rows.append(_make_row(None, name, evaluate_shape(formula, settings.values), DERIVED, F32, ""))
    return tuple(rows)


def _make_row(source: str | None, target: str, shape: tuple[int, ...], dtype: str, fmt: Format, note: str) -> PlanRow:
    return PlanRow(source, target, shape, dtype, fmt, fmt.tensor_bytes(shape), part_of(target), note)


def _find_audio_ids(processor: dict, config: dict, n_vocab: int) -> dict[str, int]:
    """{key: token id} of the three audio placeholders: from the processor, the configuration, or the family's own."""
    ids = {}
    for key, usual, text in names.AUDIO_TOKENS:
        stated = next((source[key] for source in (processor, config) if source.get(key) is not None), None)
        ids[key] = usual if stated is None else stated
        if type(ids[key]) is not int or not 0 <= ids[key] < n_vocab:
            where = f"{PROCESSOR} and {CONFIG} lack {key}, and the usual" if stated is None else f"{key} ="
            raise ConversionError(f"{where} {ids[key]!r} is no row of the embedding (0 to {n_vocab - 1}) for {text}")
    return ids


def _read_time_markers(processor: dict, vocabulary: Vocabulary) -> bool:
    enabled = processor.get("enable_time_marker", True)
    if not isinstance(enabled, bool):
        raise ConversionError(f"{PROCESSOR} says enable_time_marker = {enabled!r}: it must be true or false")
    lacking = [digit for digit in "0123456789" if digit not in vocabulary.ids]
    if enabled and lacking:
        raise ConversionError(f"time markers are digits, and the tokenizer has no token {lacking[0]!r}")
    return enabled


def _describe_tokens(checkpoint: Checkpoint, vocabulary: Vocabulary, audio_ids: dict[str, int]) -> dict[str, Typed]:
    """`moss_audio.*_id`: every token id the model itself relies on."""
    generation = read_json(checkpoint.directory / GENERATION) or {}
    ids = {
        key: _find_token(checkpoint.config, generation, vocabulary, key, text) for key, text in names.TEXT_TOKENS
    } | audio_ids
    return {f"{names.ARCHITECTURE}.{key}": u32(i) for key, i in ids.items()}


def _find_token(config: dict, generation: dict, vocabulary: Vocabulary, key: str, text: str) -> int:
    """The id under `key` (of a list, the first) in the configuration files, else that of the token `text`."""
    stated = (look_up(config, key), look_up(config, f"language_config.{key}"), generation.get(key))
    for found in stated:
        i = found[0] if isinstance(found, list) and found else found
        if type(i) is int and 0 <= i < len(vocabulary.tokens):
            return i
        if i is not None and i != []:
            raise ConversionError(
                f"{key} = {found!r} is no token id: the vocabulary has {len(vocabulary.tokens)} tokens"
            )
    if text not in vocabulary.ids:
        raise ConversionError(f"{CONFIG} lacks {key}, and the tokenizer has no {text}: add the id to {CONFIG}")
    return vocabulary.ids[text]


def _complete_tokenizer(tokenizer: dict[str, Typed], metadata: dict[str, Typed]) -> dict[str, Typed]:
    """The tokenizer's keys; what its own files leave open (Qwen's name no first token) as the model has it."""
    model = {name: metadata[f"{names.ARCHITECTURE}.{name}_token_id"] for name in ("bos", "eos")}
    usual = {"bos": model["bos"], "eos": model["eos"], "padding": model["bos"]}
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in usual.items()} | tokenizer
