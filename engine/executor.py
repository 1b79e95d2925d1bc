"""Graph, plan and backend to a program: a flat list of bound calls over one arena.

Everything that can be decided before a run is decided in `compile_graph`; a run copies the inputs in and
makes the calls. Knows no op and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .graph import Graph, Node, Operand, Value, cut, expand
from .ops import OPS
from .plan import Plan, plan_memory
from .weights import Weight

if TYPE_CHECKING:
    from .backends.backend import Backend

DTYPES = {"f32": torch.float32, "i32": torch.int32}
POISON = 0xFF  # bytes of a float32 NaN, and of the int32 -1


@dataclass(frozen=True)
class Draft:
    """A graph as a backend will run it, with its memory planned: all that can be known without the weights."""

    graph: Graph
    backend: Backend
    capture: tuple[str, ...]
    plan: Plan


def draft_graph(graph: Graph, backend: Backend, capture: Collection[str], feed: Collection[str] = ()) -> Draft:
    """Cuts, rewrites, expands and plans `graph` for `backend`."""
    graph = cut(graph, capture, feed)
    for rule in backend.rules:
        graph = rule(graph, capture)
    graph = expand(graph, backend.kernels)
    unknown = {n.op for n in graph.nodes if n.op not in backend.kernels and not OPS[n.op].view}
    assert not unknown, f"backend {backend.name} has no kernel for {sorted(unknown)}"
    plan = plan_memory(
        graph,
        [graph.stages[name] for name in capture],
        lambda n: backend.kernels[n.op].scratch(n) if n.op in backend.kernels else 0,
        lambda n: backend.kernels[n.op].transient(n) if n.op in backend.kernels else 0,
    )
    return Draft(graph, backend, tuple(capture), plan)


Call = Callable[[], None]


class Program:
    """Bound calls. One run at a time; results lie in the arena and are overwritten by the next run in it.

    Where the device can record calls, the second run does, and those after it start what was recorded: a program that
    runs once pays nothing for it, and by then all has been loaded.
    """

    def __init__(
        self,
        draft: Draft,
        weights: Callable[[str], Weight],
        states: Mapping[str, Any],
        arena: torch.Tensor | None = None,
        poison: bool = False,
        inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """`arena`: uint8, at least `draft.plan.arena_bytes`; None allocates just that. `poison`: fill the arena with
        NaN before each run, so that a kernel that leaves a result unwritten is found. `inputs`: tensors of the
        caller's to read instead of the arena's."""
        self.plan, self.device = draft.plan, draft.backend.device
        self.poison = poison
        self.arena = self.device.empty(self.plan.arena_bytes) if arena is None else arena
        assert self.arena.numel() >= self.plan.arena_bytes, f"{self.arena.numel()=} {self.plan.arena_bytes=}"
        self._weights, self._states = weights, states
        graph = draft.graph
        self._bound: dict[Value, Any] = {graph.leaves["input", name]: value for name, value in (inputs or {}).items()}
        self.inputs = {leaf.name: self._bind_value(leaf) for leaf in graph.leaves_of("input")}
        self._calls: list[Call] = []
        self._fleeting: set[Call] = set()  # those that allocate: a recording would keep that memory from everybody else
        for node in graph.nodes:
            if (call := self._bind_node(node, draft.backend)) is not None:
                self._calls.append(call)
                if draft.backend.kernels[node.op].transient(node):
                    self._fleeting.add(call)
        self._n_runs = 0
        self.outputs = {name: self._bind_value(graph.stages[name]) for name in draft.capture}

    def run(self, feed: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs once on `feed` (an array for each input, or its first rows where no op reads the rest); gives each
        captured stage as a view of the arena."""
        assert feed.keys() == self.inputs.keys(), f"{sorted(feed)=} {sorted(self.inputs)=}"
        if self.poison:
            self.arena.fill_(POISON)
        for name, tensor in self.inputs.items():
            array = feed[name]
            fits = array.shape[1:] == tensor.shape[1:] and len(array) <= len(tensor)
            assert fits, f"{name}: {array.shape=} {tensor.shape=}"
            self.device.fill(tensor, array)
        if self._n_runs == 1 and self.device.record is not None:
            self._calls = record_calls(self._calls, self._fleeting, self.device.record)
        self._n_runs += 1
        self.call()
        return self.outputs

    def call(self) -> None:
        """Runs on what the inputs hold."""
        call_all(self._calls)

    def _bind_node(self, node: Node, backend: Backend) -> Callable[[], None] | None:
        inputs = tuple(self._bind_operand(x) for x in node.inputs)
        if OPS[node.op].view:
            self._bound[node.outputs[0]] = inputs[0].view(node.outputs[0].shape)
            return None
        for i, value in enumerate(node.outputs):
            if (shared := OPS[node.op].shared(i)) is not None:
                self._bound[value] = inputs[shared]
        outputs = tuple(self._bind_value(v) for v in node.outputs)
        kernel = backend.kernels[node.op]
        scratch = None
        if node in self.plan.scratch:
            start = self.plan.scratch[node]
            scratch = self.arena[start : start + kernel.scratch(node)]
        return kernel.bind(node, inputs, outputs, scratch)

    def _bind_operand(self, operand: Operand) -> Any:
        if isinstance(operand, tuple):
            return tuple(self._bind_operand(x) for x in operand)
        return None if operand is None else self._bind_value(operand)

    def _bind_value(self, value: Value) -> Any:
        if value not in self._bound:
            self._bound[value] = self._find(value)
        return self._bound[value]

    def _find(self, value: Value) -> Any:
        if value.kind == "weight":
            return self._weights(value.name)
        if value.kind == "state":
            return self._states[value.name]
        if value.kind == "constant":
            data = np.asarray(value.make(), np.float32)
            assert data.shape == value.shape, f"{value.name}: {data.shape=} {value.shape=}"
            return self.device.constant(data)
        start = self.plan.offsets[value]
        return self.arena[start : start + value.nbytes].view(DTYPES[value.dtype]).view(value.shape)


def record_calls(calls: list[Call], fleeting: Collection[Call], record: Callable[[Call], Call]) -> list[Call]:
    """The calls with each stretch of those that are not `fleeting` recorded as one."""
    results: list[Call] = []
    for passes, group in groupby(calls, key=fleeting.__contains__):
        stretch = tuple(group)
        results += stretch if passes or len(stretch) == 1 else [record(partial(call_all, stretch))]
    return results


def call_all(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def compile_graph(
    graph: Graph,
    backend: Backend,
    weights: Callable[[str], Weight],
    *,
    capture: Collection[str],
    feed: Collection[str] = (),
    states: Mapping[str, Any] | None = None,
    poison: bool = False,
) -> Program:
    """Draft and bind in one step, with an arena of its own."""
    draft = draft_graph(graph, backend, capture, feed)
    return Program(draft, lambda name: backend.device.place(weights(name)), states or {}, poison=poison)
