"""F16 file to all-Q4_K file, whole commands in turn: `auricle quantize` and llama.cpp's quantiser.

The file has the shapes of some layers of a 4B decoder (`--layers`) with random weights, under llama.cpp's names, since
its quantiser reads only files of models it knows.

    python benchmarks/quantize_file.py --peer-python PYTHON_WITH_LLAMA_CPP_PYTHON

Prints seconds, weights a second and peak memory of each round; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from auricle.engine.gguf import f32, string, u32
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.kernels.formats import F16, F32

N_EMBD, N_FF, N_HEAD, N_KV_HEAD, D_HEAD, N_VOCAB = 2560, 9728, 32, 8, 128, 8192

PEER = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype, params.pure = int(sys.argv[3]), llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S, True
raise SystemExit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def tensor_shapes(n_layer: int) -> dict[str, tuple[int, ...]]:
    """A Qwen3 decoder under llama.cpp's names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (N_VOCAB, N_EMBD)}
    for n in range(n_layer):
        layer = {
            "attn_norm": (N_EMBD,),
            "attn_q": (N_HEAD * D_HEAD, N_EMBD),
            "attn_k": (N_KV_HEAD * D_HEAD, N_EMBD),
            "attn_v": (N_KV_HEAD * D_HEAD, N_EMBD),
            "attn_q_norm": (D_HEAD,),
            "attn_k_norm": (D_HEAD,),
            "attn_output": (N_EMBD, N_HEAD * D_HEAD),
            "ffn_norm": (N_EMBD,),
            "ffn_gate": (N_FF, N_EMBD),
            "ffn_up": (N_FF, N_EMBD),
            "ffn_down": (N_EMBD, N_FF),
        }
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"output_norm.weight": (N_EMBD,), "output.weight": (N_VOCAB, N_EMBD)}


def write_source(path: Path, n_layer: int) -> int:
    """Writes the F16 file; gives its number of weights."""
    metadata = {
        "general.architecture": string("qwen3"),
        "qwen3.block_count": u32(n_layer),
        "qwen3.context_length": u32(4096),
        "qwen3.embedding_length": u32(N_EMBD),
        "qwen3.feed_forward_length": u32(N_FF),
        "qwen3.attention.head_count": u32(N_HEAD),
        "qwen3.attention.head_count_kv": u32(N_KV_HEAD),
        "qwen3.attention.key_length": u32(D_HEAD),
        "qwen3.attention.value_length": u32(D_HEAD),
        "qwen3.attention.layer_norm_rms_epsilon": f32(1e-6),
        "qwen3.rope.freq_base": f32(1e6),
        "qwen3.vocab_size": u32(N_VOCAB),
        "tokenizer.ggml.model": string("none"),
    }
    shapes = tensor_shapes(n_layer)
    formats = {name: F32 if len(shape) == 1 else F16 for name, shape in shapes.items()}
    layout = plan_layout(metadata, [(name, shape, formats[name]) for name, shape in shapes.items()])
    rng = np.random.default_rng(0)
    with GGUFWriter(path, layout) as writer:
        for name, shape in shapes.items():
            values = rng.standard_normal(math.prod(shape), dtype=np.float32) / np.float32(math.sqrt(shape[-1]))
            writer.write(name, values.astype(formats[name].layout).view(np.uint8))
    return sum(math.prod(shape) for shape in shapes.values())


def time_command(command: list[object]) -> tuple[float, int]:
    """Wall seconds of a command, and the largest peak of any child so far in bytes."""
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr[-500:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer-python", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "f16.gguf", Path(folder) / "q4_k.gguf"
        n_weights = write_source(source, a.layers)
        ours = [sys.executable, "-m", "auricle.tools", "quantize", source, out, "--type", "q4_k_all", "--jobs", a.jobs]
        commands = {"auricle": ours}
        if a.peer_python:
            commands["llama.cpp"] = [a.peer_python, "-c", PEER, source, out, a.jobs]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peak = 0
        for _ in range(a.rounds):
            for name, command in commands.items():
                out.unlink(missing_ok=True)
                taken, highest = time_command(command)
                seconds[name].append(taken)
                peak = highest if name == "auricle" and not peak else peak
                rate = n_weights / taken / 1e6
                print(f"{name:10} {taken:7.2f} s  {rate:6.1f} M weights/s  {out.stat().st_size:,} bytes", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["auricle"] / medians["llama.cpp"] if "llama.cpp" in medians else None
    print(f"peak memory of the first round: {peak / 2**20:.0f} MiB; time ratio to llama.cpp: {ratio}")
    print(
        json.dumps({"n_weights": n_weights, "seconds": seconds, "medians": medians, "ratio": ratio, "peak_bytes": peak})
    )


if __name__ == "__main__":
    main()
