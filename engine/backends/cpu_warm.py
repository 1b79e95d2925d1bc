"""Compiles the kernels of the CPU backend before they are needed, by running each once on a few numbers.

Knows which shapes lead to which kernel (see `cpu_int8.py`, `cpu_rows.py`). Kernels do not depend on shapes otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ...kernels.cpu import plain
from ...kernels.cpu.tiles import TILE, TILES
from ...kernels.formats import F32, Format
from ..executor import compile_graph
from ..graph import Graph
from ..kv_cache import CacheTensor
from ..weights import Weight
from .cpu import make_backend
from .cpu_int8 import FEW, MANY_NUMBERS

D_HEAD = 32
MANY_ROWS = -(-MANY_NUMBERS // TILE)

Build = Callable[[Graph], None]


def warm(formats: Sequence[Format], kv_format: Format, n_tokens: Sequence[int] = (1, 2, FEW + 1)) -> Iterator[str]:
    """Compiles all that files with matrices of these types and a cache of that type can ask for, or loads it from
    where compiled kernels are kept; says what it does. `n_tokens`: for one token, for a few, for many."""
    for fmt in formats:
        if fmt in TILES or fmt in plain.KERNELS:
            for n in n_tokens:
                yield f"{fmt} times {'one token' if n == 1 else 'a few tokens' if n <= FEW else 'many tokens'}"
                _run(lambda g, n=n: _gated(g, n), fmt, kv_format)
    rounded = next((fmt for fmt in formats if fmt in TILES), None)
    if rounded is not None:
        yield "gates"
        _run(lambda g: _gated(g, MANY_NUMBERS // 16), rounded, kv_format)
    yield "norms and positions"
    for n in (1, MANY_ROWS):
        _run(lambda g, n=n: _rows(g, n), F32, kv_format)
    yield f"attention over a cache of {kv_format}"
    _run(_attend, F32, kv_format)


def _run(build: Build, fmt: Format, kv_format: Format) -> None:
    """Runs a graph on zeros; matrices are of type `fmt`."""
    graph = Graph()
    build(graph)
    weights = {}
    for leaf in graph.leaves_of("weight"):
        stored = fmt if len(leaf.shape) > 1 else F32
        data = np.zeros((*leaf.shape[:-1], stored.row_bytes(leaf.shape[-1])), np.uint8)
        weights[leaf.name] = Weight(leaf.name, stored, leaf.shape, data)
    states = {leaf.name: CacheTensor(leaf.shape, kv_format) for leaf in graph.leaves_of("state")}
    program = compile_graph(graph, make_backend("auto"), weights.get, capture=list(graph.stages), states=states)
    program.run({name: np.zeros(tuple(t.shape), np.int32) for name, t in program.inputs.items()})


def _gated(g: Graph, n: int) -> None:
    x = g.input("x", (n, TILE))
    g.stage("out", g.gated_linear(x, g.weight("a", (16, TILE)), g.weight("b", (16, TILE))))


def _rows(g: Graph, n: int) -> None:
    x, weight = g.input("x", (n, TILE)), g.weight("w", (TILE,))
    _, y = g.add_rms_norm(x, x, weight, eps=1e-6)
    g.stage("normed", g.rms_norm(y, weight, eps=1e-6))
    heads = g.reshape(y, shape=(n, TILE // D_HEAD, D_HEAD))
    g.stage("turned", g.norm_rope(heads, g.weight("h", (D_HEAD,)), g.input("p", (n,), "i32"), eps=1e-6, theta=1e6))


def _attend(g: Graph) -> None:
    row, positions = g.input("x", (1, 2, D_HEAD)), g.input("p", (1,), "i32")
    caches = [g.kv_store(g.state(name, (16, 2, D_HEAD)), row, positions) for name in "kv"]
    g.stage("out", g.kv_attention(row, *caches, positions))
