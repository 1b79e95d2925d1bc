"""What a row of a name table is, and the closed-world comparison of a checkpoint with one.

Every source tensor matches exactly one row or an explicit drop, every row is matched exactly once.
Knows no model and reads no file; the tables themselves are the files beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.gguf import ValueType


@dataclass(frozen=True)
class KeyRow:
    """A hyper-parameter: GGUF key (after the architecture's name) and where config.json has it, first found wins."""

    key: str
    paths: tuple[str, ...]
    type: ValueType
    default: int | float | None = None


@dataclass(frozen=True)
class TensorRow:
    """One tensor, or one a layer: `{n}` counts up to the hyper-parameter `repeat`.

    `shape` is a comma-separated list of products and quotients of hyper-parameters, outermost axis first;
    the row exists when the flag `when` is set (always, if it names none).
    """

    source: str
    target: str
    shape: str
    repeat: str = ""
    when: str = ""


@dataclass(frozen=True)
class Drop:
    """A source tensor left out on purpose: a pattern for its whole name, and why."""

    pattern: str
    why: str
    when: str = ""


@dataclass(frozen=True)
class Target:
    """What one source tensor becomes; `formula` is the row's shape as written."""

    name: str
    shape: tuple[int, ...]
    formula: str


def evaluate(expression: str, values: Mapping[str, Any]) -> int:
    """`a*b/c` of hyper-parameters and whole numbers, from left to right; a quotient must come out even."""
    result = 1
    operator = "*"
    for token in re.split(r"\s*([*/])\s*", expression.strip()):
        if token in ("*", "/"):
            operator = token
            continue
        value = int(token) if token.isdigit() else values[token]
        assert operator == "*" or result % value == 0, f"{expression} is no whole number with {values}"
        result = result * value if operator == "*" else result // value
    return result


def evaluate_shape(formula: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape that a row's formula stands for."""
    return tuple(evaluate(expression, values) for expression in formula.split(","))


def expand(rows: Iterable[TensorRow], values: Mapping[str, Any], flags: Collection[str]) -> dict[str, Target]:
    """Every source tensor a checkpoint of these hyper-parameters has, in table order."""
    targets: dict[str, Target] = {}
    for row in rows:
        if row.when and row.when not in flags:
            continue
        shape = evaluate_shape(row.shape, values)
        for n in range(values[row.repeat] if row.repeat else 1):
            source = row.source.replace("{n}", str(n))
            assert source not in targets, f"two rows make {source}"
            targets[source] = Target(row.target.replace("{n}", str(n)), shape, row.shape)
    assert len({target.name for target in targets.values()}) == len(targets), "two rows make one target"
    return targets


def compare(
    names: Iterable[str], targets: Mapping[str, Target], drops: Sequence[Drop], flags: Collection[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """Names a checkpoint lacks, names no row takes, and {dropped name: why}."""
    names = set(names)
    surplus, dropped = [], {}
    for name in sorted(names - targets.keys()):
        drop = next((d for d in drops if (not d.when or d.when in flags) and re.fullmatch(d.pattern, name)), None)
        if drop:
            dropped[name] = drop.why
        else:
            surplus.append(name)
    return [name for name in targets if name not in names], surplus, dropped


def rename(name: str, rows: Iterable[TensorRow]) -> tuple[str, TensorRow] | None:
    """What the rows call the source tensor `name` in the file, whatever the number of layers, and its row."""
    for row in rows:
        pattern = re.escape(row.source).replace(r"\{n\}", "(0|[1-9][0-9]{0,5})")
        if found := re.fullmatch(pattern, name):
            return row.target.replace("{n}", found[1] if found.groups() else ""), row
    return None


def fold(names: Iterable[str]) -> list[str]:
    """Names that differ in one layer number alone, written once: `layers.{0-3,7}.fc1.weight`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if number is None else name[: number.start()] + "{}" + name[number.end() :]
        layers.setdefault(pattern, []).extend([] if number is None else [int(number.group())])
    return [pattern.replace("{}", _spans(sorted(numbers))) for pattern, numbers in layers.items()]


def _spans(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "}"
