"""Recipes: which tensor of a GGUF file is stored in which type. Data, and the rules that read it.

A recipe is an ordered list of rules; the first whose pattern matches a tensor's name and whose condition holds gives
the type. Vectors (norms, biases) are of little weight and large effect, and the front end's tables are constants: F32
in every recipe, whatever is asked. Convolution kernels are 3 wide and fill no block: F16 where the recipe quantises.
Knows names and shapes, no values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import NamedTuple

from ..kernels.formats import (
    BF16,
    BY_NAME,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_1,
    Q4_K,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Format,
)
from .source import ConversionError

_WILD = re.compile(r"[*?\[]")


class Rule(NamedTuple):
    """`where` names one of `CONDITIONS`; "" holds for every tensor."""

    pattern: str
    format: Format
    where: str = ""


@dataclass(frozen=True)
class Recipe:
    """`file_type` is the number that stands for the recipe under `general.file_type`."""

    name: str
    file_type: int
    rules: tuple[Rule, ...]


class Choice(NamedTuple):
    """The type of a tensor, and why it is not the one asked for ("" when it is)."""

    format: Format
    note: str


@dataclass(frozen=True)
class Subject:
    """What conditions may look at: `layer` of `n_layer` like it, 0 of 1 for a tensor outside of layers."""

    shape: tuple[int, ...]
    layer: int
    n_layer: int
    tied: bool  # the file has no head: the embedding serves


CONDITIONS: dict[str, Callable[[Subject], bool]] = {
    "": lambda t: True,
    "vector": lambda t: len(t.shape) == 1,
    "tied": lambda t: t.tied,
    # The first and the last eighth of the layers, and every third between: as llama.cpp's *_K_M files have it.
    "sensitive": lambda t: not t.n_layer // 8 <= t.layer < 7 * t.n_layer // 8 or (t.layer - t.n_layer // 8) % 3 == 2,
}

# What takes the place of a type whose blocks a row does not fill: blocks of 32 with no fewer bits, then no blocks.
FALLBACKS: dict[Format, Format] = {
    Q2_K: IQ4_NL,
    Q3_K: IQ4_NL,
    IQ4_XS: IQ4_NL,
    Q4_K: Q4_1,
    Q5_K: Q5_1,
    Q6_K: Q8_0,
}
LAST_FALLBACK = F16

HEAD, EMBEDDING = "llm.lm_head.weight", "llm.embed.weight"
DOWN, VALUE, OUTPUT = "llm.blk.*.ffn.down.weight", "llm.blk.*.attn.v.weight", "llm.blk.*.attn.o.weight"

KEPT = (Rule("*", F32, "vector"), Rule("audio.*", F32))
CONVOLUTIONS = (Rule("enc.conv*.weight", F16),)
# Siblings of these models lose whole answers when the way from the sound to the decoder has less than 8 bits. Types
# made to measure (`budget.py`) heed it, too: a report on a few recordings may not show it.
ENCODER_FLOOR = Q8_0
EARS_8 = (*CONVOLUTIONS, Rule("enc.*", Q8_0), Rule("adapter.*", Q8_0), Rule("deepstack.*", Q8_0))
EARS_16 = (Rule("enc.*", F16), Rule("adapter.*", F16), Rule("deepstack.*", F16))
HEAD_6 = (Rule(HEAD, Q6_K), Rule(EMBEDDING, Q6_K, "tied"))
DOWN_6 = (Rule(DOWN, Q6_K, "sensitive"), Rule(VALUE, Q6_K, "sensitive"))
DOWN_5 = (Rule(DOWN, Q5_K, "sensitive"), Rule(VALUE, Q5_K, "sensitive"))
DOWN_4 = (Rule(DOWN, Q4_K), Rule(VALUE, Q4_K), Rule(OUTPUT, Q4_K))

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("q4_k", 15, (*EARS_8, *HEAD_6, *DOWN_6, Rule("*", Q4_K))),
        Recipe("q4_k_all", 14, (*CONVOLUTIONS, Rule("*", Q4_K))),
        Recipe("q4_k_f16enc", 14, (*EARS_16, Rule("*", Q4_K))),
        Recipe("q3_k", 12, (*EARS_8, *HEAD_6, *DOWN_5, *DOWN_4, Rule("*", Q3_K))),
        Recipe("q5_k", 17, (*EARS_8, *HEAD_6, *DOWN_6, Rule("*", Q5_K))),
        Recipe("q6_k", 18, (*EARS_8, Rule("*", Q6_K))),
        Recipe("q8_0", 7, (*CONVOLUTIONS, Rule("*", Q8_0))),
        Recipe("f16", 1, (Rule("*", F16),)),
        # ggml cannot convolve by BF16 kernels; F32 holds the same numbers.
        Recipe("bf16", 32, (Rule("enc.conv*.weight", F32), Rule("*", BF16))),
        Recipe("f32", 0, (Rule("*", F32),)),
    )
}
DEFAULT = "q4_k"


def find_recipe(name: str) -> Recipe:
    """The recipe of that name in any case; ConversionError lists those there are."""
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise ConversionError(f"there is no type {name!r}: choose one of {', '.join(RECIPES)}")
    return recipe


def parse_override(text: str) -> Rule:
    """`PATTERN=TYPE`, a shell pattern on tensor names and the name of a type in any case."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise ConversionError(
            f"{text!r} says no type for a tensor: write PATTERN=TYPE, as in 'llm.blk.*.attn.v.*=q6_k'"
        )
    return Rule(pattern, find_type(name, f" (in {text!r})"))


