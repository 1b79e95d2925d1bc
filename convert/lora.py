"""Plans the GGUF file of a LoRA adapter from the folder that peft writes, in llama.cpp's naming.

`base_model.model.<module>.lora_A.weight` [rank, n_in] becomes `<tensor>.lora_a`, its `lora_B` [n_out, rank]
`<tensor>.lora_b`; both keep their numbers, and who applies them takes the scale of alpha / rank. Source of the names:
peft's and llama.cpp's code. Reads headers only; `stream.py` writes what is planned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.gguf import f32, open_gguf, string
from ..engine.kinds import ADAPTER, MODEL, expect_kind
from ..engine.lora import ADAPTER_TYPE, ALPHA_KEY, A, B, is_adaptable
from ..kernels.formats import BF16, F16, F32, Format
from .checkpoint import FLOATS, read_header
from .documents import Document, read_document
from .names import moss_audio as names
from .names.table import fold, rename
from .plan import ConversionPlan, Wanted, describe_types, make_plan
from .provenance import describe_shards
from .recipes import RECIPES, Recipe, Rule
from .source import ConversionError, Source, SourceTensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TYPES: dict[str, Format] = {"f32": F32, "f16": F16, "bf16": BF16}

# What an adapter's configuration may say besides sizes and targets: anything else changes more than W + B A.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    # The other ways to begin change the base model's weights, too.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}

MAX_ALPHA = 1e30  # times the square root of a rank, a float32

# Beside an adapter of the head or the embedding peft saves what it is for.
_COPY = re.compile(r"base_model\.model\.(.+)\.base_layer\.(weight|bias)")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


class Half(NamedTuple):
    """A or B of the pair of the tensor `base`."""

    base: str
    end: str
    tensor: SourceTensor


def plan_lora(directory: str | Path, type_name: str | None = None, base: str | Path | None = None) -> ConversionPlan:
    """Plan the LoRA GGUF of a peft folder. `type_name`: f32, f16 or bf16, None keeps the types that are there.

    With `base`, a model's GGUF file, names and shapes must be those of its tensors. Raises ConversionError for a folder
    that lacks a file, an adapter that is more than LoRA, names without a place in the model (all of them in the
    message) and shapes that do not fit; GGUFError for a `base` that cannot be opened.
    """
    directory = Path(directory)
    if type_name is not None and type_name.lower() not in TYPES:
        raise ConversionError(f"an adapter is not stored as {type_name!r}: choose one of {', '.join(TYPES)}")
    config = read_config(directory)
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise ConversionError(f"{directory} has no {WEIGHTS}: only safetensors weights are converted")
    tensors = read_header(weights)
    shapes = None if base is None else read_shapes(base)
    copies = [t for t in tensors if _COPY.fullmatch(t.name)]
    tensors = [t for t in tensors if not _COPY.fullmatch(t.name)]
    halves = match_names(tensors, directory, shapes)
    ranks = check_pairs(halves, config, shapes)
    alpha = find_alpha(config, ranks)
    formats = {half.base + half.end: choose_type(half.tensor, type_name) for half in halves}
    recipe = make_recipe(formats)
    metadata = {
        "general.type": string(ADAPTER),
        "general.architecture": string(names.ARCHITECTURE),
        "general.name": string(directory.resolve().name or "adapter"),
        "adapter.type": string(ADAPTER_TYPE),
        ALPHA_KEY: f32(alpha),
        **describe_types(recipe),
        **describe_shards((weights,)),
    }
    wanted = [Wanted(half.base + half.end, half.tensor.shape, half.tensor.name) for half in halves]
    notes = (f"{len(ranks)} matrices of rank {', '.join(map(str, sorted(set(ranks.values()))))}, alpha {alpha:g}",)
    if copies:
        notes += (f"left out, a copy of the model's own: {', '.join(fold(t.name for t in copies))}",)
    plan = make_plan(Source({t.name: t for t in tensors}, (weights,)), wanted, recipe, metadata, notes=notes)
    return replace(plan, hash_source=True, inputs=(directory, *([Path(base)] if base is not None else [])))


def read_config(directory: Path) -> Document:
    """adapter_config.json of plain LoRA; ConversionError for any other kind."""
    if not directory.is_dir():
        raise ConversionError(f"{directory} is not a folder: give the one that peft saved an adapter to")
    config = read_document(directory / CONFIG)
    if config is None:
        raise ConversionError(f"{directory} has no {CONFIG}: give the folder that peft saved an adapter to")
    for key, allowed in FIXED.items():
        found = config.values.get(key)
        if key in config.values and not any(found is value or found == value for value in allowed):
            raise config.complaint(key, "only plain LoRA on linear maps can be converted")
    return config


def read_shapes(base: str | Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a model's GGUF file. Raises ConversionError for another kind of file."""
    with open_gguf(base) as file:
        expect_kind(file, MODEL, ConversionError, "give the model that the adapter is for")
        if file.get("general.architecture", str) != names.ARCHITECTURE:
            raise ConversionError(f"{file.where} is no {names.ARCHITECTURE} model: give the model the adapter is for")
        return {name: info.shape for name, info in file.tensors.items()}


