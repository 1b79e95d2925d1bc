"""Types made to measure: which tensor gets which, so that a file of a given size loses as little as possible.

What a type costs a tensor comes from a report of `auricle diff --sensitivity`: the divergence of the logits when this
tensor alone has that type. Divergence is quadratic in small errors and errors of different tensors are independent,
so the costs add up, and the choice is a knapsack: for each tensor one of a few (bytes, damage). Along the lower convex
hulls of these points the best step is always the one that takes away most damage a byte; what is left at the end goes
to the best single change that still fits. Every solution considered is the same for all targets, so a larger target
never does more damage. Knows names, sizes and damage; reads no weights of matrices.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.gguf import GGUFFile, Typed, align, string, u64
from ..engine.models.moss_audio import part_of
from ..kernels.formats import BY_NAME, F16, F32, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, Format
from ..kernels.quote import quote
from .documents import Document, parse_document, read_whole
from .recipes import CONVOLUTIONS, ENCODER_FLOOR, KEPT, Recipe, Rule, fit_rows
from .source import ConversionError

FORMAT, VERSION = "auricle.sensitivity", 1
REPORT_REMEDY = "give the file of auricle diff --sensitivity"
BUDGET_KEYS = "auricle.budget."  # begins the keys that record how types came about
CANDIDATES = (Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, F16)
ENCODER_PARTS = ("encoder", "adapter", "deepstack")

# Numbers for `general.file_type`, by the type that holds most bytes.
FILE_TYPES = {"F16": 1, "Q4_1": 3, "Q8_0": 7, "Q5_1": 9, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25}


NONE = -1


class Option(NamedTuple):
    """One type that a tensor could have, its bytes with padding, and the damage it does, in any unit that adds up."""

    format: Format
    nbytes: int
    damage: float


class Step(NamedTuple):
    """A tensor's way from one point of its hull to the next: what each more byte takes away."""

    slope: float
    tensor: int
    option: int


def choose_options(options: Sequence[Sequence[Option]], max_bytes: int) -> list[int]:
    """For each tensor the number of its option, of at most `max_bytes` together, with the least damage found.

    The smallest options must fit.
    """
    if not options:
        return []
    chosen = [min(range(len(o)), key=lambda i, o=o: (o[i].nbytes, o[i].damage)) for o in options]
    size = sum(o[i].nbytes for o, i in zip(options, chosen, strict=True))
    assert size <= max_bytes, f"{size=} {max_bytes=}"
    owner = np.array([t for t, o in enumerate(options) for _ in o])
    nbytes = np.array([x.nbytes for o in options for x in o])
    damage = np.array([x.damage for o in options for x in o])
    now_bytes = np.array([o[i].nbytes for o, i in zip(options, chosen, strict=True)])
    now_damage = np.array([o[i].damage for o, i in zip(options, chosen, strict=True)])
    steps = sorted((s for t, o in enumerate(options) for s in _climb(t, o)), key=lambda s: (-s.slope, s.tensor))
    best = (math.inf, 0, NONE)  # damage, steps taken, the change after them
    for n in range(len(steps) + 1):
        if n:
            _, tensor, option = steps[n - 1]
            now_bytes[tensor], now_damage[tensor] = options[tensor][option].nbytes, options[tensor][option].damage
        size = int(now_bytes.sum())
        if size > max_bytes:
            break
        change = np.where(size - now_bytes[owner] + nbytes <= max_bytes, damage - now_damage[owner], np.inf)
        k, total = int(change.argmin()), float(now_damage.sum())
        best = min(best, (total, n, NONE), (total + float(change[k]), n, k), key=lambda b: b[0])
    for _, tensor, option in steps[: best[1]]:
        chosen[tensor] = option
    if best[2] != NONE:
        tensor = int(owner[best[2]])
        chosen[tensor] = best[2] - int(np.searchsorted(owner, tensor))
    return chosen


def _climb(tensor: int, options: Sequence[Option]) -> list[Step]:
    """The steps along the lower convex hull, from the smallest option on; each takes away less a byte."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].damage))
    hull: list[int] = []
    for i in order:
        if hull and options[i].damage >= options[hull[-1]].damage:
            continue
        while len(hull) > 1 and _slope(options[hull[-2]], options[hull[-1]]) <= _slope(options[hull[-1]], options[i]):
            hull.pop()
        hull.append(i)
    return [Step(_slope(options[a], options[b]), tensor, b) for a, b in pairwise(hull)]


def _slope(a: Option, b: Option) -> float:
    return (a.damage - b.damage) / (b.nbytes - a.nbytes)


# Reports.


@dataclass(frozen=True)
class Report:
    """What a sensitivity report says of each tensor: its shape, and the damage of each type it was measured for."""

    path: str
    model: str
    fingerprint: str
    digest: str
    shapes: dict[str, tuple[int, ...]]
    damage: dict[str, dict[str, float]]


def read_report(path: str | os.PathLike[str]) -> Report:
    """Raises ConversionError for what is no report of `auricle diff --sensitivity`."""
    data = read_whole(Path(path), remedy=REPORT_REMEDY)
    if data is None:
        raise ConversionError(f"{path} cannot be read: there is no such file; {REPORT_REMEDY}")
    report = parse_document(data, path, remedy=REPORT_REMEDY)
    stated = report.require("format", str), report.require("version", int)
    if stated != (FORMAT, VERSION):
        raise ConversionError(f"{report.where} is {stated[0]} {stated[1]}, not {FORMAT} {VERSION}; {REPORT_REMEDY}")
    shapes, damage = {}, {}
    for n, entry in enumerate(report.require("tensors", list[dict])):
        tensor = report.inside(entry, f"tensor {n}")
        name = tensor.require("name", str)
        shapes[name] = tuple(tensor.require("shape", list[int]))
        damage[name] = _read_damage(tensor, name)
    about = report.require("model.name", str), report.require("model.fingerprint", str)
    return Report(str(path), *about, hashlib.sha256(data).hexdigest(), shapes, damage)


def _read_damage(tensor: Document, name: str) -> dict[str, float]:
    types = tensor.require("types", dict)
    if not types or not types.keys() <= set(BY_NAME):
        raise tensor.complaint("types", f"the damage of {name} is missing; measure it again")
    return {key: tensor.require(f"types.{key}.kl", float, within=(0.0, math.inf)) for key in types}


def fingerprint(file: GGUFFile) -> str:
    """SHA-256 over the names and shapes of all tensors and the values of the vectors (norms, biases), which are F32 in
    every recipe: equal for all files made of one checkpoint, and different after any training."""
    digest = hashlib.sha256()
    for name in sorted(file.tensors):
        info = file.tensors[name]
        digest.update(f"{name} {info.shape}\n".encode())
        if len(info.shape) == 1 and info.format is F32 and not name.startswith("audio."):
            digest.update(file.data(name).tobytes())
    return digest.hexdigest()


def measured_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors whose type is a matter of choice: all but those that every quantising recipe keeps as they are."""
    kept = [rule.pattern for rule in (*KEPT, *CONVOLUTIONS) if rule.where == ""]
    return [n for n, shape in shapes.items() if len(shape) > 1 and not any(fnmatchcase(n, p) for p in kept)]