def find_type(name: str, where: str = "") -> Format:
    """The type of that name in any case; ConversionError lists those there are."""
    if name.upper() not in BY_NAME:
        raise ConversionError(f"there is no type {name!r}{where}: choose one of {', '.join(BY_NAME).lower()}")
    return BY_NAME[name.upper()]


def choose_formats(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], overrides: Sequence[Rule] = ()
) -> dict[str, Choice]:
    """The type of every tensor of a file, given all their shapes by name; `overrides` go before the recipe's rules.

    Raises ConversionError for an override that no tensor's name matches.
    """
    for rule in overrides:
        if not any(fnmatchcase(name, rule.pattern) for name in shapes):
            raise ConversionError(f"no tensor's name matches {rule.pattern!r}: auricle inspect and --dry-run list them")
    rules = list(enumerate((*KEPT, *overrides, *recipe.rules)))
    exact: dict[str, list[tuple[int, Rule]]] = {}  # a file made to measure has a rule for each tensor
    for n, rule in rules:
        if not _WILD.search(rule.pattern):
            exact.setdefault(rule.pattern, []).append((n, rule))
    wild = [(n, rule) for n, rule in rules if _WILD.search(rule.pattern)]
    subjects = _describe(shapes)
    return {
        name: _choose(sorted([*exact.get(name, ()), *wild], key=itemgetter(0)), name, subject)
        for name, subject in subjects.items()
    }


def _choose(rules: Sequence[tuple[int, Rule]], name: str, subject: Subject) -> Choice:
    wanted = next(r.format for _, r in rules if fnmatchcase(name, r.pattern) and CONDITIONS[r.where](subject))
    n_cols = subject.shape[-1]
    chosen = fit_rows(wanted, n_cols)
    note = "" if chosen is wanted else f"rows of {n_cols} do not fill blocks of {wanted.length} ({wanted})"
    return Choice(chosen, note)


def fit_rows(wanted: Format, n_cols: int) -> Format:
    """The type that rows of `n_cols` get when `wanted` is asked for: the first whose blocks they fill."""
    while n_cols % wanted.length:
        wanted = FALLBACKS.get(wanted, LAST_FALLBACK)
    return wanted


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Subject]:
    numbers = {name: re.search(r"(?<=\.)\d+(?=\.)", name) for name in shapes}
    layers = {name: int(found.group()) if found else 0 for name, found in numbers.items()}
    families = {name: name[: found.start()] if found else name for name, found in numbers.items()}
    n_layer: dict[str, int] = {}
    for name, family in families.items():
        n_layer[family] = max(n_layer.get(family, 0), layers[name] + 1)
    tied = HEAD not in shapes
    return {name: Subject(shape, layers[name], n_layer[families[name]], tied) for name, shape in shapes.items()}