def match_names(
    tensors: Sequence[SourceTensor], directory: Path, shapes: dict[str, tuple[int, ...]] | None
) -> list[Half]:
    """Every tensor's place, in file order. Raises ConversionError with two lists: what has none, and what is missing
    beside its counterpart."""
    halves, surplus = [], []
    for tensor in tensors:
        found = _TENSOR.fullmatch(tensor.name)
        base = find_base(f"{found[1]}.weight", shapes) if found else None
        if base is None:
            surplus.append(tensor.name)
        else:
            halves.append(Half(base, A if found[2] == "A" else B, tensor))
    present = {half.base + half.end for half in halves}
    missing = [half.base + end for half in halves for end in (A, B) if half.base + end not in present]
    if surplus or missing or not halves or len(present) < len(halves):
        raise ConversionError(
            f"{directory} does not hold pairs for matrices of {names.ARCHITECTURE}; nothing was written",
            f"missing ({len(missing)}): {', '.join(fold(missing)) or 'none'}",
            f"surplus ({len(surplus)}): {', '.join(fold(surplus)) or 'none'}",
        )
    return halves


def find_base(name: str, shapes: dict[str, tuple[int, ...]] | None) -> str | None:
    """The matrix that the checkpoint's tensor `name` becomes, if it is one that can be changed (and in `shapes`)."""
    found = rename(name, names.TENSORS)
    if found is None:
        return None
    target, row = found
    axes = tuple(range(row.shape.count(",") + 1))  # only their number matters here
    return target if is_adaptable(target, axes) and (shapes is None or target in shapes) else None


def check_pairs(halves: Sequence[Half], config: Document, shapes: dict[str, tuple[int, ...]] | None) -> dict[str, int]:
    """The rank of each pair. Raises ConversionError for shapes that do not go together or do not fit the model."""
    found = {half.base + half.end: half.tensor for half in halves}
    ranks = {}
    for base in dict.fromkeys(half.base for half in halves):
        a, b = found[base + A], found[base + B]
        for tensor in (a, b):
            if tensor.dtype not in FLOATS:
                raise ConversionError(f"tensor {tensor.name} is stored as {tensor.dtype}: use {', '.join(FLOATS)}")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
            raise ConversionError(
                f"tensors {a.name} and its lora_B are {list(a.shape)} and {list(b.shape)}: no product of a rank"
            )
        if shapes is not None and shapes[base] != (b.shape[0], a.shape[1]):
            raise ConversionError(
                f"the adapter makes {base} {[b.shape[0], a.shape[1]]}, and the model's is {list(shapes[base])}: "
                "it is for another model"
            )
        ranks[base] = a.shape[0]
    if not config.get("rank_pattern", dict) and set(ranks.values()) != {config.require("r", int)}:
        raise config.complaint("r", f"the tensors' rank is {next(iter(ranks.values()))}")
    return ranks


def find_alpha(config: Document, ranks: dict[str, int]) -> float:
    """The alpha with which alpha / rank is the adapter's scale. Rank-stabilised LoRA scales by lora_alpha / sqrt(r)."""
    alpha = config.require("lora_alpha", float)
    if not 0 < alpha < MAX_ALPHA:
        raise config.complaint("lora_alpha", "it must be a positive number")
    if not config.get("use_rslora", bool):
        return alpha
    if len(set(ranks.values())) > 1:
        raise ConversionError(f"{CONFIG} says use_rslora with several ranks: one alpha cannot say their scales")
    return alpha * math.sqrt(next(iter(ranks.values())))


def choose_type(tensor: SourceTensor, type_name: str | None) -> Format:
    return FLOATS[tensor.dtype] if type_name is None else TYPES[type_name.lower()]


def make_recipe(formats: dict[str, Format]) -> Recipe:
    """Each tensor in its type; the file's type is that of the most."""
    used = list(formats.values())
    main = max(TYPES.items(), key=lambda item: used.count(item[1]))[0]
    return Recipe("lora", RECIPES[main].file_type, tuple(Rule(name, fmt) for name, fmt in formats.items()))
