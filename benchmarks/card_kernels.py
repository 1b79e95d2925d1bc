"""Linear maps as the engine runs them: with the norm before, the gate, the residual or the choice of a token.

A product is a graph that the CUDA backend rewrites and binds, so what is timed is what a request launches, preparing
kernels included. It is compared with PyTorch's float32 product of the decoded weights before it is timed. Weights
rotate through more than four times the L2 cache, launches are recorded in a graph and timed by events. Peers: PyTorch's
`F.linear` in bfloat16, and its int4 product in groups of 32, with several weights of a launch as one matrix and nothing
around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from card_device import Gpu

from auricle.engine.backends.backend import Backend
from auricle.engine.executor import Program, draft_graph
from auricle.engine.graph import Graph
from auricle.engine.weights import Weight
from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import BY_NAME, F16, F32
from auricle.kernels.gpu.tune import FEW
from auricle.kernels.gpu.weights import DeviceWeight
from auricle.tools import synth
from auricle.tools.synth import RandomWeights

TYPES = ("Q4_K", "Q6_K", "Q8_0")
TOKENS = (1, 2, 4, 8, 512)
TIMES_L2 = 4.2
MOST_COPIES = 64
CHECKED_ROWS = 1024  # of the first and of the last of a matrix
CHUNK = 8192  # rows that are decoded at a time
HALF_ERROR, BYTE_ERROR = 2e-3, 2.5e-2  # relative norm, of activations in half precision, and in bytes with a gate
EPS = 1e-6
SECONDS = 0.04
INT4_GROUP, INT4_TILES = 32, 8


@dataclass(frozen=True)
class Product:
    """Matrices of `rows` rows each that meet the same tokens; `close`: "none", "gate", "residual" or "argmax"."""

    name: str
    rows: tuple[int, ...]
    n_cols: int
    normed: bool = False
    close: str = "none"

    @property
    def n_weights(self) -> int:
        return sum(self.rows) * self.n_cols

    def graph(self, n_tokens: int) -> Graph:
        g = Graph()
        x = g.input("x", (n_tokens, self.n_cols))
        h = g.rms_norm(x, g.weight("norm", (self.n_cols,)), eps=EPS) if self.normed else x
        weights = tuple(g.weight(f"w{i}", (n, self.n_cols)) for i, n in enumerate(self.rows))
        if self.close == "gate":
            outs = (g.gated_linear(h, *weights),)
        elif len(weights) > 1:
            outs = g.linears(h, weights, (None,) * len(weights))
        else:
            (y,) = (g.linear(h, w) for w in weights)
            y = g.add(g.input("r", y.shape), y) if self.close == "residual" else y
            outs = (g.argmax(y) if self.close == "argmax" else y,)
        for i, out in enumerate(outs):
            g.stage(f"out.{i}", out)
        return g


def list_products(shape: str) -> list[Product]:
    """Of a decoder layer, the head, and an encoder layer; those that read most first."""
    v = synth.SHAPES[shape].values
    d, d_ff, vocabulary = (v[f"llm.{key}"] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    q, kv = (v[f"llm.{key}"] * v["llm.head_dim"] for key in ("num_heads", "num_kv_heads"))
    e, e_ff = v["enc.d_model"], v["enc.encoder_ffn_dim"]
    return [
        Product("head", (vocabulary,), d, normed=True, close="argmax"),
        Product("gate_up", (d_ff, d_ff), d, normed=True, close="gate"),
        Product("down", (d,), d_ff, close="residual"),
        Product("qkv", (q, kv, kv), d, normed=True),
        Product("o", (d,), q, close="residual"),
        Product("enc.fc1", (e_ff,), e, normed=True),
        Product("enc.fc2", (e,), e_ff, close="residual"),
        Product("enc.qkv", (e, e, e), e, normed=True),
    ]


def token_counts(product: Product, counts: Sequence[int] = TOKENS) -> list[int]:
    """The head sees few tokens, the encoder many."""
    few = [n for n in counts if n <= FEW]
    many = [n for n in counts if n > FEW]
    return few if product.name == "head" else many if product.name.startswith("enc.") else [*few, *many]


def types_of(product: Product) -> tuple[str, ...]:
    return ("Q4_K", "Q8_0") if product.name.startswith("enc.") else TYPES


class Stock:
    """The weights of a product in one type, and what it should give for up to `n_tokens` tokens."""

    def __init__(self, product: Product, type_name: str, gpu: Gpu, n_tokens: int) -> None:
        self.product, self.format, self.gpu = product, BY_NAME[type_name], gpu
        random, std = RandomWeights(0), product.n_cols**-0.5
        self.weights = {
            "norm": Weight("norm", F32, (product.n_cols,), random.draw_vector(product.n_cols, 1.0).view(np.uint8))
        }
        for i, n in enumerate(product.rows):
            blocks = random.draw_blocks(self.format, n * product.n_cols // self.format.length, std)
            data = np.concatenate([b.reshape(-1) for b in blocks]).reshape(n, -1)
            self.weights[f"w{i}"] = Weight(f"w{i}", self.format, (n, product.n_cols), data)
        self.n_bytes = sum(w.data.nbytes for name, w in self.weights.items() if name != "norm")
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n_tokens, product.n_cols, generator=generator)
        self.r = torch.randn(n_tokens, product.rows[0], generator=generator) if product.close == "residual" else None
        self._found: list[torch.Tensor] | None = None
        self._placed: dict[tuple[int, str], Any] = {}

    def program(self, backend: Backend, n_tokens: int, copy: int = 0) -> Program:
        """Bound to the copy `copy` of the weights, with its operands in place."""

        def place(name: str) -> Any:
            if (copy, name) not in self._placed:
                first = self._placed.get((0, name))
                if isinstance(first, DeviceWeight):
                    self._placed[copy, name] = replace(first, words=first.words.clone())
                else:
                    self._placed[copy, name] = backend.device.place(self.weights[name])
            return self._placed[copy, name]

        graph = self.product.graph(n_tokens)
        draft = draft_graph(graph, backend, list(graph.stages))
        ops = [node.op for node in draft.graph.nodes]
        assert set(ops) <= {"wide_linear", "argmax"}, f"{self.product.name} is not one product: {ops}"
        program = Program(draft, place, {}, poison=True)
        feed = {"x": self.x[:n_tokens].numpy()} | ({} if self.r is None else {"r": self.r[:n_tokens].numpy()})
        program.run(feed)
        return program

    def error(self, program: Program, n_tokens: int) -> float:
        """How far its results are, relative; infinite where one is not finite."""
        outs = [out.float() for out in program.outputs.values()]
        if self.product.close == "argmax":
            logits = self._products()[0][:n_tokens]
            ids = outs[0].reshape(-1).long().to(logits.device)
            if not bool(((ids >= 0) & (ids < logits.shape[1])).all()):
                return float("inf")
            short = logits.max(1).values - logits.gather(1, ids[:, None])[:, 0]
            return float((short / logits.std(1)).max())
        wanted = self._wanted(n_tokens)
        got = [out[:, self._checked(n)] for out, n in zip(outs, [out.shape[1] for out in outs], strict=True)]
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))
        return error if error == error else float("inf")

    def _wanted(self, n_tokens: int) -> list[torch.Tensor]:
        parts = [y[:n_tokens] for y in self._products()]
        if self.product.close == "gate":
            return [F.silu(parts[0]) * parts[1]]
        if self.r is not None:
            return [parts[0] + self.r[:n_tokens].to(parts[0].device)[:, self._checked(self.product.rows[0])]]
        return parts

    def _products(self) -> list[torch.Tensor]:
        """x after the norm times the rows that are looked at, of each matrix, for all tokens."""
        if self._found is not None:
            return self._found
        x = self.x.to(self.gpu.device)
        if self.product.normed:
            gain = self.weights["norm"].decode().to(x)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain
        self._found = []
        for i, n in enumerate(self.product.rows):
            rows = self.weights[f"w{i}"].data[self._checked(n).numpy()]
            parts = [dequantize(rows[s : s + CHUNK], self.format) for s in range(0, len(rows), CHUNK)]
            self._found.append(torch.cat([x @ torch.from_numpy(part).to(x).T for part in parts], 1))
        return self._found

    def _checked(self, n: int) -> torch.Tensor:
        """Numbers of the rows that are compared: the first and the last, or all."""
        if self.product.close == "argmax" or n <= 2 * CHECKED_ROWS:
            return torch.arange(n)
        return torch.cat([torch.arange(CHECKED_ROWS), torch.arange(n - CHECKED_ROWS, n)])

    def n_copies(self) -> int:
        return min(MOST_COPIES, max(1, -(-int(TIMES_L2 * self.gpu.l2_bytes()) // self.n_bytes)))


def error_limit(backend: Backend, type_name: str, n_tokens: int) -> float:
    rounded = type_name in backend.rounds and n_tokens <= FEW
    return BYTE_ERROR if rounded else HALF_ERROR


def shape_of(gpu: Gpu) -> str:
    return "tiny" if gpu.rehearsal else "moss-audio-4b"


def few_of(gpu: Gpu) -> tuple[int, ...]:
    """Token counts; in a rehearsal less."""
    return (1, 9) if gpu.rehearsal else TOKENS


def check_steps(gpu: Gpu) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Each product, type and token count once, compared: this also compiles what is timed later."""
    products = list_products(shape_of(gpu))
    for product in products[1:3] if gpu.rehearsal else products:
        for type_name in types_of(product)[:1] if gpu.rehearsal else types_of(product):
            for n in token_counts(product, few_of(gpu)):
                yield (
                    f"product {product.name} {type_name} n{n}",
                    lambda p=product, t=type_name, n=n: check_product(gpu, p, t, n),
                )


