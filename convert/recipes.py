"""Recipes: which tensor of a GGUF file is stored in which type. Data, and the rule that reads it.

A recipe is an ordered list of (name pattern, type); the first pattern that matches a target's name wins.
Norms and biases are vectors of little weight and large effect: F32 in every recipe. Convolution kernels are
3 wide, no multiple of any block: F16 where the recipe quantises. Knows names and shapes, no values.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..kernels.formats import BF16, F16, F32, Q8_0, Format
from .checkpoint import ConversionError

Rules = tuple[tuple[str, Format], ...]


@dataclass(frozen=True)
class Recipe:
    """`file_type` is the number that stands for the recipe under `general.file_type`."""

    name: str
    file_type: int
    rules: Rules


# The type of a row that does not fill whole blocks.
FALLBACK = F16

VECTORS: Rules = (("*.bias", F32), ("*norm.weight", F32))
CONVOLUTIONS: Rules = (("enc.conv*.weight", F16),)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", 0, (("*", F32),)),
        Recipe("f16", 1, (*VECTORS, ("*", F16))),
        Recipe("bf16", 32, (*VECTORS, ("*", BF16))),
        Recipe("q8_0", 7, (*VECTORS, *CONVOLUTIONS, ("*", Q8_0))),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name in any case; ConversionError lists those there are."""
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise ConversionError(f"there is no type {name!r}: choose one of {', '.join(RECIPES)}")
    return recipe


def choose_format(recipe: Recipe, name: str, shape: tuple[int, ...]) -> tuple[Format, str]:
    """The type of the tensor `name`, and why it is not the recipe's own choice ("" when it is)."""
    chosen = next(fmt for pattern, fmt in recipe.rules if fnmatchcase(name, pattern))
    if shape[-1] % chosen.length == 0:
        return chosen, ""
    return FALLBACK, f"rows of {shape[-1]} do not fill blocks of {chosen.length} ({chosen})"
