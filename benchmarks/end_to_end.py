"""Whole requests on models of full shape: from the start of a process to the last token, by clip length and context.

    python benchmarks/end_to_end.py --work FOLDER --save
    python benchmarks/end_to_end.py --work FOLDER --device cuda --shapes 4b --save

Files of random weights are made in FOLDER and kept. Every line of the tables is measured in a process of its own with
warm page caches, after a run that is not counted; figures are medians. `--quick` takes one model and few sizes;
`--long` takes the encoder up to 60 minutes. Prints tables; `--save` keeps the document and plots in
benchmarks/results/ (plots need matplotlib). With `--device cuda` the same shape in bfloat16 as transformers' parts run
it on that card stands beside each figure (`--no-peer` leaves it out). The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu import describe_gpu
from synthetic import RESULTS, SHAPES, make_model, save_result
from turns import Worker, busy_seconds, wait_for_quiet

from auricle.kernels.gpu.tune import slug
from auricle.tools.machine import describe_machine

HERE = Path(__file__).parent
DISTURBED = 0.05  # of the processors taken by others: such figures mean little
CLIPS = (11, 60, 600)  # seconds
CONTEXTS = (200, 1024, 2048, 4096, 8192)
PEER_STEPS = 64  # tokens of the peer at each context
ENCODER_CLIPS = (60, 600)
ENCODER_CLIPS_LONG = (60, 300, 600, 1800, 3600)


def ask(a: argparse.Namespace, model: Path, job: str, sizes: tuple[int, ...] = (0,)) -> Any:
    """Runs a job in a process of its own, when others leave the processors alone; ends the program when it fails."""
    wait_for_quiet(DISTURBED, a.patience)
    command = [sys.executable, HERE / "jobs.py", job, model, "--backend", a.device, "--threads", a.threads]
    command += ["--rounds", a.rounds, "--sizes", *sizes, "--started", repr(time.time())]
    start, others = time.perf_counter(), busy_seconds() - children_seconds()
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job} {sizes} failed on {model}")
    share = (busy_seconds() - children_seconds() - others) / (time.perf_counter() - start) / (os.cpu_count() or 1)
    answer = done.stdout.splitlines()[-1]
    print(f"{model.name}  {job} {sizes}  others took {share:.0%}  {answer}", file=sys.stderr, flush=True)
    a.worst_disturbance = max(a.worst_disturbance, share)
    return json.loads(answer)


def children_seconds() -> float:
    """Seconds that processors have worked for processes started here that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(a: argparse.Namespace, shape: str, recipe: str) -> dict[str, Any]:
    """All jobs on one file."""
    model = make_model(a.work, shape, recipe)
    a.worst_disturbance = 0.0
    openings = [ask(a, model, "open") for _ in range(a.rounds + 1)][1:]
    clips = [ask(a, model, "clip", (size,)) for size in a.clips]
    contexts = ask(a, model, "contexts", tuple(a.contexts))
    encoder = [ask(a, model, "encoder", (size,)) for size in a.encoder_clips]
    return {
        "shape": shape,
        "recipe": recipe,
        "file_bytes": model.stat().st_size,
        "open": {name: median(opening[name] for opening in openings) for name in openings[0]},
        "clips": clips,
        "contexts": contexts,
        "encoder": encoder,
        **fit_contexts(contexts),
        "encoder_worst_to_first": worst_to_first(encoder),
        "worst_disturbance": a.worst_disturbance,
        **({"peer": measure_peer(a, model)} if a.peer else {}),
    }


def measure_peer(a: argparse.Namespace, model: Path) -> dict[str, Any]:
    """The same clips and contexts in bfloat16 by PyTorch and transformers, on the same device; after a warm-up each."""
    command = [sys.executable, HERE / "peer_torch.py", model, a.threads, "bfloat16", a.device]
    peer = Worker("transformers bfloat16", command, a.work / "peer.log")
    try:
        clips = [{"clip_s": size, **[peer.ask("clip", n_new=1, clip_s=size) for _ in range(2)][1]} for size in a.clips]
        steps = [{"context": n, "step_s": 1 / peer.ask("decode", context=n, n_new=PEER_STEPS)} for n in a.contexts]
        return {"name": peer.name, "clips": clips, "contexts": steps, "peak_bytes": peer.ask("peak")}
    finally:
        peer.close()