def check_product(gpu: Gpu, product: Product, type_name: str, n_tokens: int) -> dict[str, Any]:
    backend, stock = gpu.backend(), Stock(product, type_name, gpu, n_tokens)
    error = stock.error(stock.program(backend, n_tokens), n_tokens)
    limit = error_limit(backend, type_name, n_tokens)
    return {"ok": error <= limit, "error": error, "limit": limit}


def time_steps(gpu: Gpu) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Times, the most telling first."""
    products = list_products(shape_of(gpu))
    own = products[1:2] if gpu.rehearsal else products
    decoder = [p for p in own if not p.name.startswith("enc.")]
    order = [(p, "Q4_K") for p in decoder] + [(p, None) for p in decoder]
    order += [(p, t) for t in TYPES[1:] for p in decoder] if not gpu.rehearsal else []
    order += [(p, t) for p in own if p not in decoder for t in types_of(p)]
    for product, type_name in order:
        if type_name is None:
            yield f"{product.name} peers", lambda p=product: time_peers(gpu, p)
        else:
            yield f"{product.name} {type_name}", lambda p=product, t=type_name: time_product(gpu, p, t)


def time_product(gpu: Gpu, product: Product, type_name: str) -> dict[str, Any]:
    """All token counts of a product in a type."""
    backend, counts = gpu.backend(), token_counts(product, few_of(gpu))
    stock, rows, first_bits = Stock(product, type_name, gpu, max(counts)), [], None
    n_copies = stock.n_copies()
    for n in counts:
        programs = [stock.program(backend, n, copy) for copy in range(n_copies)]
        error, limit = stock.error(programs[0], n), error_limit(backend, type_name, n)
        row = {"case": product.name, "type": type_name, "tokens": n, "error": error, "green": error <= limit}
        bits = [out[0].clone() for out in programs[0].outputs.values()]
        first_bits = first_bits or bits
        if 1 < n <= FEW:
            row["bits_of_one_token"] = all(torch.equal(a, b) for a, b in zip(first_bits, bits, strict=True))
        if row["green"]:
            seconds = gpu.time_launches([program.call for program in programs], SECONDS)
            row |= {"us": 1e6 * seconds, "copies": n_copies, "bytes_per_s": stock.n_bytes / seconds}
            row |= {"weight_bytes": stock.n_bytes, "flops_per_s": 2 * n * product.n_weights / seconds}
        rows.append(row)
        del programs
    return {"ok": all(row["green"] for row in rows), "rows": rows}


def time_peers(gpu: Gpu, product: Product) -> dict[str, Any]:
    """PyTorch's products of the same size."""
    rows = []
    for n in token_counts(product, few_of(gpu)):
        row = {"case": product.name, "tokens": n, "bf16_us": 1e6 * time_bf16(gpu, product, n)}
        if not gpu.rehearsal:
            try:
                row["int4_us"] = 1e6 * time_int4(gpu, product, n)
            except (RuntimeError, AttributeError) as error:  # not every build and card has it
                row["int4_missing"] = str(error).splitlines()[0][:200]
        rows.append(row)
    return {"rows": rows}


