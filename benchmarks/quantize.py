"""Encoders measured: error and speed of each type, beside llama.cpp's encoder if its library is at hand.

    python benchmarks/quantize.py --peer path/to/libggml-base.so --checkpoint DIR --threads 2

The tensors are Gaussian, heavy-tailed (Student's t, 3 degrees of freedom) and Gaussian with one weight in 500 twenty
times too large; with --checkpoint also its bf16 matrices. Errors are relative, |W - W'| / |W|, plain and weighted by a
log-normal column importance given to both encoders. Both start from float32 and share the rows out over the same number
of threads; their runs alternate, and the best of each counts. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import BY_NAME, Format
from auricle.kernels.quantize import quantize

TYPES = "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
N_COLS = 2048
Encoder = Callable[[np.ndarray, Format, np.ndarray | None, int], np.ndarray]


def main() -> None:
    args = parse_arguments()
    encoders: dict[str, Encoder] = {"ours": quantize}
    if args.peer:
        encoders["peer"] = load_peer(args.peer)
    sets = synthetic_tensors(args.seed)
    if args.checkpoint:
        sets["checkpoint"] = checkpoint_matrices(args.checkpoint)
    speed_tensor = np.random.RandomState(args.seed).standard_normal((args.millions * 10**6 // N_COLS, N_COLS))
    speed_tensor = speed_tensor.astype(np.float32) * np.float32(0.02)
    results = []
    for name in args.types.split(","):
        result = {"type": name, "errors": measure_errors(encoders, BY_NAME[name], sets)}
        for weighted in (False, True):
            speeds = measure_speed(encoders, BY_NAME[name], speed_tensor, weighted, args.threads, args.rounds)
            result["weighted_speed" if weighted else "speed"] = speeds
        results.append(result)
        print_result(result)
    print(json.dumps({"benchmark": "quantize", "threads": args.threads, "unit": "million weights/s", "types": results}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="llama.cpp's libggml-base.so; without it, only our own columns")
    parser.add_argument("--checkpoint", type=Path, help="folder of safetensors shards whose matrices to encode too")
    parser.add_argument("--types", default=TYPES.replace(" ", ","), help="comma-separated")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--millions", type=int, default=8, help="weights encoded in a speed run, in millions")
    parser.add_argument("--rounds", type=int, default=3, help="speed runs of each encoder")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_peer(path: Path) -> Encoder:
    """llama.cpp's `ggml_quantize_chunk`, shared out over threads by rows as its own quantize program does."""
    function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(x: np.ndarray, fmt: Format, importance: np.ndarray | None, threads: int) -> np.ndarray:
        n_rows, n_cols = x.shape
        x = np.ascontiguousarray(x)
        out = np.empty((n_rows, fmt.row_bytes(n_cols)), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        step = max(1, 2**16 // n_cols)

        def chunk(first: int) -> None:
            count = min(step, n_rows - first)
            function(fmt.id, x.ctypes.data, out.ctypes.data, first * n_cols, count, n_cols, weights)

        function(fmt.id, x.ctypes.data, out.ctypes.data, 0, 1, n_cols, weights)  # builds its tables, not thread-safe
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(chunk, range(0, n_rows, step)))
        return out

    return encode


def synthetic_tensors(seed: int) -> dict[str, list[np.ndarray]]:
    rng = np.random.RandomState(seed)
    shape = (256, N_COLS)
    gaussian = rng.standard_normal(shape)
    kinds = {
        "gaussian": gaussian,
        "student": rng.standard_t(3, shape),
        "outliers": gaussian * np.where(rng.random_sample(shape) < 0.002, 20, 1),
    }
    return {kind: [(x * 0.02).astype(np.float32)] for kind, x in kinds.items()}


def checkpoint_matrices(folder: Path) -> list[np.ndarray]:
    from safetensors import safe_open

    matrices = []
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                if tensor.ndim == 2 and tensor.shape[1] % 256 == 0:
                    matrices.append(tensor.float().numpy())
    return matrices


def column_importance(n_cols: int) -> np.ndarray:
    return np.exp(1.5 * np.random.RandomState(7).standard_normal(n_cols)).astype(np.float32)


def relative_error(x: np.ndarray, decoded: np.ndarray, weights: np.ndarray) -> float:
    misses = ((decoded - x).astype(np.float64) ** 2 * weights).sum()
    return float(np.sqrt(misses / (x.astype(np.float64) ** 2 * weights).sum()))


def measure_errors(encoders: dict[str, Encoder], fmt: Format, sets: dict[str, list[np.ndarray]]) -> dict:
    """Mean relative error over the tensors of a set, plain and weighted, by encoder; and how many ours loses."""
    errors = {}
    for kind, tensors in sets.items():
        for weighted in (False, True):
            table = []  # [n_tensors, n_encoders]
            for x in tensors:
                importance = column_importance(x.shape[1]) if weighted else None
                weights = np.ones(x.shape[1]) if importance is None else importance
                coded = (encode(x, fmt, importance, 1) for encode in encoders.values())
                table.append([relative_error(x, dequantize(data, fmt), weights) for data in coded])
            means = dict(zip(encoders, np.mean(table, axis=0).tolist(), strict=True))
            if "peer" in encoders:
                means["ratio"] = means["ours"] / means["peer"]
                means["lost"] = sum(ours > peer for ours, peer in table)
            errors[kind + (" weighted" if weighted else "")] = means
    return errors


def measure_speed(
    encoders: dict[str, Encoder], fmt: Format, x: np.ndarray, weighted: bool, threads: int, rounds: int
) -> dict[str, float]:
    """Million weights a second of each encoder: the best of alternating runs."""
    importance = column_importance(x.shape[1]) if weighted else None
    best = dict.fromkeys(encoders, float("inf"))
    for encode in encoders.values():
        encode(x[:1], fmt, importance, 1)
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.perf_counter()
            encode(x, fmt, importance, threads)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: x.size / seconds / 1e6 for name, seconds in best.items()}


def print_result(result: dict) -> None:
    for kind, means in result["errors"].items():
        line = f"{result['type']:7} {kind:20} error {means['ours']:.6f}"
        if "peer" in means:
            line += f"  peer {means['peer']:.6f}  ratio {means['ratio']:.4f}  lost {means['lost']}"
        print(line)
    for label, key in (("plain", "speed"), ("weighted", "weighted_speed")):
        speeds = result[key]
        line = f"{result['type']:7} {label:20} {speeds['ours']:8.1f} M/s"
        if "peer" in speeds:
            line += f"  peer {speeds['peer']:8.1f} M/s  ratio {speeds['ours'] / speeds['peer']:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
