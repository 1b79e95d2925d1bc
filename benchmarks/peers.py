"""This engine beside llama.cpp and PyTorch, measured in turns on one machine, and the ratios.

    python benchmarks/peers.py --work FOLDER --llama-python PYTHON_WITH_LLAMA_CPP --torch --save

Files of the shape are made in FOLDER (kept for the next time): ours, and for llama.cpp the decoder alone with the same
blocks of weights under its names. Each peer works in a process of its own with the same number of threads, and only one
computes at a time: ours, the peer, ours, the peer … A figure is the median over the rounds after one that warms up.
llama.cpp runs with and without flash attention, and the better of the two counts. Prints a table; the last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from synthetic import SHAPES, make_model, save_result
from turns import Worker, wait_for_quiet

from auricle.engine.gguf import Typed, f32, open_gguf, string, u32
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.models.moss_audio import read_moss_audio
from auricle.tools.machine import describe_machine

HERE = Path(__file__).parent
DISTURBED = 0.05  # of the processors taken by others: then it is measured again
EVERY = 97  # of the logits that are compared, one in so many

# Our name of a tensor in a decoder layer, llama.cpp's name.
LAYER_NAMES = {
    "attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "ffn_norm": "ffn_norm", "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up", "ffn.down": "ffn_down",
}  # fmt: skip
MODEL_NAMES = {"llm.embed": "token_embd", "llm.final_norm": "output_norm", "llm.lm_head": "output"}


def write_decoder(source: Path, out: Path) -> None:
    """The decoder of a model file as a Qwen3 file that llama.cpp reads, block for block; without a vocabulary."""
    with open_gguf(source) as file:
        d = read_moss_audio(file).decoder
        names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in MODEL_NAMES.items()}
        for n in range(d.num_layers):
            names |= {f"llm.blk.{n}.{a}.weight": f"blk.{n}.{b}.weight" for a, b in LAYER_NAMES.items()}
        metadata: dict[str, Typed] = {
            "general.architecture": string("qwen3"),
            "qwen3.block_count": u32(d.num_layers),
            "qwen3.context_length": u32(d.max_position_embeddings),
            "qwen3.embedding_length": u32(d.hidden_size),
            "qwen3.feed_forward_length": u32(d.intermediate_size),
            "qwen3.attention.head_count": u32(d.num_heads),
            "qwen3.attention.head_count_kv": u32(d.num_kv_heads),
            "qwen3.attention.key_length": u32(d.head_dim),
            "qwen3.attention.value_length": u32(d.head_dim),
            "qwen3.attention.layer_norm_rms_epsilon": f32(d.rms_norm_eps),
            "qwen3.rope.freq_base": f32(d.rope_theta),
            "qwen3.vocab_size": u32(d.vocab_size),
            "tokenizer.ggml.model": string("none"),
        }
        tensors = {theirs: file.tensors[ours] for ours, theirs in names.items() if ours in file.tensors}
        layout = plan_layout(metadata, [(name, t.shape, t.format) for name, t in tensors.items()])
        with GGUFWriter(out, layout) as writer:
            for name, t in tensors.items():
                writer.write(name, file.data(t.name))


@dataclass(frozen=True)
class Figure:
    """What is measured: a task of the workers with its arguments, and which number of the answer counts."""

    name: str
    task: str
    arguments: dict[str, Any]
    key: str | None = None
    more_is_better: bool = True

    def ask(self, worker: Worker) -> float:
        answer = worker.ask(self.task, **self.arguments)
        return answer[self.key] if self.key else answer

    def compare(self, medians: dict[str, float]) -> dict[str, Any]:
        """The best of the others, and how many times as fast the first is."""
        (_, ours), *others = medians.items()
        best, theirs = (max if self.more_is_better else min)(others, key=lambda other: other[1])
        ratio = ours / theirs if self.more_is_better else theirs / ours
        return {"ours": ours, "theirs": theirs, "best": best, "ratio": ratio}


def take_turns(figures: list[Figure], sides: list[Worker], a: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians by figure and side; we are the first side."""
    values: dict[str, dict[str, list[float]]] = {f.name: {side.name: [] for side in sides} for f in figures}
    worst = dict.fromkeys(values, 0.0)
    for n in range(a.rounds + 1):
        for side in sides:
            for figure in figures:
                if a.restart:
                    figure.ask(side)
                found, disturbance = ask_undisturbed(figure, side, a.tries if n or a.restart else 1, a.patience)
                print(
                    f"round {n}  {side.name:24} {figure.name:32} {found:9.3f}   others took {disturbance:.0%}",
                    file=sys.stderr,
                )
                if n or a.restart:  # the first round warms up
                    values[figure.name][side.name].append(found)
                    worst[figure.name] = max(worst[figure.name], disturbance)
            if a.restart:
                side.close()
    rows = []
    for f in figures:
        medians = {side: median(found) for side, found in values[f.name].items()}
        facts = {"medians": medians, "rounds": values[f.name], "worst_disturbance": worst[f.name]}
        rows.append({"figure": f.name, **f.compare(medians), **facts})
    return rows


def ask_undisturbed(figure: Figure, side: Worker, n_tries: int, patience: float) -> tuple[float, float]:
    """A figure and how much others took of the processors meanwhile: the least disturbed of a few tries."""
    tries: list[tuple[float, float]] = []
    while len(tries) < n_tries and (not tries or tries[-1][1] > DISTURBED):
        wait_for_quiet(DISTURBED, patience)
        found = figure.ask(side)
        tries.append((found, side.disturbance))
    return min(tries, key=lambda found: found[1])