# From a report to a recipe.


@dataclass(frozen=True)
class Budget:
    """A file of at most `target_bytes`; encoder and adapters get no type of fewer bits than `floor`."""

    target_bytes: int
    report: Report
    floor: Format = ENCODER_FLOOR

    def check(self, file: GGUFFile) -> None:
        """Raises ConversionError unless the report is about the model in `file`."""
        shapes = {
            name: file.tensors[name].shape for name in measured_names({n: t.shape for n, t in file.tensors.items()})
        }
        own, other = shapes, self.report.shapes
        wrong = next((n for n in sorted({*own, *other}) if own.get(n) != other.get(n)), None)
        if wrong is not None:
            reason = f"{wrong} is {_show(own.get(wrong))} here and {_show(other.get(wrong))} there"
        elif fingerprint(file) != self.report.fingerprint:
            reason = "shapes agree, the values of its norms do not"
        else:
            return
        raise ConversionError(
            f"{self.report.path} was measured on another model ({quote(self.report.model)}): {reason}; measure this one"
        )

    def describe(self) -> dict[str, Typed]:
        """Keys that record how the types came about; their length does not depend on the choice."""
        return {
            f"{BUDGET_KEYS}target_bytes": u64(self.target_bytes),
            f"{BUDGET_KEYS}report_sha256": string(self.report.digest),
            f"{BUDGET_KEYS}encoder_floor": string(self.floor.name),
        }

    def options(self, name: str, shape: tuple[int, ...], alignment: int) -> list[Option]:
        """The types that tensor `name` may have."""
        damage, in_encoder = self.report.damage[name], part_of(name) in ENCODER_PARTS
        formats = [BY_NAME[t] for t in damage if shape[-1] % BY_NAME[t].length == 0]
        least = fit_rows(self.floor, shape[-1]).bits_per_weight if in_encoder else 0.0
        allowed = [f for f in formats if f.bits_per_weight >= least]
        if not allowed:
            raise ConversionError(f"{self.report.path}: {name} was measured for no type it may have; measure it again")
        return [Option(f, align(f.tensor_bytes(shape), alignment), damage[f.name]) for f in allowed]

    def make_recipe(
        self, shapes: Mapping[str, tuple[int, ...]], overrides: Sequence[Rule], other_bytes: int, alignment: int
    ) -> tuple[Recipe, str]:
        """The recipe, and a note on it. `other_bytes`: all of the file but the tensors that no override names.

        Raises ConversionError for a target that cannot be reached, with the smallest that can.
        """
        names = free_names(shapes, overrides)
        options = [self.options(name, shapes[name], alignment) for name in names]
        smallest = other_bytes + sum(min(o.nbytes for o in choices) for choices in options)
        if smallest > self.target_bytes:
            raise ConversionError(
                f"a file of {self.target_bytes:,} bytes cannot be made: the smallest has {smallest:,} "
                f"({smallest / 2**20:,.2f} MiB) with an encoder of at least {self.floor}"
            )
        chosen = choose_options(options, self.target_bytes - other_bytes)
        picked = {n: choices[i] for n, choices, i in zip(names, options, chosen, strict=True)}
        damage = math.fsum(option.damage for option in picked.values())
        size = other_bytes + sum(option.nbytes for option in picked.values())
        note = f"{size:,} of {self.target_bytes:,} bytes; divergence of the logits by the report: {damage:.2e} nats"
        rules = tuple(Rule(name, option.format) for name, option in picked.items())
        return Recipe("budget", _file_type(picked), (*CONVOLUTIONS, *rules, Rule("*", F16))), note


def free_names(shapes: Mapping[str, tuple[int, ...]], overrides: Sequence[Rule]) -> list[str]:
    """The tensors whose type a budget chooses."""
    return [n for n in measured_names(shapes) if not any(fnmatchcase(n, rule.pattern) for rule in overrides)]


def _file_type(picked: Mapping[str, Option]) -> int:
    """The number for the type that holds most bytes of the decoder."""
    totals: dict[str, int] = {}
    for name, option in picked.items():
        if part_of(name) not in ENCODER_PARTS:
            totals[option.format.name] = totals.get(option.format.name, 0) + option.nbytes
    return FILE_TYPES.get(max(totals, key=totals.__getitem__, default="F16"), 1)


def _show(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape[:8]))
