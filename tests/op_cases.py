"""One table of cases for the ops: it drives the tests of every backend, and their benchmarks.

A case builds a graph of one op (or a few) with stages `out` or `out.N`; `materials` makes random operands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from auricle.engine.graph import Graph, Value
from auricle.engine.kv_cache import CacheTensor
from auricle.engine.weights import Weight
from auricle.kernels.formats import F32, Format
from auricle.kernels.quantize import quantize


@dataclass(frozen=True)
class Case:
    """`ints`: the int32 inputs. `filled`: slots of each cache that hold something before the op runs."""

    name: str
    build: Callable[[Graph], Value | tuple[Value, ...]]
    ints: Mapping[str, np.ndarray] = field(default_factory=dict)
    filled: int = 0

    def graph(self) -> Graph:
        g = Graph()
        result = self.build(g)
        for n, value in enumerate(result if isinstance(result, tuple) else (result,)):
            g.stage(f"out.{n}", value)
        return g

    def fills(self, length: int) -> bool:
        """Whether the rows of its matrices fill blocks of that length."""
        return all(w.shape[-1] % length == 0 for w in self.graph().leaves_of("weight") if len(w.shape) > 1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Materials:
    """Operands by name."""

    feed: dict[str, np.ndarray]
    weights: dict[str, Weight]
    states: dict[str, CacheTensor]


def make_weight(name: str, shape: tuple[int, ...], fmt: Format, rng: np.random.Generator) -> Weight:
    values = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
    stored = fmt if len(shape) > 1 and shape[-1] % fmt.length == 0 else F32
    data = quantize(values.reshape(-1, shape[-1]), stored)
    return Weight(name, stored, shape, data.reshape(*shape[:-1], -1))


def materials(
    case: Case,
    fmt: Format = F32,
    kv_format: Format = F32,
    seed: int = 0,
    make: Callable[[str, tuple[int, ...], Format, np.random.Generator], Weight] = make_weight,
) -> Materials:
    """Random operands; matrices are stored in `fmt` where their rows fill its blocks, all else in F32."""
    rng = np.random.default_rng(seed)
    graph = case.graph()
    feed = {
        v.name: rng.standard_normal(v.shape, dtype=np.float32) for v in graph.leaves_of("input") if v.dtype == "f32"
    }
    feed |= {name: np.asarray(values, np.int32) for name, values in case.ints.items()}
    weights = {v.name: make(v.name, v.shape, fmt, rng) for v in graph.leaves_of("weight")}
    states = {}
    for v in graph.leaves_of("state"):
        states[v.name] = cache = CacheTensor(v.shape, kv_format)
        rows = torch.from_numpy(rng.standard_normal((case.filled, *v.shape[1:]), dtype=np.float32))
        cache.write(torch.arange(case.filled, dtype=torch.int32), rows)
    return Materials(feed, weights, states)


def tolerance(case: Case, weights: Mapping[str, Weight], rounds: Collection[str] = ()) -> float:
    """How far a backend may be from the reference on the same operands. `rounds`: names of the types whose activations
    it rounds to int8, with a scale for each 16 or 32, in rows of whole tiles of 256."""
    products = {"linear", "linears", "gated_linear"} & {node.op for node in case.graph().nodes}
    rounded = any(w.format.name in rounds and len(w.shape) == 2 and w.shape[1] % 256 == 0 for w in weights.values())
    return 1.2e-2 if products and rounded else 2e-6


def _linear(n_tokens: int, n_in: int, n_out: int, bias: bool = False) -> Case:
    def build(g: Graph) -> Value:
        b = g.weight("bias", (n_out,)) if bias else None
        return g.linear(g.input("x", (n_tokens, n_in)), g.weight("w", (n_out, n_in)), b)

    return Case(f"linear-{n_tokens}x{n_in}x{n_out}{'-bias' if bias else ''}", build)


def _gated(n_tokens: int, n_in: int, n_out: int) -> Case:
    def build(g: Graph) -> Value:
        x = g.input("x", (n_tokens, n_in))
        return g.gated_linear(x, g.weight("gate", (n_out, n_in)), g.weight("up", (n_out, n_in)))

    return Case(f"gated_linear-{n_tokens}x{n_in}x{n_out}", build)


def _linears(n_tokens: int, n_in: int, sizes: tuple[int, ...] = (96, 33, 33), biased: tuple[int, ...] = (0,)) -> Case:
    """`biased`: the numbers of the maps that have a bias."""

    def build(g: Graph) -> tuple[Value, ...]:
        x = g.input("x", (n_tokens, n_in))
        weights = tuple(g.weight(f"w{i}", (n, n_in)) for i, n in enumerate(sizes))
        biases = tuple(g.weight(f"b{i}", (n,)) if i in biased else None for i, n in enumerate(sizes))
        return g.linears(x, weights, biases)

    return Case(f"linears-{n_tokens}x{n_in}", build)


def _norms(shape: tuple[int, ...]) -> list[Case]:
    name = "x".join(map(str, shape))
    d = shape[-1:]
    return [
        Case(f"rms_norm-{name}", lambda g: g.rms_norm(g.input("x", shape), g.weight("w", d), eps=1e-6)),
        Case(
            f"layer_norm-{name}",
            lambda g: g.layer_norm(g.input("x", shape), g.weight("w", d), g.weight("b", d), eps=1e-5),
        ),
        Case(
            f"add_rms_norm-{name}",
            lambda g: g.add_rms_norm(g.input("a", shape), g.input("b", shape), g.weight("w", d), eps=1e-6),
        ),
    ]


def _elementwise(shape: tuple[int, ...]) -> list[Case]:
    name = "x".join(map(str, shape))
    return [
        Case(f"add-{name}", lambda g: g.add(g.input("a", shape), g.input("b", shape))),
        Case(f"add-{name}-repeated", lambda g: g.add(g.input("a", shape), g.input("b", shape[1:]))),
        Case(f"mul-{name}", lambda g: g.mul(g.input("a", shape), g.input("b", shape))),
        Case(f"silu-{name}", lambda g: g.silu(g.input("a", shape))),
        Case(f"gelu-{name}", lambda g: g.gelu(g.input("a", shape))),
    ]


def _conv(n: int, c_in: int, c_out: int, h: int, w: int) -> Case:
    def build(g: Graph) -> Value:
        weight, bias = g.weight("w", (c_out, c_in, 3, 3)), g.weight("b", (c_out,))
        return g.conv2d(g.input("x", (n, c_in, h, w)), weight, bias, stride=2, padding=1)

    return Case(f"conv2d-{n}x{c_in}x{h}x{w}-{c_out}", build)


def _conv_stack(n: int, channels: tuple[int, ...], h: int, w: int) -> Case:
    def build(g: Graph) -> Value:
        pairs = list(pairwise(channels))
        weights = tuple(g.weight(f"w{i}", (c_out, c_in, 3, 3)) for i, (c_in, c_out) in enumerate(pairs))
        biases = tuple(g.weight(f"b{i}", (c_out,)) for i, (_, c_out) in enumerate(pairs))
        x = g.input("x", (n, channels[0], h, w))
        return g.conv_stack(x, weights, biases, stride=2, padding=1, dims=(0, 3, 1, 2))

    return Case(f"conv_stack-{n}x{h}x{w}-{'-'.join(map(str, channels))}", build)


def _rows() -> list[Case]:
    table, rows = (11, 32), (7, 5)
    index = [3, -1, 0, -1, 4, 1, -1]

    def put(op: str) -> Callable[[Graph], Value]:
        return lambda g: getattr(g, op)(g.input("x", rows), g.input("r", (6, 5)), g.input("i", (7,), "i32"))

    return [
        Case("get_rows", lambda g: g.get_rows(g.weight("w", table), g.input("i", (4,), "i32")), {"i": [10, 0, 3, 3]}),
        Case("take_rows", lambda g: g.take_rows(g.input("x", rows), g.input("i", (3,), "i32")), {"i": [6, 0, 6]}),
        Case("put_rows", put("put_rows"), {"i": index}),
        Case("add_rows", put("add_rows"), {"i": index}),
        Case("argmax", lambda g: g.argmax(g.input("x", rows))),
        Case("permute", lambda g: g.permute(g.input("x", (2, 3, 4, 5)), dims=(0, 3, 1, 2))),
        Case("reshape", lambda g: g.add(g.reshape(g.input("x", (4, 6)), shape=(2, 12)), g.input("y", (2, 12)))),
    ]


def _rope(n_tokens: int, n_head: int, d_head: int, first: int) -> Case:
    return Case(
        f"rope-{n_tokens}x{n_head}x{d_head}-at-{first}",
        lambda g: g.rope(g.input("x", (n_tokens, n_head, d_head)), g.input("p", (n_tokens,), "i32"), theta=1e6),
        {"p": np.arange(first, first + n_tokens)},
    )


def _norm_rope(n_tokens: int, n_head: int, d_head: int, first: int) -> Case:
    def build(g: Graph) -> Value:
        x, positions = g.input("x", (n_tokens, n_head, d_head)), g.input("p", (n_tokens,), "i32")
        return g.norm_rope(x, g.weight("w", (d_head,)), positions, eps=1e-6, theta=1e6)

    name = f"norm_rope-{n_tokens}x{n_head}x{d_head}-at-{first}"
    return Case(name, build, {"p": np.arange(first, first + n_tokens)})


def _windows(n: int, t: int, n_head: int, d_head: int, lengths: list[int]) -> Case:
    def build(g: Graph) -> Value:
        q, k, v = (g.input(name, (n, t, n_head, d_head)) for name in "qkv")
        return g.window_attention(q, k, v, g.input("n", (n,), "i32"))

    return Case(f"window_attention-{n}x{t}x{n_head}x{d_head}", build, {"n": lengths})


def _attention(n_tokens: int, n_head: int, n_kv_head: int, d_head: int, first: int, n_pad: int = 0) -> Case:
    """New rows are stored behind `first` old ones, and attended to. The last `n_pad` tokens are none."""
    n_ctx = first + n_tokens + 3

    def build(g: Graph) -> Value:
        positions = g.input("p", (n_tokens,), "i32")
        caches = [
            g.kv_store(
                g.state(f"{part}.cache", (n_ctx, n_kv_head, d_head)),
                g.input(part, (n_tokens, n_kv_head, d_head)),
                positions,
            )
            for part in "kv"
        ]
        return g.kv_attention(g.input("q", (n_tokens, n_head, d_head)), *caches, positions)

    name = f"kv_attention-{n_tokens}x{n_head}of{n_kv_head}x{d_head}-after-{first}"
    positions = np.arange(first, first + n_tokens)
    positions[n_tokens - n_pad :] = -1
    return Case(f"{name}-padded-{n_pad}" if n_pad else name, build, {"p": positions}, filled=first)


PADDED: list[Case] = [
    _attention(3, 4, 2, 32, 5, 1),
    _attention(20, 4, 2, 32, 0, 13),
    _attention(150, 4, 2, 32, 9, 140),  # whole tiles of it
]

CASES: list[Case] = [
    *(_linear(*shape) for shape in [(1, 32, 1), (1, 256, 300), (3, 64, 48), (7, 96, 33), (9, 512, 257), (33, 32, 5)]),
    *(_linear(*shape, bias=True) for shape in [(1, 32, 40), (5, 1024, 2100)]),  # 2,100 rows are three panels
    *(_gated(*shape) for shape in [(1, 32, 1), (4, 256, 300), (17, 1024, 1100)]),
    *(_linears(*shape) for shape in [(1, 64), (8, 64), (1, 256), (8, 256), (19, 768)]),
    *(case for shape in [(1, 8), (5, 33), (3, 2, 128)] for case in _norms(shape)),
    *(case for shape in [(2, 3), (1, 17), (4, 5, 6)] for case in _elementwise(shape)),
    _conv(1, 1, 4, 8, 8),
    _conv(3, 5, 7, 16, 9),
    _conv(2, 4, 4, 7, 1),
    _conv_stack(1, (3, 5), 6, 7),
    _conv_stack(2, (1, 6, 70, 3), 16, 26),
    *_rows(),
    _norm_rope(1, 1, 8, 0),
    _norm_rope(5, 3, 128, 40_000),
    _rope(1, 1, 8, 0),
    _rope(5, 3, 128, 40_000),
    _windows(3, 7, 2, 16, [7, 1, 4]),
    _windows(1, 50, 4, 64, [50]),
    _attention(1, 1, 1, 32, 0),
    _attention(1, 8, 2, 32, 40),
    _attention(6, 4, 4, 64, 0),
    _attention(9, 16, 2, 32, 23),
    _attention(1, 32, 8, 128, 300),
    _attention(1, 5, 1, 40, 7),
    _attention(3, 6, 2, 16, 70),
    *PADDED,
]


# Shapes of the published models, for the benchmarks; tests have no time for them.

N_TOKENS = (1, 2, 8, 64, 200, 512)
VOCABULARY = 151_936
D_HEAD, N_HEAD, N_KV_HEAD = 128, 32, 8


def _named(part: str, case: Case) -> Case:
    return replace(case, name=f"{part} {case.name}")


def _decoder(model: str, d_model: int, d_ff: int) -> list[Case]:
    d_q, d_kv = N_HEAD * D_HEAD, N_KV_HEAD * D_HEAD
    return [
        *(_named(f"{model}.qkv", _linears(n, d_model, (d_q, d_kv, d_kv), ())) for n in N_TOKENS),
        *(_named(f"{model}.o", _linear(n, d_q, d_model)) for n in N_TOKENS),
        *(_named(f"{model}.gate_up", _gated(n, d_model, d_ff)) for n in N_TOKENS),
        *(_named(f"{model}.down", _linear(n, d_ff, d_model)) for n in N_TOKENS),
        _named(f"{model}.head", _linear(1, d_model, VOCABULARY)),
        *(_named(f"{model}.norm", case) for n in (1, 200) for case in _norms((n, d_model)) if "layer" not in case.name),
    ]


def _encoder() -> list[Case]:
    """Four windows of 50 tokens; the convolutions of one window."""
    n, d, d_ff, n_channels = 200, 1280, 5120, 480
    return [
        _named("enc.qkv", _linears(n, d, (d, d, d), (0, 2))),
        _named("enc.o", _linear(n, d, d, bias=True)),
        _named("enc.fc1", _linear(n, d, d_ff, bias=True)),
        _named("enc.fc2", _linear(n, d_ff, d, bias=True)),
        _named("enc.stem_proj", _linear(n, n_channels * 16, d, bias=True)),
        _named("enc.adapter", _gated(n, d, 8192)),
        _named("enc.adapter_down", _linear(n, 8192, 2560)),
        *(_named("enc.norm", case) for case in _norms((4, 50, d)) if case.name.startswith("layer")),
        *(_named("enc", case) for case in _elementwise((4, 50, d)) if case.name.startswith("add")),
        *(_named("enc", case) for case in _elementwise((4, 50, d_ff)) if case.name.startswith("gelu")),
        *(_named("enc.stem", case) for case in _elementwise((1, n_channels, 64, 200)) if case.name.startswith("gelu")),
        _named("enc", _windows(4, 50, 20, 64, [50] * 4)),
        *(
            _named("enc.stem", _conv(1, c_in, n_channels, h, w))
            for c_in, h, w in [(1, 128, 400), (n_channels, 64, 200), (n_channels, 32, 100)]
        ),
    ]


MODEL_CASES: list[Case] = [
    *_decoder("4b", 2560, 9728),
    *_decoder("8b", 4096, 12288),
    *(_named("llm", _norm_rope(n, n_head, D_HEAD, 200)) for n in (1, 200) for n_head in (N_HEAD, N_KV_HEAD)),
    *(_named("llm", _attention(1, N_HEAD, N_KV_HEAD, D_HEAD, first)) for first in (200, 2048, 8192)),
    _named("llm", _attention(256, N_HEAD, N_KV_HEAD, D_HEAD, 0)),
    *_encoder(),
]
