"""LoRA adapters: low-rank changes of a model's matrices, read from files and applied when a model is loaded.

The files are GGUF in llama.cpp's naming: `<tensor>.lora_a` [rank, n_in] and `<tensor>.lora_b` [n_out, rank] beside the
key `adapter.lora.alpha`. y = W x becomes y = W x + scale * alpha / rank * B (A x); an alpha of 0 leaves `scale` alone.
Several adapters of a matrix are one of the sum of their ranks. Knows files and graphs; no backend and no training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.dequantize import dequantize
from ..kernels.formats import F32
from ..kernels.quote import quote
from .gguf import GGUFFile, TensorInfo, open_gguf
from .graph import Graph, Node, Operand, Value, replay
from .kinds import ADAPTER, expect_kind
from .models.config import ModelError
from .models.moss_audio import part_of
from .sampling import OptionError

if TYPE_CHECKING:
    from .backends.backend import Backend

ADAPTER_TYPE = "lora"
ALPHA_KEY = "adapter.lora.alpha"
A, B = ".lora_a", ".lora_b"
UNADAPTED = ("embedding", "other")  # parts whose matrices are looked up or are tables

LoraSpec = str | os.PathLike


class LoraError(ModelError):
    """An adapter that is damaged, of another kind, or of another model."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a matrix by b @ a: `a` float32 [rank, n_in], `b` float32 [n_out, rank] with every scale in it."""

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that is changed."""
        return len(self.b), self.a.shape[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop - 1 of the change: float32 [stop - start, n_in]."""
        return self.b[start:stop] @ self.a


