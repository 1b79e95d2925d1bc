"""Runs the CUDA backend on a stand-in for the card under Triton's interpreter and prints what came out, as JSON.

A process of its own, since Triton decides once whether it interprets: `python cuda_worker.py ops|model FOLDER`; with
`--card` it is this machine's GPU, and nothing is interpreted. On the stand-in products are cut into few, large tiles:
an interpreted program takes long, whatever its size.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if "--card" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.engine.backends import find_backend
from auricle.engine.backends.backend import Backend
from auricle.engine.backends.cuda import make_backend
from auricle.engine.executor import compile_graph, draft_graph
from auricle.engine.gguf import open_gguf
from auricle.engine.graph import Graph
from auricle.engine.kv_cache import CacheTensor
from auricle.engine.sampling import Sampler, SamplingOptions
from auricle.engine.session import Model
from auricle.kernels.formats import F16, F32, Q4_K, Q8_0, Format
from auricle.kernels.gpu.tune import Config
from auricle.tools.sample import SampleShape, write_checkpoint
from gpu_device import CARD
from op_cases import CASES, PADDED, Case, make_weight, materials
from stand_in import StandIn

REFERENCE = find_backend("reference")
MOST_NUMBERS = 300_000  # of the matrices of a case that is run here
OTHER_TYPES = ("linear-1x256x300", "gated_linear-4x256x300", "linears-19x768", "get_rows")
HEAD = Case("head", lambda g: g.argmax(g.linear(g.input("x", (1, 256)), g.weight("w", (1100, 256)))))
SMALL = SampleShape(
    enc_d_model=64, enc_n_layer=1, enc_n_head=2, enc_d_ff=64, enc_d_conv=4, enc_d_out=64, taps=(0,), n_inject=1,
    d_adapter=64, d_model=64, n_layer=1, n_head=4, n_kv_head=2, d_head=32, d_ff=96, n_vocab=320,
)  # fmt: skip


def cut(kernel: str, format_name: str, n_tokens: int, n_rows: int, n_cols: int) -> Config:
    def power(n: int) -> int:
        return 1 << (n - 1).bit_length()

    few = kernel == "matvec"
    rows, cols = min(512, power(n_rows)), min(512 if few else 256, power(n_cols))
    return Config(max(16, rows), max(32, cols), n_tokens if few else max(16, min(64, power(n_tokens))), 4, 1)


def backend(precision: str = "auto") -> Backend:
    return find_backend("cuda", precision) if CARD else make_backend(StandIn(), precision, cut)


# Ops.


def place(states: dict[str, CacheTensor], device: Any) -> dict[str, Any]:
    """Caches of the processor, as far as they are filled, on the card."""
    placed = {}
    for name, cache in states.items():
        placed.update(device.caches([name], cache.shape, cache.format))
        rows = cache.read(cache.shape[0]).nan_to_num(0, 0, 0)
        placed[name].write(torch.arange(len(rows), dtype=torch.int32), rows)
    return placed


def run_case(case: Case, chosen: Backend, fmt: Format, kv_format: Format) -> dict[str, np.ndarray]:
    m = materials(case, fmt, kv_format)
    graph = case.graph()
    capture = [name for name in graph.stages if name.startswith("out.")]
    states = place(m.states, chosen.device) if chosen.device.separate else m.states
    program = compile_graph(graph, chosen, m.weights.get, capture=capture, states=states, poison=True)
    return {name: chosen.device.fetch(value).copy() for name, value in program.run(m.feed).items()}


def error_of(case: Case, chosen: Backend, fmt: Format = F32, kv_format: Format = F32) -> float:
    """The largest relative norm of the difference; infinite where something was not written."""
    got, want = (run_case(case, b, fmt, kv_format) for b in (chosen, REFERENCE))
    errors = [np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name]) for name in want]
    return float(np.nan_to_num(max(errors), nan=np.inf))


def op_checks(chosen: Backend) -> dict[str, Callable[[], float]]:
    """The error of each case by its name."""
    small = [c for c in CASES if CARD or sum(v.size for v in c.graph().leaves_of("weight")) <= MOST_NUMBERS]
    checks = {c.name: partial(error_of, c, chosen) for c in small}
    for case in small:
        if case.name in OTHER_TYPES:
            for fmt in (F16, Q8_0, *([Q4_K] if case.fills(256) else [])):
                checks[f"{case.name} {fmt}"] = partial(error_of, case, chosen, fmt)
        if case.name == "kv_attention-1x8of2x32-after-40":
            checks |= {f"{case.name} {fmt}": partial(error_of, case, chosen, F32, fmt) for fmt in (F16, Q8_0)}
    exact = backend("exact")
    checks |= {f"head {fmt}": partial(error_of, HEAD, chosen, fmt) for fmt in (F16, Q4_K)}
    checks["head Q8_0 exact"] = partial(error_of, HEAD, exact, Q8_0)
    return checks | {
        f"{c.name} Q8_0 exact": partial(error_of, c, exact, Q8_0) for c in small if c.name == OTHER_TYPES[1]
    }


def run_ops() -> dict[str, Any]:
    chosen = backend()
    errors = {name: check() for name, check in op_checks(chosen).items()}
    padding = {f"{c.name} {fmt}": keeps_padding_out(c, chosen, fmt) for c in PADDED[:2] for fmt in (F32, F16, Q8_0)}
    return {"errors": errors, "large": run_large(), "padding": padding}


def keeps_padding_out(case: Case, chosen: Backend, kv_format: Format) -> bool:
    """Whether no slot was written for tokens that pad; with norms and positions before it, as in a decoder, too."""
    m = materials(case, F32, kv_format)
    positions, kept = m.feed["p"], []
    n_used = case.filled + int((positions >= 0).sum())
    for graph in (case.graph(), normed_attention(m.feed, next(iter(m.states.values())).shape)):
        states = place(m.states, chosen.device)
        codes = [cache.planes.codes.view(torch.uint8) for cache in states.values()]
        before = [c.clone() for c in codes]
        rng = np.random.default_rng(2)
        weights = {leaf.name: make_weight(leaf.name, leaf.shape, F32, rng) for leaf in graph.leaves_of("weight")}
        program = compile_graph(graph, chosen, weights.get, capture=["out.0"], states=states, poison=True)
        out = program.run(m.feed)["out.0"]
        kept.append(bool(out.isfinite().all() and (out[positions < 0] == 0).all()))
        for old, new in zip(before, codes, strict=True):
            kept += [torch.equal(old[n_used:], new[n_used:]), not torch.equal(old[:n_used], new[:n_used])]
    return all(kept)


def normed_attention(feed: dict[str, np.ndarray], shape: tuple[int, int, int]) -> Graph:
    g = Graph()
    q, k, v = (g.input(part, feed[part].shape) for part in "qkv")
    p = g.input("p", feed["p"].shape, "i32")
    weight = g.weight("n", shape[-1:])
    q, k = (g.rope(g.rms_norm(x, weight, eps=1e-6), p, theta=1e4) for x in (q, k))
    caches = [g.kv_store(g.state(f"{name}.cache", shape), x, p) for name, x in (("k", k), ("v", v))]
    g.stage("out.0", g.kv_attention(q, *caches, p))
    return g


def run_large() -> dict[int, dict[str, float]]:
    """Errors beside a channel of 1e5, for few tokens and for many."""
    return {n: large_channel(backend("exact"), n) for n in (2, 17)}


def large_channel(chosen: Backend, n_tokens: int) -> dict[str, float]:
    """A residual stream with a channel of 1e5 through two halves of a block: the error elsewhere, and in it."""
    g = Graph()
    x = g.input("x", (n_tokens, 64))
    for part in "ab":
        h = g.rms_norm(x, g.weight(f"{part}.norm", (64,)), eps=1e-6)
        inner = g.mul(
            g.silu(g.linear(h, g.weight(f"{part}.g", (96, 64)))), g.linear(h, g.weight(f"{part}.u", (96, 64)))
        )
        x = g.add(x, g.linear(inner, g.weight(f"{part}.d", (64, 96))))
    g.stage("out", x)
    rng = np.random.default_rng(1)
    weights = {v.name: make_weight(v.name, v.shape, Q8_0, rng) for v in g.leaves_of("weight")}
    values = rng.standard_normal((n_tokens, 64), dtype=np.float32)
    values[:, 7] = 1e5
    results = []
    for b in (chosen, REFERENCE):
        program = compile_graph(g, b, weights.get, capture=["out"], poison=True)
        results.append(b.device.fetch(program.run({"x": values})["out"]).copy())
    assert all(n.op == "wide_linear" for n in draft_graph(g, chosen, ["out"]).graph.nodes)
    got, want = results
    rest = np.arange(64) != 7
    small = np.linalg.norm((got - want)[:, rest]) / np.linalg.norm((want - values)[:, rest])
    return {"rest": float(small), "channel": float(np.abs(got[:, 7] / want[:, 7] - 1).max())}


# A model.


def open_model(path: Path, **options: Any) -> Model:
    chosen = options.pop("backend", None) or backend()
    return Model(open_gguf(path), chosen, n_ctx=600, kv_type=options.pop("kv_type", None), poison=True, **options)


def run_model(folder: Path) -> dict[str, Any]:
    path = folder / "small.gguf"
    convert(plan_conversion(write_checkpoint(folder / "checkpoint", SMALL), "q8_0"), path)
    sound = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    with load(path, backend="reference", n_ctx=600) as exact, open_model(path) as model:
        planned = model.plan([0.5], "What?", max_new_tokens=3)
        heard = {"audio": sound, "sample_rate": 16_000, "max_new_tokens": 3}
        answers = [m.generate("What?", **heard).token_ids for m in (model, exact)]
        peak = model.backend.device.card.peak_bytes()
        listened = exact.listen(sound, 16_000)
        prompt = exact.build_prompt("What?", listened)
        logits = []
        for m in (model, exact):
            rows = m.runtime.encode(listened.mels)
            logits.append(m.runtime.trace_decoder(prompt, rows, ["logits"], {})["logits"])
        return {
            "answers": answers,
            "planned": planned.total - planned.libraries,
            "peak": peak,
            "forced": compare_logits(*logits),
            "greedy": compare_steps(model, len(prompt.ids), SamplingOptions(), 20),
            "drawn": compare_steps(model, len(prompt.ids), SamplingOptions(1.3, 40, 0.95, 0.01, 1.2, seed=5), 4),
        }


def compare_logits(got: np.ndarray, want: np.ndarray) -> dict[str, Any]:
    """How far the logits are off, in norm and as the mean divergence in nats, and whether the likeliest is the same
    wherever its margin is over twice that."""
    error = np.abs(got - want).max(-1)
    second, first = np.sort(want, -1)[:, -2:].T
    clear = first - second > 2 * error
    same = got.argmax(-1) == want.argmax(-1)
    relative = np.linalg.norm(got - want) / np.linalg.norm(want)
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (want, got))
    nats = (p.exp() * (p - q)).sum(-1).mean().item()
    wrong = int((clear & ~same).sum())
    return {"relative": float(relative), "nats": nats, "clear": int(clear.sum()), "wrong": wrong}


def compare_steps(model: Model, position: int, options: SamplingOptions, n: int) -> list[list[int]]:
    """Tokens by `Runtime.steps`, and by the plain loop on the same cache."""
    runtime, first = model.runtime, 11
    looked_ahead = list(runtime.steps(first, position, n, Sampler(options)))
    sampler, history = Sampler(options), [first]
    for i in range(n):
        history.append(sampler.sample(runtime.decode(history[-1], position + i), history))
    return [looked_ahead, history[1:]]


if __name__ == "__main__":
    result = run_ops() if sys.argv[1] == "ops" else run_model(Path(sys.argv[2]))
    print(json.dumps(result, default=lambda x: x.item()))
