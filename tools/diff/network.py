"""A model at work on one request, and what becomes of its logits when some of its weights are others.

All stages of the unchanged model are kept, so that a change is followed from where it is made and not from the start.
Knows weights by name and by the values they meet; not where other weights come from, nor what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...engine import Model
from ...engine.graph import Node, Value
from ...engine.ops import OPS
from ...engine.prompts import Prompt
from ...engine.runtime import Runtime
from ...engine.weights import Weight
from .metrics import log_softmax
from .request import IDS, MEL, Blocks, DiffError, Request, blocks_of
from .walk import Walk

MAX_POSITIONS = 256  # whose logits are compared
MAX_ROWS = 128  # of a matrix's input
SLAB_ROWS = 16  # of logits in float64


class Use(NamedTuple):
    """Where a matrix is used: the value it multiplies (None where it is looked up), and its place in running order."""

    source: str | None
    rank: int


class Overlay:
    """A model file in which some tensors have other bytes."""

    def __init__(self, file: Any, changed: Mapping[str, Weight]) -> None:
        self._file, self._changed = file, changed
        self.tensors = {**file.tensors, **changed}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def data(self, name: str) -> np.ndarray:
        return self._changed[name].data if name in self._changed else self._file.data(name)


class Variant:
    """A model that computes with other bytes in some tensors."""

    def __init__(self, model: Model, changed: Mapping[str, Weight]) -> None:
        sizes = {"n_ctx": model.n_ctx, "kv_format": model.kv_format}
        self._model = model
        self.runtime = Runtime(Overlay(model.file, changed), model.config, model.backend, **sizes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Network:
    """The reference at work on one request: all its stages, and what its logits become when weights change."""

    def __init__(self, model: Model, request: Request) -> None:
        self.model, self.walk = model, Walk(model, request)
        self._extend(request.n_new)
        outline = self.walk.outline
        nodes = [*outline.encoder.nodes, *outline.decoder.nodes]
        self._maker = {value: (i, node) for i, node in enumerate(nodes) for value in node.outputs}
        self.uses = self._find_uses(nodes)
        self._stages: dict[str, np.ndarray] = {}
        walk = self.walk
        for name in [MEL, IDS, *(s for s in outline.stages if s != "logits")]:
            if name != MEL or outline.encoder.nodes:
                walk.known[name] = self._stages[name] = np.ascontiguousarray(walk.compute(name))
        n = len(walk.prompt.ids)
        self.positions = np.unique(np.linspace(0, n - 1, min(n, MAX_POSITIONS)).astype(int))
        self._reference = self._logits()

    def _extend(self, n_new: int) -> None:
        """Appends the reference's own greedy answer to the prompt, up to its end."""
        if not n_new:
            return
        ids, _ = self.walk.generate(None, n_new)
        ends = np.flatnonzero(np.isin(ids, [*self.model.stop_ids, self.model.special.audio]))
        ids = ids[: ends[0]] if len(ends) else ids
        prompt = self.walk.prompt
        nothing = np.full(len(ids), -1, prompt.audio_rows.dtype)
        self.walk.prompt = Prompt(
            np.concatenate([prompt.ids, ids.astype(prompt.ids.dtype)]), np.concatenate([prompt.audio_rows, nothing])
        )

    def _find_uses(self, nodes: Sequence[Node]) -> dict[str, Use]:
        names = {value: name for name, value in self.walk.outline.values.items()}
        uses: dict[str, Use] = {}
        for rank, node in enumerate(nodes):
            for value in (v for v in node.operands if v.kind == "weight" and len(v.shape) > 1):
                source = names[self._behind_views(node.inputs[0])] if node.op == "linear" else None
                first = uses.get(value.name)
                uses[value.name] = Use(source, first.rank if first else rank)
        return uses

    def _behind_views(self, value: Value) -> Value:
        while OPS[self._maker[value][1].op].view:
            value = self._maker[value][1].inputs[0]
        return value

    def inputs(self, name: str) -> np.ndarray | None:
        """Rows that the matrix multiplies, at most `MAX_ROWS` [n, n_in]; None for a table."""
        source = self.uses[name].source
        if source is None:
            return None
        self._set(None, self.uses[name].rank)
        n_cols = self.model.file.tensors[name].shape[-1]
        rows = self.walk.known[source] if source in self.walk.known else np.asarray(self.walk.compute(source))
        rows = rows.reshape(-1, n_cols)
        return np.ascontiguousarray(rows[np.unique(np.linspace(0, len(rows) - 1, MAX_ROWS).astype(int))])

    def divergence(self, changed: Mapping[str, Weight]) -> float:
        """Mean KL divergence of the logits, in nats, with these weights in place of the reference's."""
        self._set(changed, min(self.uses[name].rank for name in changed))
        return self._compare(next(iter(changed)))

    def divergence_of(self, model: Model) -> float:
        """The same of another model on the same tokens, all of it computed by itself."""
        self.walk.model, self.walk.known = model, {n: self._stages[n] for n in (MEL, IDS) if n in self._stages}
        return self._compare(str(model.file.path))

    def _compare(self, what: str) -> float:
        own, total = self._logits(), 0.0
        if not np.isfinite(own).all():
            raise DiffError(f"the logits are not finite with {what}; auricle verify it")
        for i in range(0, len(own), SLAB_ROWS):
            q, p = (log_softmax(rows[i : i + SLAB_ROWS].astype(np.float64)) for rows in (own, self._reference))
            total += float((np.exp(p) * (p - q)).sum())
        return max(0.0, total / len(own))

    def _set(self, changed: Mapping[str, Weight] | None, rank: int) -> None:
        """Goes to just before the node `rank`: what comes earlier is known."""
        self.walk.model = Variant(self.model, changed) if changed else self.model
        self.walk.known = {n: v for n, v in self._stages.items() if n in (MEL, IDS) or self._rank_of(n) < rank}

    def _rank_of(self, stage: str) -> int:
        return self._maker[self.walk.outline.values[stage]][0]

    def _logits(self) -> np.ndarray:
        known = self.walk.known
        hidden = known["llm.final_norm"] if "llm.final_norm" in known else self.walk.compute("llm.final_norm")
        known["llm.final_norm"] = np.ascontiguousarray(hidden[self.positions])
        blocks = self.walk.compute("logits")
        assert isinstance(blocks, Blocks)
        return np.concatenate(list(blocks_of(blocks)))