def is_adaptable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that multiplies activations, and nothing else."""
    return len(shape) == 2 and name.endswith(".weight") and part_of(name) not in UNADAPTED


def parse_lora(spec: LoraSpec) -> tuple[Path, float]:
    """Path and scale of `FILE` or `FILE:SCALE`; what exists as a file is one, colons or not. Raises OptionError."""
    text = os.fspath(spec)
    path, colon, scale = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise OptionError(f"--lora {text!r}: {scale!r} is no scale; write FILE or FILE:SCALE, as in voice.gguf:0.5")
    return Path(path), value


def read_loras(
    specs: Sequence[LoraSpec], architecture: str, shapes: Mapping[str, tuple[int, ...]], model: object
) -> dict[str, LowRank]:
    """The changes that adapters make to the tensors of a model, by name. A scale of 0 makes none.

    `shapes`: the tensors of the model, which messages call `model`. Raises OptionError for a scale that is none,
    GGUFError for a file that cannot be opened, and LoraError for one that is no adapter or does not fit the model.
    """
    found: dict[str, list[LowRank]] = {}
    for spec in specs:
        path, scale = parse_lora(spec)
        with open_gguf(path) as file:
            for name, pair in read_lora(file, scale, architecture).items():
                check_fit(path, name, pair, shapes, model)
                if scale:
                    found.setdefault(name, []).append(pair)
    return {name: stack(pairs) for name, pairs in found.items()}


def read_lora(file: GGUFFile, scale: float, architecture: str) -> dict[str, LowRank]:
    """The pairs of an adapter file, `scale * alpha / rank` taken into `b`. Raises LoraError."""
    alpha = read_alpha(file, architecture)
    bases = {name.removesuffix(end): None for name in file.tensors for end in (A, B) if name.endswith(end)}
    strange = next((name for name in file.tensors if not name.endswith((A, B))), None)
    if strange is not None or not bases:
        what = "has no pair" if strange is None else f"holds {quote(strange)}, which is neither {A} nor {B}"
        raise LoraError(f"{file.where}: the adapter {what}; only plain LoRA is read, convert it again")
    return {name: read_pair(file, name, scale, alpha) for name in bases}


def read_alpha(file: GGUFFile, architecture: str) -> float:
    expect_kind(file, ADAPTER, LoraError, "give a file of auricle convert --lora")
    found = file.get("adapter.type", str)
    if found != ADAPTER_TYPE:
        raise LoraError(
            f"{file.where}: adapter.type is {quote(found)}, not {ADAPTER_TYPE!r}; give a file of auricle convert --lora"
        )
    found = file.get("general.architecture", str)
    if found != architecture:
        raise LoraError(f"{file.where}: an adapter for {quote(found)}, and the model is {quote(architecture)}")
    return file.get(ALPHA_KEY, float, 0.0)


def read_pair(file: GGUFFile, name: str, scale: float, alpha: float) -> LowRank:
    """The pair of the tensor `name`, in float32."""
    for end in (A, B):
        if name + end not in file.tensors:
            raise LoraError(
                f"{file.where}: {quote(name + end)} is missing beside its counterpart; convert the adapter again"
            )
    a, b = (file.tensors[name + end].shape for end in (A, B))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise LoraError(
            f"{file.where}: the pair of {quote(name)} is {list(a)} and {list(b)}, not [rank, n_in] and [n_out, rank]"
        )
    down, up = (dequantize(file.data(name + end), file.tensors[name + end].format) for end in (A, B))
    with np.errstate(over="ignore", invalid="ignore"):
        pair = LowRank(down, up * np.float32(scale * alpha / len(down) if alpha else scale))
    if not all(np.isfinite(x).all() for x in (pair.a, pair.b)):
        raise LoraError(
            f"{file.where}: the pair of {quote(name)} holds numbers that are not finite; convert the adapter again"
        )
    return pair


def check_fit(path: Path, name: str, pair: LowRank, shapes: Mapping[str, tuple[int, ...]], model: object) -> None:
    """Raises LoraError for a change of a tensor that the model does not have, or has in another shape."""
    if name not in shapes:
        raise LoraError(
            f"{path}: the adapter changes {quote(name)}, which is no tensor of {model}; it is for another model"
        )
    if not is_adaptable(name, shapes[name]):
        raise LoraError(f"{path}: the adapter changes {quote(name)}, and only matrices of linear maps can be changed")
    if shapes[name] != pair.shape:
        raise LoraError(
            f"{path}: the adapter makes {quote(name)} {list(pair.shape)}, and in {model} it is {list(shapes[name])}; "
            "it is for another model"
        )


def stack(pairs: Sequence[LowRank]) -> LowRank:
    """One change that is the sum of several of the same matrix."""
    if len(pairs) == 1:
        return pairs[0]
    return LowRank(np.concatenate([p.a for p in pairs]), np.concatenate([p.b for p in pairs], axis=1))


# At work.


class AdaptedFile:
    """A model file with the tensors of its adapters beside its own: float32, in memory."""

    def __init__(self, file: GGUFFile, pairs: Mapping[str, LowRank]) -> None:
        held = {name + end: x for name, pair in pairs.items() for end, x in ((A, pair.a), (B, pair.b))}
        self._file = file
        self._held = {name: np.ascontiguousarray(x, "<f4").view(np.uint8) for name, x in held.items()}
        self.tensors = {**file.tensors, **{n: TensorInfo(n, x.shape, F32, 0, x.nbytes) for n, x in held.items()}}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def data(self, name: str) -> np.ndarray:
        return self._held[name] if name in self._held else self._file.data(name)

    def forget(self, name: str) -> None:
        if name not in self._held:
            self._file.forget(name)


def attach_loras(file: GGUFFile, backend: Backend, specs: Sequence[LoraSpec]) -> tuple[Any, Backend]:
    """`file` with the tensors of adapters, and `backend` with the rule that uses them. Raises as `read_loras` does."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    pairs = read_loras(specs, file.require("general.architecture", str), shapes, file.path)
    if not pairs:
        return file, backend
    rule = partial(apply_loras, ranks={name: pair.rank for name, pair in pairs.items()})
    return AdaptedFile(file, pairs), replace(backend, rules=(rule, *backend.rules))


def apply_loras(graph: Graph, capture: Collection[str] = (), *, ranks: Mapping[str, int]) -> Graph:
    """linear(x, w, bias) -> add(linear(x, w, bias), linear(linear(x, w.lora_a), w.lora_b)) for each w in `ranks`.

    The sum takes the place of the result, stages included. A rule of `rewrite.py`; goes before fusions.
    """

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        name = node.inputs[1].name if node.op == "linear" else None
        if name not in ranks:
            return None
        operands = tuple(map(current, node.inputs))
        n_out, n_in = operands[1].shape
        a, b = new.weight(name + A, (ranks[name], n_in)), new.weight(name + B, (n_out, ranks[name]))
        return (new.add(new.linear(*operands, **node.attrs), new.linear(new.linear(operands[0], a), b)),)

    if not any(node.op == "linear" and node.inputs[1].name in ranks for node in graph.nodes):
        return graph
    return replay(graph, visit)
