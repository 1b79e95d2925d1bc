"""Graphs: values, the nodes that compute them, and names for the values people ask about.

A graph is a list of nodes in an order that can be run. It is built for concrete shapes, by calling ops by
name: `y = g.linear(x, w)`; `ops.py` says which there are. Knows no numbers, no memory and no backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .ops import OPS

Kind = Literal["computed", "input", "weight", "state", "constant"]


@dataclass(frozen=True, eq=False)
class Value:
    """An array that exists while a graph runs; compared by identity.

    `kind` says where it comes from: a node, the caller, the model file, a buffer that outlives the run
    (the KV cache), or the graph itself.
    """

    shape: tuple[int, ...]
    dtype: str = "f32"  # or "i32"
    kind: Kind = "computed"
    name: str = ""
    make: Callable[[], np.ndarray] | None = None  # the numbers of a constant

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 4 * self.size


Operand = Value | tuple[Value | None, ...] | None


@dataclass(frozen=True, eq=False)
class Node:
    """One call of an op: `op(*inputs, **attrs) -> outputs`."""

    op: str
    inputs: tuple[Operand, ...]
    attrs: Mapping[str, Any]
    outputs: tuple[Value, ...]

    @property
    def operands(self) -> Iterator[Value]:
        """Every input value, those inside tuples too."""
        for x in self.inputs:
            for value in x if isinstance(x, tuple) else (x,):
                if value is not None:
                    yield value


@dataclass
class Graph:
    """Nodes in running order. `stages`: names for values that may be captured or fed. `required`: values that
    must be computed though no captured stage needs them (a KV cache after a write)."""

    nodes: list[Node] = field(default_factory=list)
    leaves: dict[tuple[Kind, str], Value] = field(default_factory=dict)
    stages: dict[str, Value] = field(default_factory=dict)
    required: list[Value] = field(default_factory=list)

    # Building.

    def input(self, name: str, shape: tuple[int, ...], dtype: str = "f32") -> Value:
        """An array the caller hands in at each run."""
        return self._leaf(Value(shape, dtype, "input", name))

    def weight(self, name: str, shape: tuple[int, ...]) -> Value:
        """A tensor of the model file."""
        return self._leaf(Value(shape, "f32", "weight", name))

    def state(self, name: str, shape: tuple[int, ...]) -> Value:
        """A buffer that outlives the run."""
        return self._leaf(Value(shape, "f32", "state", name))

    def constant(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Value:
        """Numbers that are part of the graph; they are made when it is bound, not before its shapes are known good."""
        return self._leaf(Value(shape, "f32", "constant", name, make))

    def _leaf(self, leaf: Value) -> Value:
        known = self.leaves.setdefault((leaf.kind, leaf.name), leaf)
        assert known.shape == leaf.shape, f"{leaf.kind} {leaf.name}: {known.shape=} {leaf.shape=}"
        return known

    def __getattr__(self, op: str) -> Callable[..., Any]:
        """`g.<op>(*operands, **attrs)` appends a node and gives its result (or a tuple of results)."""
        if op not in OPS:
            raise AttributeError(f"no op {op!r} in the op table")
        return lambda *inputs, **attrs: self.append(op, inputs, attrs)

    def append(self, op: str, inputs: tuple[Operand, ...], attrs: Mapping[str, Any]) -> Any:
        results = infer_results(op, inputs, attrs)
        outputs = results if isinstance(results, tuple) else (results,)
        self.nodes.append(Node(op, inputs, attrs, outputs))
        return results

    def stage(self, name: str, value: Value) -> Value:
        """Names `value`; returns it, so that a model reads in one line."""
        assert name not in self.stages, f"stage {name} named twice"
        self.stages[name] = value
        return value

    def require(self, value: Value) -> None:
        self.required.append(value)

    # Looking.

    def leaves_of(self, kind: Kind) -> list[Value]:
        return [leaf for leaf in self.leaves.values() if leaf.kind == kind]

    def users(self) -> dict[Value, list[Node]]:
        """For each value the nodes that read it."""
        users: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.operands:
                users.setdefault(value, []).append(node)
        return users


def infer_results(op: str, inputs: tuple[Operand, ...], attrs: Mapping[str, Any]) -> Value | tuple[Value, ...]:
    """New values for an op's result, or for each of several; a fused op is asked through its expansion."""
    row = OPS[op]
    if row.rule is None:
        return row.expand(Graph(), *inputs, **attrs)
    shapes = row.rule(*inputs, **attrs)
    return tuple(Value(shape, row.dtype) for shape in shapes) if isinstance(shapes, list) else Value(shapes, row.dtype)


