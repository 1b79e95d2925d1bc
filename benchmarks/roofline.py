"""The least time that the work of a model takes on a card: bytes over bandwidth, or multiplications over their rate.

    python benchmarks/roofline.py --save --readme benchmarks/results/README.md
    python benchmarks/roofline.py --shapes 4b --recipes q4_k --launches

Takes the engine's own graphs of the published shapes with the rewrites of the CUDA backend, and the sizes of the
files that a recipe makes; needs no weights and no GPU. A launch cannot take less than its weights and its part of the
cache take to be read once, nor than its multiplications take; floors are sums over launches. Activations are counted
apart: they may stay in a card's cache. Beside the floors stands what `end_to_end.py` measured on the same card, where
it did. Prints the table; the last line is one JSON document.

Bandwidth and dense tensor rates (FP16 or BF16 with FP32 sums) are NVIDIA's: A100 80GB SXM 2039 GB/s, 312 TFLOP/s, H100
SXM 3.35 TB/s and H200 SXM 4.8 TB/s, both 989 TFLOP/s, from their data sheets; RTX 4090 1008 GB/s, RTX 4060 Ti 288 GB/s
and RTX 3060 360 GB/s from their specifications. Rates of the RTX cards are 512 FLOP a clock and multiprocessor, which
the whitepapers on the GA102 and Ada architectures come to, times multiprocessors and boost clock: 128 at 2.52 GHz, 34
at 2.535 GHz and 28 at 1.777 GHz.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from op_work import count_flops
from synthetic import RESULTS, SHAPES, save_result

from auricle.engine.backends.cuda import RULES
from auricle.engine.gguf import TensorInfo
from auricle.engine.graph import Graph, Node, Value, cut
from auricle.engine.kv_cache import KV_FORMATS
from auricle.engine.models.moss_audio import (
    MossAudioConfig,
    clip_windows,
    decoder_graph,
    encoder_graph,
    read_moss_audio,
    token_count,
)
from auricle.engine.ops import OPS
from auricle.engine.outputs import write_text
from auricle.engine.runtime import row_stages
from auricle.kernels.formats import Format
from auricle.tools.synth import PlannedFile

RECIPES = ("q4_k", "q4_k_all", "f16")
CONTEXTS = (200, 8192)  # tokens before a decode step
PROMPT = 400  # tokens
CLIP_S = 11
FRAMES_A_SECOND = 100
BEGIN, END = "<!-- roofline -->", "<!-- /roofline -->"
RTX_FLOPS = 512  # a clock and multiprocessor


@dataclass(frozen=True)
class Card:
    """Bytes and multiplications (counted as two operations) a second."""

    name: str
    bytes_per_s: float
    flops_per_s: float


CARDS = (
    Card("RTX 4060 Ti", 288e9, RTX_FLOPS * 34 * 2.535e9),
    Card("RTX 3060", 360e9, RTX_FLOPS * 28 * 1.777e9),
    Card("RTX 4090", 1008e9, RTX_FLOPS * 128 * 2.52e9),
    Card("A100 80GB", 2039e9, 312e12),
    Card("H100", 3350e9, 989e12),
    Card("H200", 4800e9, 989e12),
)


@dataclass(frozen=True)
class Launch:
    """`count` launches of the same work, each of so many bytes of weights, of the cache, and of activations."""

    name: str
    op: str
    types: tuple[str, ...]
    count: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    flops: int

    def seconds(self, card: Card) -> float:
        """The floor of all `count` of them."""
        each = max((self.weight_bytes + self.cache_bytes) / card.bytes_per_s, self.flops / card.flops_per_s)
        return self.count * each


# Work.


def phases(c: MossAudioConfig) -> Iterator[tuple[str, Graph, int]]:
    """What a request is made of: its name, its graph, and the slots of the cache in use after it."""
    for context in CONTEXTS:
        n = context + 1
        yield f"decode at {context}", rewrite(decoder_graph(c, 1, n, head="all", with_audio=False), ["logits"]), n
    graph = decoder_graph(c, PROMPT, PROMPT, head="last", with_audio=True)
    yield f"prefill of {PROMPT}", rewrite(graph, ["logits"]), PROMPT
    windows = clip_windows(c.encoder, CLIP_S * FRAMES_A_SECOND)
    n_rows = sum(map(token_count, windows))
    graph = encoder_graph(c, len(windows), max(windows), n_rows)
    yield f"encoder, {CLIP_S} s", rewrite(graph, row_stages(c)), 0


def rewrite(graph: Graph, capture: Sequence[str]) -> Graph:
    """As the backend runs it."""
    graph = cut(graph, capture)
    for rule in RULES:
        graph = rule(graph, capture)
    return graph


def list_launches(graph: Graph, tensors: Mapping[str, TensorInfo], kv_format: Format, n_slots: int) -> list[Launch]:
    """The launches of a graph, those of the same work together, in the order they first come."""
    counts: dict[Launch, int] = {}
    for node in graph.nodes:
        if not OPS[node.op].view:
            launch = measure_node(node, tensors, kv_format, n_slots)
            counts[launch] = counts.get(launch, 0) + 1
    return [replace(launch, count=n) for launch, n in counts.items()]


def measure_node(node: Node, tensors: Mapping[str, TensorInfo], kv_format: Format, n_slots: int) -> Launch:
    weights = [tensors[v.name] for v in node.operands if v.kind == "weight"]
    read = sum(t.nbytes for t in weights)
    if node.op == "get_rows":  # of a table only the rows that are asked for
        read = math.prod(node.inputs[1].shape) * weights[0].format.row_bytes(weights[0].shape[-1])
    plain = list(expand_node(node))
    caches = {v for part in plain for v in caches_of(part)}
    made = [v for n, v in enumerate(node.outputs) if OPS[node.op].shared(n) is None]
    flowing = [v for v in (*node.operands, *made) if v.kind != "weight" and v not in caches]
    matrices = [t for t in weights if len(t.shape) > 1]
    return Launch(
        name=name_launch([t.name for t in matrices or weights]) or node.op,
        op=node.op,
        types=tuple(dict.fromkeys(t.format.name for t in matrices)),
        count=1,
        weight_bytes=read,
        cache_bytes=sum(count_cache(part, kv_format, n_slots) for part in plain),
        activation_bytes=sum(v.nbytes for v in flowing),
        flops=sum(count_flops(part, n_slots) for part in plain),
    )


def expand_node(node: Node) -> Iterator[Node]:
    """The plain ops that a node stands for."""
    if OPS[node.op].expand is None:
        yield node
        return
    graph = Graph()
    OPS[node.op].expand(graph, *node.inputs, **node.attrs)
    for part in graph.nodes:
        yield from expand_node(part)


def caches_of(node: Node) -> tuple[Value, ...]:
    """Caches among the operands of a plain op."""
    return {"kv_store": node.inputs[:1], "kv_attention": node.inputs[1:3]}.get(node.op, ())


def count_cache(node: Node, kv_format: Format, n_slots: int) -> int:
    """Bytes of the cache that a plain op writes or reads: attention reads a slot once, however many tokens attend."""
    if node.op == "kv_store":
        n_tokens, n_head, d_head = node.inputs[1].shape
        return n_tokens * n_head * kv_format.row_bytes(d_head)
    if node.op == "kv_attention":
        _, n_head, d_head = node.inputs[1].shape
        return 2 * n_slots * n_head * kv_format.row_bytes(d_head)
    return 0


def name_launch(names: Sequence[str]) -> str:
    """Weights of a launch under one name: llm.blk.3.attn.{q,k,v} -> llm.blk.N.attn.q+k+v."""
    plain = [re.sub(r"\.\d+\.", ".N.", name.rpartition(".")[0]) for name in names if name.endswith(".weight")]
    if not plain:
        return ""
    first, *others = plain
    return "+".join([first, *(name.rpartition(".")[2] for name in others)])


# The document.


def measure_shape(shape: str, recipe: str, kv_format: Format) -> list[dict[str, Any]]:
    """All phases of a model file; plain data."""
    file = PlannedFile(SHAPES[shape], recipe)
    rows = []
    for phase, graph, n_slots in phases(read_moss_audio(file)):
        launches = list_launches(graph, file.tensors, kv_format, n_slots)
        keys = ("weight_bytes", "cache_bytes", "activation_bytes", "flops")
        rows.append(
            {
                "shape": shape,
                "recipe": recipe,
                "phase": phase,
                "n_launches": sum(launch.count for launch in launches),
                **{key: sum(launch.count * getattr(launch, key) for launch in launches) for key in keys},
                "floor_ms": {card.name: 1e3 * sum(launch.seconds(card) for launch in launches) for card in CARDS},
                "measured_ms": find_measured(shape, recipe, phase),
                "launches": [asdict(launch) for launch in launches],
            }
        )
    return rows


def find_measured(shape: str, recipe: str, phase: str, folder: Path = RESULTS) -> dict[str, float]:
    """Milliseconds by card of this table, from what `end_to_end.py --device cuda` saved."""
    found = {}
    for path in sorted(folder.glob("end_to_end-*.json")):
        document = json.loads(path.read_text())
        gpu = document["machine"].get("gpu", "")
        card = next((card.name for card in CARDS if re.search(rf"\b{card.name.split()[-1]}\b", gpu)), None)
        for c in document["configurations"] if card else ():
            if (c["shape"], c["recipe"]) == (shape, recipe):
                times = {f"decode at {row['context']}": row["step_s"] for row in c["contexts"]}
                times |= {f"encoder, {row['clip_s']} s": row["encoder_s"] for row in c["clips"]}
                found |= {card: 1e3 * times[phase]} if phase in times else {}
    return found


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    names = [card.name for card in CARDS]
    measured = any(row["measured_ms"] for row in rows)
    header = ["model", "work", "launches", "GB", "TFLOP", *names, *(["measured"] if measured else [])]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        n_bytes = row["weight_bytes"] + row["cache_bytes"]
        cells = [f"{row['shape']} {row['recipe']}", row["phase"], str(row["n_launches"])]
        cells += [f"{n_bytes / 1e9:.2f}", f"{row['flops'] / 1e12:.3f}"]
        cells += [f"{row['floor_ms'][name]:.2f}" for name in names]
        cells += [", ".join(f"{card}: {ms:.2f}" for card, ms in row["measured_ms"].items())] if measured else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_launches(row: dict[str, Any]) -> None:
    print(f"\n### {row['shape']} {row['recipe']}, {row['phase']}\n")
    print("| launch | op | types | times | MB of weights | of cache | of activations | GFLOP |\n" + "| --- " * 8 + "|")
    for each in row["launches"]:
        sizes = [f"{each[f'{part}_bytes'] / 1e6:.3f}" for part in ("weight", "cache", "activation")]
        cells = [each["name"], each["op"], " ".join(each["types"]), str(each["count"]), *sizes]
        print(f"| {' | '.join(cells)} | {each['flops'] / 1e9:.3f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["4b", "8b"])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--kv-type", choices=KV_FORMATS, default="f16")
    parser.add_argument("--launches", action="store_true", help="print the launches of each phase, too")
    parser.add_argument("--readme", type=Path, help="put the table between the marks <!-- roofline --> of this file")
    parser.add_argument("--save", action="store_true", help="keep the document in benchmarks/results/roofline.json")
    a = parser.parse_args(arguments)
    formats = KV_FORMATS[a.kv_type]
    rows = [row for shape in a.shapes for recipe in a.recipes for row in measure_shape(shape, recipe, formats)]
    table = make_table(rows)
    print(f"milliseconds at least, by card\n\n{table}")
    for row in rows if a.launches else ():
        print_launches(row)
    if a.readme:
        before, rest = a.readme.read_text().split(BEGIN)
        write_text(a.readme, f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    document = {"benchmark": "roofline", "kv_type": a.kv_type, "cards": [asdict(card) for card in CARDS], "rows": rows}
    if a.save:
        save_result("roofline.json", document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
