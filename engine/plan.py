"""Lifetimes to offsets: where each value of a graph lies in one arena, and how large the arena is.

A value lives from the node that makes it to the last one that reads it; two values that never live at the
same time may share bytes. Knows sizes and order, no numbers; weights, states and constants are not in the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from .graph import Graph, Node, Value
from .ops import OPS

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@dataclass(frozen=True)
class Plan:
    """`offsets`: byte offset of each value's memory (views of one memory share it). `scratch`: byte offset of
    each node's work space. `arena_bytes` is what the arena takes; `transient_bytes` the most that a library
    allocates besides during one node."""

    offsets: dict[Value, int]
    scratch: dict[Node, int]
    arena_bytes: int
    transient_bytes: int


@dataclass(frozen=True)
class Span:
    """Bytes needed from node number `first` to node number `last`, both included."""

    nbytes: int
    first: int
    last: int


def _nothing(node: Node) -> int:
    return 0


def plan_memory(
    graph: Graph,
    outputs: Collection[Value],
    scratch: Callable[[Node], int] = _nothing,
    transient: Callable[[Node], int] = _nothing,
) -> Plan:
    """Places every value. Inputs are there from the start, `outputs` to the end of the run."""
    memory = find_memory(graph)
    spans = value_spans(graph, outputs, memory)
    works = {node: Span(scratch(node), i, i) for i, node in enumerate(graph.nodes) if scratch(node)}
    keys = [*spans, *works]
    placed, arena_bytes = place(list(spans.values()) + list(works.values()))
    offset_of = dict(zip(keys, placed, strict=True))
    return Plan(
        offsets={value: offset_of[root] for value, root in memory.items() if root in offset_of},
        scratch={node: offset_of[node] for node in works},
        arena_bytes=arena_bytes,
        transient_bytes=max((transient(node) for node in graph.nodes), default=0),
    )


def find_memory(graph: Graph) -> dict[Value, Value]:
    """For each value the one whose memory it is: itself, or the root of a chain of views and state changes."""
    memory = {leaf: leaf for leaf in graph.leaves.values()}
    for node in graph.nodes:
        for i, value in enumerate(node.outputs):
            shared = OPS[node.op].shared(i)
            memory[value] = value if shared is None else memory[node.inputs[shared]]
    return memory


def value_spans(graph: Graph, outputs: Collection[Value], memory: dict[Value, Value]) -> dict[Value, Span]:
    """The lifetime of each memory that belongs in the arena."""
    first: dict[Value, int] = dict.fromkeys(graph.leaves_of("input"), -1)
    last: dict[Value, int] = dict.fromkeys(first, -1)
    for i, node in enumerate(graph.nodes):
        for value in node.outputs:
            first.setdefault(memory[value], i)
            last[memory[value]] = max(i, last.get(memory[value], i))
        for value in node.operands:
            last[memory[value]] = i
    last.update({memory[value]: len(graph.nodes) for value in outputs})
    resident = {"computed", "input"}
    return {v: Span(v.nbytes, start, last[v]) for v, start in first.items() if v.kind in resident}


def place(spans: list[Span]) -> tuple[list[int], int]:
    """Offsets for the spans and the total: the largest first, each in the lowest gap among those alive with it."""
    offsets = np.zeros(len(spans), np.int64)
    size = np.array([-(-s.nbytes // ALIGNMENT) * ALIGNMENT for s in spans], np.int64)
    first = np.array([s.first for s in spans])
    last = np.array([s.last for s in spans])
    done = np.zeros(len(spans), bool)
    for i in np.argsort(-size, kind="stable"):
        alive = np.flatnonzero(done & (first <= last[i]) & (last >= first[i]))
        offset = 0
        for j in alive[np.argsort(offsets[alive], kind="stable")]:
            if offsets[j] - offset >= size[i]:
                break
            offset = max(offset, int(offsets[j] + size[j]))
        offsets[i], done[i] = offset, True
    return offsets.tolist(), int((offsets + size).max(initial=0))