def replay(
    graph: Graph,
    visit: Callable[[Graph, Node, Callable[[Operand], Operand]], tuple[Value, ...] | None],
    keep: Collection[Node] | None = None,
    replaced: Mapping[Value, Value] | None = None,
) -> Graph:
    """Builds `graph` again node by node: the one way graphs are changed.

    `visit(new, node, current)` may append other nodes to the new graph and return the values that take the
    place of the node's outputs; with None the node is copied. `current(operand)` is an operand's counterpart in
    the new graph. Nodes outside `keep` are left out; a value in `replaced` is taken by that leaf.
    """
    new = Graph()
    now: dict[Value, Value] = dict(replaced or {})

    def current(operand: Operand) -> Operand:
        if isinstance(operand, tuple):
            return tuple(current(x) for x in operand)
        if operand is None or operand in now:
            return now.get(operand)
        assert operand.kind != "computed", f"a {operand.shape} value is read before it is computed"
        return now.setdefault(operand, new._leaf(operand))

    for leaf in now.values():
        new._leaf(leaf)
    for node in graph.nodes:
        if keep is not None and node not in keep:
            continue
        outputs = visit(new, node, current)
        if outputs is None:
            outputs = tuple(Value(v.shape, v.dtype) for v in node.outputs)
            new.nodes.append(Node(node.op, tuple(current(x) for x in node.inputs), node.attrs, outputs))
        for old, value in zip(node.outputs, outputs, strict=True):
            now.setdefault(old, value)
    for value in graph.stages.values():  # a stage that is fed and captured, and read by nobody
        if value.kind == "input" and graph.leaves.get((value.kind, value.name)) is value:
            current(value)
    new.stages = {name: now[v] for name, v in graph.stages.items() if v in now}
    new.required = [now[v] for v in graph.required if v in now]
    return new


def label_values(graph: Graph) -> None:
    """Names every computed value that is no stage yet, so that any of them can be captured or fed.

    A value made with a weight takes the weight's name (`llm.blk.3.attn.q`); any other is named by the stage it leads
    to and its op (`llm.blk.3:rope`), and so is one whose weight's name is taken. The second of a name is `name.1`.
    Views and changed states get no name. `stages` is put into running order.
    """
    named = {value: name for name, value in graph.stages.items()}
    ends = [named[v] for node in graph.nodes for v in node.outputs if v in named]
    ordered: dict[str, Value] = {}
    for node in graph.nodes:
        for value in node.outputs:
            if value in named:
                ordered[named[value]] = value
                ends.remove(named[value])
            elif ends and not OPS[node.op].view and not OPS[node.op].writes:
                base = _label(node, ends[0], graph.stages)
                n = sum(name.rpartition(".")[0] == base for name in ordered) + 1
                ordered[f"{base}.{n}" if base in ordered else base] = value
    graph.stages = ordered | {name: v for name, v in graph.stages.items() if name not in ordered}


def _label(node: Node, stage: str, taken: Collection[str]) -> str:
    """What `label_values` calls the result of `node` on the way to `stage`."""
    weight = next((x.name.removesuffix(".weight") for x in node.operands if x.kind == "weight"), None)
    if weight is not None and weight not in taken:
        return weight
    constant = next((x.name.split(".")[0] for x in node.operands if x.kind == "constant"), None)
    return f"{stage}:{node.op}" if constant is None else f"{stage}:{node.op}_{constant}"


def cut(graph: Graph, capture: Collection[str], feed: Collection[str] = ()) -> Graph:
    """The part of `graph` that the captured stages need; a fed stage becomes an input of its name.

    Required values are computed too, unless something is fed: then what was cut off stays off.
    """
    unknown = [name for name in (*capture, *feed) if name not in graph.stages]
    assert not unknown, f"no such stage: {unknown}"
    replaced = {graph.stages[name]: Value(graph.stages[name].shape, kind="input", name=name) for name in feed}
    captured = {graph.stages[name] for name in capture}
    wanted = captured | (set() if feed else set(graph.required))
    keep: set[Node] = set()
    for node in reversed(graph.nodes):
        if any(v in wanted and v not in replaced for v in node.outputs):
            keep.add(node)
            wanted.update(node.operands)
    used = {v: leaf for v, leaf in replaced.items() if v in wanted}
    used |= {v: v for v in captured if v.kind == "input"}
    return replay(graph, lambda new, node, current: None, keep, used)


def expand(graph: Graph, known: Collection[str]) -> Graph:
    """`graph` with every fused op that is not in `known` replaced by its expansion, as deep as needed."""

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        if node.op in known or OPS[node.op].expand is None:
            return None
        result = OPS[node.op].expand(new, *(current(x) for x in node.inputs), **node.attrs)
        return result if isinstance(result, tuple) else (result,)

    while any(n.op not in known and OPS[n.op].expand for n in graph.nodes):
        graph = replay(graph, visit)
    return graph
