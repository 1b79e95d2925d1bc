"""Plans a GGUF file made from another: the same tensors and metadata, other types.

Reads the header only; `stream.py` writes what is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..engine.gguf import open_gguf
from .plan import ConversionPlan, PlanRow, Wanted, describe_types, make_plan
from .recipes import DEFAULT, Rule, find_recipe
from .source import ConversionError, source_of_gguf


def plan_requantization(
    in_path: str | Path,
    type_name: str = DEFAULT,
    overrides: Sequence[Rule] = (),
    importance: Mapping[str, np.ndarray] | None = None,
    *,
    allow_requantize: bool = False,
) -> ConversionPlan:
    """Plan the file that `in_path` becomes with the recipe `type_name`; tensors that keep their type are copied.

    The metadata is copied with its types, but for `general.file_type`. Raises ConversionError for quantised weights
    that would be quantised again (unless allowed), importances of another width and overrides that match nothing;
    GGUFError as `open_gguf` does.
    """
    recipe = find_recipe(type_name)
    with open_gguf(in_path) as file:
        source = source_of_gguf(file)
        metadata = file.types | describe_types(recipe)
        alignment = file.alignment
    wanted = [Wanted(name, tensor.shape, name) for name, tensor in source.tensors.items()]
    plan = make_plan(source, wanted, recipe, metadata, overrides=overrides, importance=importance, alignment=alignment)
    twice = [row for row in plan if _loses_twice(row)]
    if twice and not allow_requantize:
        raise ConversionError(
            f"{in_path} is quantised: {twice[0].target} and {len(twice) - 1} others would lose a second time "
            f"({twice[0].source_format} to {twice[0].format}); start from an F16, BF16 or F32 file, "
            "or say --allow-requantize"
        )
    return plan


def _loses_twice(row: PlanRow) -> bool:
    return row.source_format.length > 1 and row.format.length > 1 and row.format is not row.source_format