def compare_peer(c: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as the peer, by figure, and the share of its memory."""
    theirs, ratios = c["peer"], {}
    for ours, other in zip(c["clips"], theirs["clips"], strict=True):
        for key in ("encoder_s", "first_token_s"):
            ratios[f"{key} of {ours['clip_s']} s"] = other[key] / ours[key]
    for ours, other in zip(c["contexts"], theirs["contexts"], strict=True):
        ratios[f"decode at {ours['context']}"] = other["step_s"] / ours["step_s"]
    peak = max(r.get("peak_gpu_bytes", r["peak_rss_bytes"]) for r in c["clips"])
    return ratios | {"share of its memory": peak / theirs["peak_bytes"]}


def fit_contexts(rows: list[dict[str, float]]) -> dict[str, float]:
    """Least squares of a step's time over the bytes of the cache: its slope as a reading speed."""
    if len(rows) < 2:
        return {}
    n_bytes, seconds = (np.array([row[key] for row in rows]) for key in ("kv_bytes", "step_s"))
    slope, base = np.polyfit(n_bytes, seconds, 1)
    worst = np.abs(base + slope * n_bytes - seconds).max() / seconds.max()
    return {"kv_read_bytes_per_s": 1 / slope, "step_at_0_s": base, "worst_misfit": worst}


def worst_to_first(rows: list[dict[str, float]]) -> float:
    """The largest encoder time for a second of sound over that of the shortest clip: 1 where time is linear."""
    rates = [row["encoder_s"] / row["clip_s"] for row in rows]
    return max(rates) / rates[0]


def print_tables(configurations: list[dict[str, Any]]) -> None:
    for c in configurations:
        opened = c["open"]
        print(f"\n### {c['shape']} {c['recipe']}, {c['file_bytes'] / 1e9:.2f} GB\n")
        print(
            f"process to imports {opened['process_to_imports_s']:.2f} s, open {opened['load_s']:.2f} s, open to first "
            f"op {opened['first_op_s']:.2f} s, process to first op {opened['process_to_first_op_s']:.2f} s\n"
        )
        print("| clip | encoder | first token | prefill tok/s | decode tok/s | real-time factor | peak |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for r in c["clips"]:
            print(
                f"| {r['clip_s']} s | {r['encoder_s']:.2f} s | {r['first_token_s']:.2f} s | "
                f"{r['prefill_tokens_per_s']:.1f} | {r['decode_tokens_per_s']:.2f} | "
                f"{r['real_time_factor']:.3f} ({r['new_tokens']} tokens) | {format_peaks(r)} |"
            )
        steps = ", ".join(f"{1 / r['step_s']:.2f} at {r['context']}" for r in c["contexts"])
        print(f"\ndecode, tokens/s by context: {steps}")
        encoder = ", ".join(f"{r['encoder_s'] / r['clip_s'] * 1e3:.1f} at {r['clip_s']} s" for r in c["encoder"])
        print(f"encoder, ms a second of sound: {encoder}")
        for figure, ratio in compare_peer(c).items() if "peer" in c else ():
            print(f"beside {c['peer']['name']}, {figure}: {ratio:.2f}")
        if c["worst_disturbance"] > DISTURBED:
            print(f"disturbed: others took up to {c['worst_disturbance']:.0%} of the processors")


def format_peaks(row: dict[str, Any]) -> str:
    """Of the process, and of the card where there is one."""
    gpu = f" and {row['peak_gpu_bytes'] / 1e9:.2f} GB on the card" if "peak_gpu_bytes" in row else ""
    return f"{row['peak_rss_bytes'] / 1e9:.2f} GB{gpu}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where model files are kept")
    parser.add_argument("--device", default="cpu", help="the backend")
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch's model out on a GPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["4b", "8b"])
    parser.add_argument("--recipes", nargs="+", default=["q4_k_all", "q4_k"])
    parser.add_argument("--clips", type=int, nargs="+", default=CLIPS, help="seconds")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for others before each job")
    parser.add_argument("--quick", action="store_true", help="the first shape and recipe, short clips and contexts")
    parser.add_argument("--long", action="store_true", help="the encoder up to 60 minutes")
    parser.add_argument("--save", action="store_true", help="keep document and plots in benchmarks/results/")
    a = parser.parse_args(arguments)
    a.peer = a.device == "cuda" and not a.no_peer
    a.encoder_clips = ENCODER_CLIPS_LONG if a.long else ENCODER_CLIPS
    if a.quick:
        a.shapes, a.recipes, a.rounds = a.shapes[:1], a.recipes[:1], 1
        a.clips, a.contexts, a.encoder_clips = (11, 60), (200, 2048), (11, 60)
    return a


def main(arguments: Sequence[str] | None = None) -> None:
    a = parse_arguments(arguments)
    configurations: list[dict[str, Any]] = []
    document = {"device": a.device, "threads": a.threads, "configurations": configurations}
    document["machine"] = describe_gpu() if a.device == "cuda" else describe_machine()
    for shape, recipe in product(a.shapes, a.recipes):
        configurations.append(measure(a, shape, recipe))
        print_tables(configurations[-1:])
        if a.save:
            save(document)
    print(json.dumps(document))


def save(document: dict[str, Any]) -> None:
    """What is known so far: a run takes long and may be cut short."""
    if document["device"] == "cuda":
        save_result(f"end_to_end-{slug(document['machine']['gpu'])}.json", document)
        return
    from plots import plot_clips, plot_contexts

    save_result("end_to_end.json", document)
    plot_clips(document["configurations"], RESULTS / "end_to_end_clips.png")
    plot_contexts(document["configurations"], RESULTS / "end_to_end_contexts.png")


if __name__ == "__main__":
    main()
