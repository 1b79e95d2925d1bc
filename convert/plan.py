"""A conversion before it is made: every tensor with its type and size, the metadata, and the exact file size.

Knows sources, recipes and sizes. Does not know whether the source is a checkpoint (`hf.py`) or a GGUF file
(`requantize.py`), reads no weights and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.gguf import DEFAULT_ALIGNMENT, Typed, u32
from ..engine.gguf_write import Layout, plan_layout
from ..engine.lora import LowRank
from ..engine.models.moss_audio import PART_NAMES, part_of
from ..kernels.formats import F32, Format
from .names.table import fold
from .provenance import describe_shards
from .recipes import Recipe, Rule, choose_formats
from .source import ConversionError, Source

QUANTIZATION_VERSION = 2  # of the block layouts; has been 2 since GGUF exists
COMPUTED = "computed"


class Wanted(NamedTuple):
    """A tensor of the file to be, and the tensor of the source it is made from; None for a computed one."""

    target: str
    shape: tuple[int, ...]
    source: str | None = None


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the file to be: `source` is None for a computed one, `note` why the type is not the recipe's."""

    source: str | None
    target: str
    shape: tuple[int, ...]
    source_dtype: str
    source_format: Format
    format: Format
    nbytes: int
    part: str
    note: str = ""


@dataclass(frozen=True)
class ConversionPlan:
    """What `stream.convert` will do. Iterating gives the rows; `notes` are what a user should be told.

    `adapters` are added to the weights of their tensors on the way. `inputs`: the files and folders that the plan was
    made from, besides the source's files.
    With `hash_source` the metadata states the SHA-256 of the source's files, which are zeros until they are written.
    """

    source: Source
    recipe: Recipe
    metadata: dict[str, Typed]
    rows: tuple[PlanRow, ...]
    alignment: int
    layout: Layout
    importance: Mapping[str, np.ndarray]
    notes: tuple[str, ...]
    adapters: Mapping[str, LowRank] = field(default_factory=dict)
    computed: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    hash_source: bool = False
    inputs: tuple[Path, ...] = ()

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

    def lay_out(self, digests: dict[str, str]) -> Layout:
        """The file with the SHA-256 ({file name: hex}) of its source stated, if any; no other byte of it moves."""
        shards = describe_shards(self.source.files, digests) if digests else {}
        layout = _lay_out(self.metadata | shards, self.rows, self.alignment)
        assert layout.total_bytes == self.total_bytes, f"{layout.total_bytes=} {self.total_bytes=}"
        return layout

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


def make_plan(
    source: Source,
    wanted: Sequence[Wanted],
    recipe: Recipe,
    metadata: dict[str, Typed],
    *,
    overrides: Sequence[Rule] = (),
    importance: Mapping[str, np.ndarray] | None = None,
    adapters: Mapping[str, LowRank] | None = None,
    alignment: int = DEFAULT_ALIGNMENT,
    notes: tuple[str, ...] = (),
) -> ConversionPlan:
    """Choose the types and lay out the file.

    Raises ConversionError for importances that do not fit and overrides that match nothing.
    """
    choices = choose_formats(recipe, {name: shape for name, shape, _ in wanted}, overrides)
    rows = tuple(_make_row(source, w, choices[w.target].format, choices[w.target].note) for w in wanted)
    used = _check_importance(importance or {}, rows)
    notes += tuple(_explain(rows))
    if importance is not None:
        n_blocks = sum(row.format.length > 1 for row in rows)
        n_used = sum(row.format.length > 1 and row.target in used for row in rows)
        notes += (f"importance weighs {n_used} of {n_blocks} quantised tensors",)
    layout = _lay_out(metadata, rows, alignment)
    return ConversionPlan(source, recipe, metadata, rows, alignment, layout, used, notes, adapters or {})


def describe_types(recipe: Recipe) -> dict[str, Typed]:
    """The `general.*` keys that a recipe sets."""
    return {
        "general.file_type": u32(recipe.file_type),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }


def _make_row(source: Source, wanted: Wanted, fmt: Format, note: str) -> PlanRow:
    target, shape, name = wanted
    stored = (COMPUTED, F32) if name is None else (source.tensors[name].dtype, source.tensors[name].format)
    return PlanRow(name, target, shape, *stored, fmt, fmt.tensor_bytes(shape), part_of(target), note)


def _explain(rows: Sequence[PlanRow]) -> Iterator[str]:
    """Why types are not those asked for, layers in one line."""
    reasons: dict[tuple[Format, str], list[str]] = {}
    for row in rows:
        if row.note:
            reasons.setdefault((row.format, row.note), []).append(row.target)
    for (fmt, note), targets in reasons.items():
        yield from (f"{name}: {fmt}, {note}" for name in fold(targets))


def _lay_out(metadata: Mapping[str, Typed], rows: Sequence[PlanRow], alignment: int) -> Layout:
    return plan_layout(metadata, [(row.target, row.shape, row.format) for row in rows], alignment)


def _check_importance(importance: Mapping[str, np.ndarray], rows: Sequence[PlanRow]) -> dict[str, np.ndarray]:
    """Those importances that name a tensor of the file; all of them must fit it."""
    used = {}
    for row in rows:
        given = importance.get(row.target)
        if given is None:
            continue
        if given.shape != row.shape[-1:]:
            raise ConversionError(
                f"importance of {row.target} has {given.size} columns, the tensor {row.shape[-1]}: "
                "it was collected with another model"
            )
        if not (np.isfinite(given) & (given >= 0)).all():
            raise ConversionError(f"importance of {row.target} is negative or not finite somewhere: collect it again")
        used[row.target] = given
    if importance and not used:
        raise ConversionError(
            f"importance is given for {next(iter(importance))} and {len(importance) - 1} others, none of which "
            "is a tensor of this model: it was collected with another"
        )
    return used
