"""Plans a GGUF file made from another: the same tensors and metadata, other types.

Reads the header only; `stream.py` writes what is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..engine.gguf import SPLIT_KEYS, GGUFFile, Typed, align, open_gguf
from ..engine.kinds import ADAPTER, IMATRIX, MODEL, expect_kind, find_kind
from ..engine.lora import LoraSpec, parse_lora
from .budget import BUDGET_KEYS, Budget, free_names
from .merge import MERGED_KEY, plan_merge
from .plan import ConversionPlan, PlanRow, Wanted, describe_types, make_plan
from .recipes import DEFAULT, Recipe, Rule, find_recipe
from .source import ConversionError, source_of_gguf


def plan_requantization(
    in_path: str | Path,
    type_name: str = DEFAULT,
    overrides: Sequence[Rule] = (),
    importance: Mapping[str, np.ndarray] | None = None,
    *,
    lora: Sequence[LoraSpec] = (),
    allow_requantize: bool = False,
    budget: Budget | None = None,
) -> ConversionPlan:
    """Plan the file that `in_path` becomes with the recipe `type_name`; tensors that keep their type are copied.

    With `budget` the recipe is made to measure instead; the tensors that `overrides` name are left to them. The
    adapters `lora` are merged into the weights. The metadata is copied with its types, but for `general.file_type`
    and what a budget or a merge adds. The parts of a split file become one. Raises ConversionError for quantised
    weights that would be quantised again (unless allowed), importances of another width, overrides that match
    nothing, and a budget that cannot be met or was measured on another model; GGUFError as `open_gguf` does,
    LoraError as `read_loras` does.
    """
    with open_gguf(in_path) as file:
        if find_kind(file) in (ADAPTER, IMATRIX):
            expect_kind(file, MODEL, ConversionError, "only models are quantised")
        source = source_of_gguf(file)
        metadata = {k: v for k, v in file.types.items() if not k.startswith((BUDGET_KEYS, SPLIT_KEYS))}
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        architecture, before = file.get("general.architecture", str, ""), file.get(MERGED_KEY, list[str], [])
        adapters, merged = plan_merge(lora, architecture, shapes, in_path, before)
        metadata |= merged
        alignment, notes = file.alignment, ()
        if budget is None:
            recipe = find_recipe(type_name)
        else:
            budget.check(file)
            metadata |= budget.describe()
            recipe, note = _spend(budget, file, metadata, overrides)
            notes = (note,)
    metadata |= describe_types(recipe)
    wanted = [Wanted(name, tensor.shape, name) for name, tensor in source.tensors.items()]
    choices = {"overrides": overrides, "importance": importance, "adapters": adapters}
    plan = make_plan(source, wanted, recipe, metadata, **choices, alignment=alignment, notes=notes)
    assert budget is None or plan.total_bytes <= budget.target_bytes, f"{plan.total_bytes=} {budget.target_bytes=}"
    twice = [row for row in plan if _loses_twice(row, row.target in adapters)]
    if twice and not allow_requantize:
        raise ConversionError(
            f"{in_path} is quantised: {twice[0].target} and {len(twice) - 1} others would lose a second time "
            f"({twice[0].source_format} to {twice[0].format}); start from an F16, BF16 or F32 file, "
            "or say --allow-requantize"
        )
    return replace(plan, inputs=tuple(parse_lora(spec)[0] for spec in lora))


def _spend(budget: Budget, file: GGUFFile, metadata: dict[str, Typed], overrides: Sequence[Rule]) -> tuple[Recipe, str]:
    """The recipe of a budget. What the file takes besides its free tensors is known from a plan in any types."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    free = set(free_names(shapes, overrides))
    trial = find_recipe(DEFAULT)
    wanted = [Wanted(name, shape, name) for name, shape in shapes.items()]
    plan = make_plan(
        source_of_gguf(file),
        wanted,
        trial,
        metadata | describe_types(trial),
        overrides=overrides,
        alignment=file.alignment,
    )
    spent = sum(align(row.nbytes, file.alignment) for row in plan if row.target in free)
    return budget.make_recipe(shapes, overrides, plan.total_bytes - spent, file.alignment)


def _loses_twice(row: PlanRow, changed: bool) -> bool:
    return row.source_format.length > 1 and row.format.length > 1 and (changed or row.format is not row.source_format)
