"""One model and one request, stage by stage: any value from the nearest known ones before it.

A stage is computed by a program that is fed with what is known and does only the rest, so that a walk along all
stages costs one run of the model and keeps few arrays. Who says what is known decides what is measured: a model's own
values show how errors add up, a reference's charge each error to the stage that makes it.

In here a stage is [n, d]: of the encoder a row for each valid token of all windows (padding is left out), of the
decoder one for each token of the prompt. `mel` is [n_mels, n_frames]; inside the stem values keep their shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from ...engine import Model
from ...engine.graph import Graph, Node, Value, cut, label_values
from ...engine.models.moss_audio import clip_windows, decoder_graph, encoder_graph, token_count
from ...engine.ops import OPS
from ...engine.prompts import Prompt
from ...engine.runtime import row_stages
from .request import BLOCK_ROWS, FORCED, GENERATED, IDS, MEL, Array, Blocks, DiffError, Emit, Request, hear

STEM = ("enc.conv", "enc.stem_proj:")  # beginnings of names whose values are images, not rows of tokens


class Outline:
    """The graphs of a model, for questions about names: which there are, and what each is computed from."""

    def __init__(self, model: Model, with_audio: bool) -> None:
        c = model.config
        self.decoder = decoder_graph(c, 1, 1, head="all", with_audio=with_audio)
        self.encoder = encoder_graph(c, 1, c.encoder.window_frames, 1) if with_audio else Graph()
        self.stages = [*self.encoder.stages, *self.decoder.stages]
        self.survivors: set[str] = set()
        for graph in (self.encoder, self.decoder):
            stages = list(graph.stages)
            label_values(graph)
            run = cut(graph, stages)
            for rule in model.backend.rules:
                run = rule(run, stages)
            self.survivors |= run.stages.keys()
        self.values = {**self.encoder.stages, **self.decoder.stages}
        self._names = {value: name for name, value in self.values.items()}
        self._maker = {v: node for g in (self.encoder, self.decoder) for node in g.nodes for v in node.outputs}
        self._node_rank = {node: i for i, node in enumerate([*self.encoder.nodes, *self.decoder.nodes])}
        self._rows = {f"audio.rows.{k}": name for k, name in enumerate(row_stages(c))} if with_audio else {}
        self._rank = {name: i for i, name in enumerate([MEL, IDS, *self.values])}

    def names(self, ops: bool) -> list[str]:
        """All stages in running order; with `ops` every named value that the backend computes, too."""
        inside = [name for name in self.values if name in self.survivors] if ops else self.stages
        return [*([MEL] if self.encoder.nodes else []), IDS, *inside]

    def trace(self, names: Sequence[str], known: Collection[str]) -> tuple[list[str], list[Node]]:
        """The nearest known names that `names` are computed from, and the nodes on the way, both in running order.
        `mel`, `input_ids` and rows that enter the decoder count as known."""
        found: set[str] = set()
        nodes: set[Node] = set()
        todo = [self.values[name] for name in names]
        while todo:
            value = todo.pop()
            source = self._source(value)
            if source is not None and (source in known or value.kind == "input"):
                found.add(source)
            elif value in self._maker and self._maker[value] not in nodes:
                nodes.add(self._maker[value])
                todo += self._maker[value].operands
        return sorted(found, key=self._rank.__getitem__), sorted(nodes, key=self._node_rank.__getitem__)

    def _source(self, value: Value) -> str | None:
        """The stage that a value stands for, if any."""
        if value.kind != "input":
            return self._names.get(value)
        return MEL if value.name == "mel" else IDS if value.name == IDS else self._rows.get(value.name)

    def stage_of(self, name: str) -> str:
        """The stage a value leads to: itself, or the next one in running order."""
        names = list(self.values)
        if name not in self.values or name in self.stages:
            return name
        return next(n for n in names[names.index(name) :] if n in self.stages)


class Walk:
    """`known` holds what later stages are computed from; the owner puts values there."""

    def __init__(self, model: Model, request: Request) -> None:
        self.model, self.request = model, request
        heard = hear(model, request)
        self.clip_frames = [mel.shape[1] for mel in heard.mels]
        self.prompt = model.build_prompt(request.prompt, heard, request.time_markers)
        self._mels = heard.mels
        self.outline = Outline(model, bool(heard.mels))
        self.known: dict[str, np.ndarray] = {}

    @property
    def lengths(self) -> list[int]:
        """Valid tokens of each window."""
        c = self.model.config.encoder
        return [token_count(n) for frames in self.clip_frames for n in clip_windows(c, frames)]

    def compute(self, name: str) -> Array:
        """A stage from the nearest known ones; what is missing among mel, ids and audio rows is computed and kept."""
        if name == MEL:
            return np.concatenate(self._mels, axis=1)
        if name == IDS:
            return self.prompt.ids
        needs, _ = self.outline.trace([name], self.known)
        rows = row_stages(self.model.config) if self._mels and name in self.outline.decoder.stages else []
        for need in (*([MEL] if self._mels else []), IDS, *rows, *needs):
            if need not in self.known:
                self.known[need] = self.compute(need)
        if name in self.outline.encoder.stages:
            return self._run_encoder(name, {n: self.known[n] for n in needs if n != MEL})
        feed = {n: self.known[n] for n in needs if n in self.outline.decoder.stages}
        return self._logits(feed) if name == "logits" else self._run_decoder(name, feed)

    def release(self, following: Sequence[str]) -> None:
        """Forgets what none of the names in `following` is computed from any more."""
        needed, _ = self.outline.trace([name for name in following if name in self.outline.values], self.known)
        kept = {MEL, IDS, *row_stages(self.model.config), *needed}
        for name in self.known.keys() - kept:
            del self.known[name]

    def _run_encoder(self, name: str, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        parts = []
        for batch, part in self.model.runtime.trace_windows(self._split_mel(), [name], feed):
            parts.append(flatten(name, part[name], batch.lengths))
        if len({part.shape[1:] for part in parts}) > 1:
            raise DiffError(f"{name}: batches of windows differ in shape: {[part.shape for part in parts]}")
        return np.concatenate(parts)

    def _split_mel(self) -> list[np.ndarray]:
        mel = self.known[MEL]
        if mel.shape[1] != sum(self.clip_frames):
            return [mel]
        return np.split(mel, np.cumsum(self.clip_frames)[:-1], axis=1)

    def _run_decoder(self, name: str, feed: dict[str, np.ndarray]) -> np.ndarray:
        ids = self.known[IDS]
        if not feed:  # something must be fed, or the run would fill the caches of all layers
            feed = {"logits": np.empty((len(ids), 0), np.float32)}
        stage = self.model.runtime.trace_decoder(self.as_prompt(ids), self._rows(), [name], feed)[name]
        return stage.reshape(len(stage), -1)

    def _rows(self) -> list[torch.Tensor]:
        if not self._mels:
            return []
        return [torch.from_numpy(np.ascontiguousarray(self.known[n])) for n in row_stages(self.model.config)]

    def as_prompt(self, ids: np.ndarray) -> Prompt:
        """Ids from elsewhere as a prompt: audio rows stand at the audio tokens, in order."""
        slots = ids == self.model.special.audio
        rows = np.where(slots, np.cumsum(slots) - 1, -1).astype(np.int32)
        n_rows = len(self.known["adapter"]) if self._mels else 0
        if slots.sum() != n_rows:
            raise DiffError(
                f"the prompt has {slots.sum()} audio tokens for {n_rows} rows; one side's windows are wrong"
            )
        return Prompt(ids.astype(np.int32), rows)

    def _logits(self, feed: dict[str, np.ndarray]) -> Blocks:
        hidden = feed.get("llm.final_norm")
        if hidden is None:
            hidden = self._run_decoder("llm.final_norm", feed)

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, len(hidden), BLOCK_ROWS):
                rows = hidden[start : start + BLOCK_ROWS]
                nothing = np.full(len(rows), -1, np.int32)
                fed = {"llm.final_norm": rows}
                yield self.model.runtime.trace_decoder(Prompt(-nothing, nothing), [], ["logits"], fed)["logits"]

        return Blocks((len(hidden), self.model.config.decoder.vocab_size), blocks())

    # Decoding, as a session does it: whole programs, nothing fed.

    def generate(self, ids: Sequence[int] | None, n_new: int) -> tuple[np.ndarray, np.ndarray]:
        """Goes on for `n_new` tokens, along `ids` or greedily: the likeliest tokens [n_new] int32, and the logits each
        was taken from [n_new, n_vocab]."""
        runtime = self.model.runtime
        logits = runtime.prefill(self.prompt, runtime.encode(self._mels) if self._mels else [])
        rows = np.empty((n_new, len(logits)), np.float32)
        for i in range(n_new):
            rows[i] = logits
            if i + 1 < n_new:
                token = int(ids[i]) if ids is not None else int(logits.argmax())
                logits = runtime.decode(token, len(self.prompt.ids) + i)
        return rows.argmax(-1).astype(np.int32), rows

    def emit_all(self, wanted: Sequence[str], emit: Emit) -> None:
        """Plays the reference: computes the wanted stages from its own, in order, and goes on greedily."""
        mine = [name for name in wanted if name in (MEL, IDS) or name in self.outline.values]
        for i, name in enumerate(mine):
            value = self.compute(name)
            emit(name, value, "all")
            if not isinstance(value, Blocks):
                self.known[name] = value
            if name in self.outline.stages:
                self.release(mine[i + 1 :])
        if self.request.n_new and GENERATED in wanted:
            ids, logits = self.generate(None, self.request.n_new)
            emit(GENERATED, ids, "all")
            emit(FORCED, logits, "all")


def flatten(name: str, value: np.ndarray, lengths: Collection[int]) -> np.ndarray:
    """A stage as a graph has it -> rows, without padding."""
    if value.ndim == 2 or name.startswith(STEM):
        return value
    assert len(value) == len(lengths), f"{name}: {value.shape=} {len(lengths)=}"
    return np.concatenate([window[:n].reshape(n, -1) for window, n in zip(value, lengths, strict=True)])


def op_names(nodes: Collection[Node]) -> list[str]:
    """The ops of nodes, views left out."""
    return [node.op for node in nodes if not OPS[node.op].view]


def weight_names(nodes: Collection[Node]) -> list[str]:
    return [value.name for node in nodes for value in node.operands if value.kind == "weight"]