def result_name(a: argparse.Namespace) -> str:
    """One file for each shape, recipe and peer."""
    peers = [*(["llama"] if a.llama_python else []), *([f"torch_{a.torch_dtype}"] if a.torch else [])]
    return "-".join(["peers", a.shape, a.recipe, *peers]) + ".json"


def decode_figures(a: argparse.Namespace) -> list[Figure]:
    return [Figure(f"decode at {n}, tokens/s", "decode", {"context": n, "n_new": a.steps}) for n in a.contexts]


def against_llama(a: argparse.Namespace, ours: Worker, model: Path) -> dict[str, Any]:
    """Prefill and decoding of the decoder alone."""
    decoder = model.with_suffix(".qwen3.gguf")
    if not decoder.exists():
        write_decoder(model, decoder)
    n_ctx = max(a.prefill, *a.contexts) + 512 + a.steps
    names = {0: "llama.cpp", 1: "llama.cpp, flash"}
    command = [a.llama_python, HERE / "peer_llama.py", decoder, a.threads, n_ctx]
    sides = [Worker(names[flash], [*command, flash], a.work / f"llama{flash}.log") for flash in a.flash]
    try:
        likeness = compare_logits(ours, sides[0])
        print(f"cosine of our logits and llama.cpp's: {likeness:.5f}", file=sys.stderr)
        figures = [Figure(f"prefill of {a.prefill}, tokens/s", "prefill", {"n_tokens": a.prefill}), *decode_figures(a)]
        rows = take_turns(figures, [ours, *sides], a)
        about = sides[0].ask("about")
        peaks = read_peaks(a, ours, *sides)
    finally:
        for side in sides:
            side.close()
    return {"about": about, "logits_cosine": likeness, "figures": rows, "peak_rss_bytes": peaks}


def read_peaks(a: argparse.Namespace, *sides: Worker) -> dict[str, int]:
    """The most memory of each side; nothing when their processes have ended meanwhile."""
    return {} if a.restart else {side.name: side.ask("peak") for side in sides}


def compare_logits(ours: Worker, llama: Worker) -> float:
    """Cosine of the logits after some tokens: both have the same weights, so a low one is a mistake."""
    request = {"ids": list(range(500, 532)), "every": EVERY}
    a, b = (np.array(side.ask("logits", **request)) for side in (ours, llama))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def against_torch(a: argparse.Namespace, ours: Worker, model: Path) -> dict[str, Any]:
    """A whole request, and decoding."""
    command = [sys.executable, HERE / "peer_torch.py", model, a.threads, a.torch_dtype]
    peer = Worker(f"torch {a.torch_dtype}", command, a.work / "torch.log")
    clip = {"n_new": 32}
    figures = [
        Figure("first token of 11 s, s", "clip", {"n_new": 1}, "first_token_s", more_is_better=False),
        Figure("real-time factor with 32 tokens", "clip", clip, "real_time_factor", more_is_better=False),
        *decode_figures(a),
    ]
    try:
        rows = take_turns(figures, [ours, peer], a)
        peaks = read_peaks(a, ours, peer)
    finally:
        peer.close()
    return {"figures": rows, "peak_rss_bytes": peaks}


def make_table(document: dict[str, Any]) -> str:
    lines = ["| | auricle | the best peer | which | times as fast |", "| --- | --- | --- | --- | --- |"]
    for part in document["against"].values():
        for row in part["figures"]:
            mark = " (disturbed)" if row["worst_disturbance"] > DISTURBED else ""
            cells = (
                row["figure"],
                f"{row['ours']:.2f}",
                f"{row['theirs']:.2f}",
                row["best"],
                f"{row['ratio']:.2f}{mark}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    peaks = {name: n for part in document["against"].values() for name, n in part["peak_rss_bytes"].items()}
    return "\n".join([*lines, "", *(f"peak memory of {name}: {n / 1e9:.2f} GB" for name, n in peaks.items())])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where model files are kept")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--torch", action="store_true", help="measure the PyTorch model, too")
    parser.add_argument("--torch-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--recipe", default="q4_k_all")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", type=int, nargs="+", default=[200, 8192])
    parser.add_argument("--prefill", type=int, default=400)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded for a figure")
    parser.add_argument("--tries", type=int, default=3, help="times a figure is measured when others disturb")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for others before each")
    parser.add_argument("--flash", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument("--restart", action="store_true", help="keep only one side in memory at a time")
    parser.add_argument("--save", action="store_true", help="keep the document in benchmarks/results/")
    a = parser.parse_args()
    if not a.llama_python and not a.torch:
        parser.error("name a peer: --llama-python PYTHON or --torch")
    return a


def main() -> None:
    a = parse_arguments()
    model = make_model(a.work, a.shape, a.recipe)
    against = {}
    peers = {"llama.cpp": (a.llama_python, against_llama), "torch": (a.torch, against_torch)}
    for name, (wanted, measure) in peers.items():
        if wanted:
            command = [sys.executable, HERE / "peer_auricle.py", model, a.threads, a.backend]
            ours = Worker("auricle", command, a.work / "auricle.log")  # a new one, so that its peak is its own
            against[name] = measure(a, ours, model)
            ours.close()
    document = {"shape": a.shape, "recipe": a.recipe, "threads": a.threads, "against": against}
    document["machine"] = describe_machine()
    print(make_table(document))
    if a.save:
        save_result(result_name(a), document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