def time_bf16(gpu: Gpu, product: Product, n_tokens: int) -> float:
    """Seconds of `F.linear`."""
    x = torch.randn(n_tokens, product.n_cols, dtype=torch.bfloat16, device=gpu.device)
    weight = torch.randn(sum(product.rows), product.n_cols, dtype=torch.bfloat16, device=gpu.device)
    n = max(1, -(-int(TIMES_L2 * gpu.l2_bytes()) // weight.nbytes))
    weights = [weight, *(weight.clone() for _ in range(min(n, MOST_COPIES) - 1))]
    return gpu.time_launches([lambda w=w: F.linear(x, w) for w in weights], SECONDS)


def time_int4(gpu: Gpu, product: Product, n_tokens: int) -> float:
    """Seconds of PyTorch's int4 product."""
    n_rows, n_cols = sum(product.rows), product.n_cols
    x = torch.randn(n_tokens, n_cols, dtype=torch.bfloat16, device=gpu.device)
    codes = torch.randint(0, 256, (n_rows, n_cols // 2), dtype=torch.uint8, device=gpu.device)
    packed = torch._convert_weight_to_int4pack(codes, INT4_TILES)
    scales = torch.rand(n_cols // INT4_GROUP, n_rows, 2, dtype=torch.bfloat16, device=gpu.device)
    n = min(MOST_COPIES, max(1, -(-int(TIMES_L2 * gpu.l2_bytes()) // packed.nbytes)))
    weights = [(packed.clone(), scales.clone()) for _ in range(n)]
    calls = [lambda p=p, s=s: torch._weight_int4pack_mm(x, p, INT4_GROUP, s) for p, s in weights]
    return gpu.time_launches(calls, SECONDS)


def fact_steps(gpu: Gpu) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What the machine is, and what its card does at best."""
    yield "environment", lambda: gpu.describe() | {"at": time.strftime("%Y-%m-%d %H:%M:%S")}
    yield "ceilings", lambda: ceilings(gpu)


def ceilings(gpu: Gpu) -> dict[str, Any]:
    return {"copy_bytes_per_s": gpu.copy_bytes_per_s(), "matmul_flops_per_s": gpu.matmul_flops_per_s()}


def count_work() -> dict[str, Any]:
    """Bytes of weights and cache, and operations, of each part of a request by recipe."""
    from roofline import measure_shape

    keys = ("n_launches", "weight_bytes", "cache_bytes", "flops")
    rows = [row for recipe in ("q4_k_all", "q4_k") for row in measure_shape("4b", recipe, F16)]
    return {f"{row['recipe']}, {row['phase']}": {key: row[key] for key in keys} for row in rows}
