"""Times of the linear maps on a GPU, shape by shape: the table of `kernels.py`, with PyTorch's beside it.

Products are timed as they run in a model: with the norm before them, and the gate, the residual, or the choice of the
largest after them. A case is first compared with PyTorch's float32 product of the decoded weights on the same card; one
that differs is red and gets no time. Weights rotate through four times the card's L2, launches are recorded in a graph
and timed by events. Shares are of what was measured in the same run: a copy inside the card (reading and writing
counted), and PyTorch's product of two large bfloat16 matrices. Peers: `F.linear` in bfloat16, and PyTorch's int4 matmul
in groups of 32; both get several weights of one launch as one matrix, and nothing around it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu import describe_gpu, measure_copy, measure_matmul, require_gpu, time_launches
from synthetic import SHAPES, save_result

from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import BY_NAME, Format
from auricle.kernels.gpu.linear import Best, Norm, best_programs, gated_linear, linear, scratch_bytes
from auricle.kernels.gpu.tiles import TILES
from auricle.kernels.gpu.tune import FEW, Config, pick, slug
from auricle.kernels.gpu.weights import DeviceWeight, device_weight
from auricle.tools import synth
from auricle.tools.synth import RandomWeights

Picker = Callable[[str, str, int, int, int], Config]

TOLERANCE = 2e-3  # of the norm
BYTE_TOLERANCE = 2.5e-2  # where tokens are rounded to bytes, and two such products meet in a gate
EPS = 1e-6
CHECKED_ROWS = 4096  # of the first and of the last rows of a matrix
TIMES_L2 = 4
INT4_GROUP = 32  # weights that share a scale: as many as in Q4_K
INT4_TILES = 8


@dataclass(frozen=True)
class Product:
    """A product: matrices of `rows` rows each that meet the same tokens; `gated`: as silu(first) * second. `norm`: of
    the tokens, as `linear` takes it; `residual` is added; `best`: of few tokens only the largest outputs are wanted."""

    name: str
    rows: tuple[int, ...]
    n_cols: int
    gated: bool = False
    norm: str = "none"
    residual: bool = False
    best: bool = False

    @property
    def n_weights(self) -> int:
        return sum(self.rows) * self.n_cols


def list_products(shape: str) -> list[Product]:
    """Those of a decoder layer, of the head, and of an encoder layer."""
    values = synth.SHAPES[SHAPES[shape]].values
    d, d_ff, vocabulary = (values[f"llm.{key}"] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    q, kv = (values[f"llm.{key}"] * values["llm.head_dim"] for key in ("num_heads", "num_kv_heads"))
    e, e_ff = values["enc.d_model"], values["enc.encoder_ffn_dim"]
    return [
        Product(f"{shape}.qkv", (q, kv, kv), d, norm="rms"),
        Product(f"{shape}.o", (d,), q, residual=True),
        Product(f"{shape}.gate_up", (d_ff, d_ff), d, gated=True, norm="rms"),
        Product(f"{shape}.down", (d,), d_ff, residual=True),
        Product(f"{shape}.head", (vocabulary,), d, norm="rms", best=True),
        Product(f"{shape}.enc.qkv", (e, e, e), e, norm="layer"),
        Product(f"{shape}.enc.fc1", (e_ff,), e, norm="layer"),
        Product(f"{shape}.enc.fc2", (e,), e_ff, residual=True),
    ]


def occurs(product: Product, n_tokens: int) -> bool:
    """The head sees few tokens; the encoder sees many."""
    return n_tokens <= FEW if product.name.endswith(".head") else n_tokens > FEW or ".enc." not in product.name


class Stock:
    """The weights of a product in one type: as they are in a file, and on a device in `n_copies` copies."""

    def __init__(self, product: Product, fmt: Format, device: str, at_least: int = 0) -> None:
        """`at_least`: bytes that the copies together have."""
        self.product, self.format = product, fmt
        random, std = RandomWeights(0), product.n_cols**-0.5
        self.rows = []
        for n in product.rows:
            blocks = random.draw_blocks(fmt, n * product.n_cols // fmt.length, std)
            self.rows.append(np.concatenate([b.reshape(-1) for b in blocks]).reshape(n, -1))
        weights = [device_weight(rows, fmt, device) for rows in self.rows]
        self.n_bytes = sum(4 * w.words.numel() for w in weights)
        self.copies = [weights]
        while len(self.copies) * self.n_bytes < at_least:
            self.copies.append([DeviceWeight(w.words.clone(), fmt, w.n_rows, w.n_cols) for w in weights])


class Job:
    """A product and so many tokens, with its buffers."""

    def __init__(self, stock: Stock, n_tokens: int, device: str) -> None:
        product = stock.product
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.stock, self.n_tokens = stock, n_tokens
        self.x = random(n_tokens, product.n_cols)
        gain, shift = random(product.n_cols), random(product.n_cols)
        bias = shift if product.norm == "layer" else None
        self.norm = None if product.norm == "none" else Norm(product.norm, gain, bias, EPS)
        self.residual = random(n_tokens, product.rows[0]) if product.residual else None
        sizes = product.rows[:1] if product.gated else product.rows
        self.outs = [torch.full((n_tokens, n), float("nan"), device=device) for n in sizes]
        self.scratch = torch.empty(scratch_bytes(n_tokens, product.n_cols), dtype=torch.uint8, device=device)

    @property
    def tolerance(self) -> float:
        rounded = self.n_tokens <= FEW and self.stock.format.length > 1
        return BYTE_TOLERANCE if rounded else TOLERANCE

    def calls(self, pick: Picker) -> list[Callable[[], None]]:
        """The launches on each copy of the weights."""
        best = self._best(pick)
        return [lambda weights=weights: self._launch(weights, best, pick) for weights in self.stock.copies]

    def _best(self, pick: Picker) -> Best | None:
        """Room for the largest outputs of each program, where only they are wanted."""
        if not (self.stock.product.best and self.n_tokens <= FEW):
            return None
        n, device = best_programs(self.stock.copies[0][0], self.n_tokens, pick), self.x.device
        shape = (n, self.n_tokens)
        return Best(
            torch.full(shape, float("nan"), device=device), torch.zeros(shape, dtype=torch.int32, device=device)
        )

    def _launch(self, weights: Sequence[DeviceWeight], best: Best | None, pick: Picker) -> None:
        shared = {"norm": self.norm, "scratch": self.scratch, "pick": pick}
        if self.stock.product.gated:
            gated_linear(self.x, *weights, self.outs[0], **shared)
        elif best is not None:
            linear(self.x, weights, [None], [None], best=best, **shared)
        else:
            linear(self.x, weights, [None] * len(weights), self.outs, residual=self.residual, **shared)

    def error(self, pick: Picker) -> float:
        """How far the result is from PyTorch's, relative, in the rows that are looked at; infinite where one is NaN, or
        the largest is not that of all rows."""
        for out in self.outs:
            out.fill_(float("nan"))
        self._launch(self.stock.copies[0], None, pick)
        products = [self._reference(rows) for rows in self.stock.rows]
        if self.stock.product.gated:
            products = [F.silu(products[0]) * products[1]]
        got = torch.cat([out[:, checked_rows(out.shape[1])] for out in self.outs], 1)
        want = torch.cat(products, 1)
        if self.residual is not None:
            want = want + self.residual[:, checked_rows(self.residual.shape[1])]
        best = self._best(pick)
        if best is not None:
            self._launch(self.stock.copies[0], best, pick)
            if not torch.equal(best.values.max(0).values, self.outs[0].max(1).values):
                return float("inf")
        return float((got - want).norm() / want.norm()) if bool(torch.isfinite(got).all()) else float("inf")

    def _reference(self, rows: np.ndarray) -> torch.Tensor:
        x, n = self.x, self.x.shape[1:]
        if self.norm is not None:
            weight, bias = self.norm.weight, self.norm.bias
            x = F.rms_norm(x, n, weight, EPS) if bias is None else F.layer_norm(x, n, weight, bias, EPS)
        decoded = torch.from_numpy(dequantize(rows[checked_rows(len(rows))], self.stock.format))
        return x @ decoded.to(x.device).T


def checked_rows(n: int) -> np.ndarray:
    """Numbers of the rows that are compared: the first and the last."""
    return np.unique(np.r_[: min(n, CHECKED_ROWS), max(0, n - CHECKED_ROWS) : n])


class Card:
    """The GPU: its name, and what it does at best, measured."""

    def __init__(self, seconds: float) -> None:
        self.facts = describe_gpu()
        self.seconds = seconds
        self.copy_bytes_per_s = measure_copy(seconds)
        self.matmul_flops_per_s = measure_matmul(seconds)
        self.rotation_bytes = TIMES_L2 * self.facts["l2_bytes"]

    def pick(self, kernel: str, format_name: str, n_tokens: int, n_rows: int, n_cols: int) -> Config:
        capability = tuple(self.facts["capability"])
        return pick(kernel, format_name, n_tokens, n_rows, n_cols, self.facts["gpu"], capability)


def measure(job: Job, card: Card, pick: Picker) -> dict[str, Any]:
    """The row of a case: compared, and timed when it is green."""
    product, fmt = job.stock.product, job.stock.format
    kernel = "matvec" if job.n_tokens <= FEW else "matmul_gated" if product.gated else "matmul"
    config = pick(kernel, fmt.name, job.n_tokens, product.rows[0], product.n_cols)
    error = job.error(pick)
    row = {"case": product.name, "type": fmt.name, "tokens": job.n_tokens, "config": asdict(config), "error": error}
    row |= {
        "n_rows": sum(product.rows),
        "n_cols": product.n_cols,
        "green": error <= job.tolerance,
        "tolerance": job.tolerance,
    }
    if not row["green"]:
        return row
    seconds = time_launches(job.calls(pick), card.seconds)
    n_bytes, flops = job.stock.n_bytes, 2 * job.n_tokens * product.n_weights
    return row | {
        "us": 1e6 * seconds,
        "copies": len(job.stock.copies),
        "bytes_per_s": n_bytes / seconds,
        "of_copy": n_bytes / seconds / card.copy_bytes_per_s,
        "flops_per_s": flops / seconds,
        "of_matmul": flops / seconds / card.matmul_flops_per_s,
    }


# Peers.


def time_bf16(product: Product, n_tokens: int, card: Card) -> float:
    """Seconds of `F.linear`."""
    x = torch.randn(n_tokens, product.n_cols, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(sum(product.rows), product.n_cols, dtype=torch.bfloat16, device="cuda")
    n = max(1, -(-card.rotation_bytes // weight.nbytes))
    weights = [weight, *(weight.clone() for _ in range(n - 1))]
    return time_launches([lambda w=w: F.linear(x, w) for w in weights], card.seconds)


def time_int4(product: Product, n_tokens: int, card: Card) -> float:
    """Seconds of PyTorch's int4 matmul."""
    n_rows, n_cols = sum(product.rows), product.n_cols
    x = torch.randn(n_tokens, n_cols, dtype=torch.bfloat16, device="cuda")
    codes = torch.randint(0, 256, (n_rows, n_cols // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, INT4_TILES)
    scales = torch.rand(n_cols // INT4_GROUP, n_rows, 2, dtype=torch.bfloat16, device="cuda")
    n = max(1, -(-card.rotation_bytes // packed.nbytes))
    weights = [(packed.clone(), scales.clone()) for _ in range(n)]
    return time_launches(
        [lambda p=p, s=s: torch._weight_int4pack_mm(x, p, INT4_GROUP, s) for p, s in weights], card.seconds
    )


def time_peers(product: Product, n_tokens: int, card: Card) -> dict[str, Any]:
    """Microseconds by peer, or why there are none."""
    found: dict[str, Any] = {"bf16_us": 1e6 * time_bf16(product, n_tokens, card)}
    try:
        found["int4_us"] = 1e6 * time_int4(product, n_tokens, card)
    except (RuntimeError, AttributeError) as error:  # not every build and card has it
        found["int4_missing"] = str(error).splitlines()[0]
    return found


# The table.

HEAD = ("case", "type", "tokens", "us", "GB/s", "of copy", "TFLOP/s", "of matmul", "bf16 us", "int4 us", "")


def format_row(row: dict[str, Any]) -> str:
    cells: list[Any] = [row["case"], row["type"], row["tokens"]]
    if row["green"]:
        cells += [f"{row['us']:.1f}", f"{row['bytes_per_s'] / 1e9:.0f}", f"{row['of_copy']:.0%}"]
        cells += [f"{row['flops_per_s'] / 1e12:.1f}", f"{row['of_matmul']:.0%}", f"{row['bf16_us']:.1f}"]
        cells += [f"{row['int4_us']:.1f}" if "int4_us" in row else "", ""]
    else:
        cells += [""] * 7 + [f"red: error {row['error']:.1e}, at most {row['tolerance']:.0e}"]
    return f"| {' | '.join(map(str, cells))} |"


def run(a: argparse.Namespace) -> int:
    """Measures and prints; 1 when a case is red. Raises NoGPU."""
    require_gpu()
    card = Card(a.seconds)
    print(f"copy {card.copy_bytes_per_s / 1e9:.0f} GB/s, bf16 matmul {card.matmul_flops_per_s / 1e12:.0f} TFLOP/s\n")
    print(f"| {' | '.join(HEAD)} |\n" + "| --- " * len(HEAD) + "|")
    formats = [BY_NAME[name] for name in a.types or sorted(fmt.name for fmt in TILES)]
    products = [p for shape in a.shapes for p in list_products(shape) if re.search(a.only, p.name)]
    rows: list[dict[str, Any]] = []
    document = {
        "benchmark": "kernels",
        "copy_bytes_per_s": card.copy_bytes_per_s,
        "matmul_flops_per_s": card.matmul_flops_per_s,
        "rows": rows,
        "machine": card.facts,
    }
    for product in products:
        peers = {n: time_peers(product, n, card) for n in a.tokens if occurs(product, n)}
        for fmt in formats:
            stock = Stock(product, fmt, "cuda", card.rotation_bytes)
            for n, times in peers.items():
                rows.append(measure(Job(stock, n, "cuda"), card, card.pick) | times)
                print(format_row(rows[-1]), flush=True)
            if a.save:  # what is known so far: a run takes long and may be cut short
                save_result(f"kernels-{slug(card.facts['gpu'])}.json", document)
    print(json.dumps(document))
    return 0 if all(row["green"] for row in rows) else 1
