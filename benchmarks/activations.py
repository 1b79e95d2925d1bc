"""The error that matters: |(W - W') X| of each type on real activations, ours beside llama.cpp's.

    python benchmarks/activations.py F32.gguf AUDIO IMPORTANCE_AUDIO --peer path/to/libggml-base.so

X are the inputs of the decoder's matrices while a recording is answered. Importances come from another recording, and
both encoders get the same. The figure is relative to |W X|; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from quantize import load_peer

from auricle.engine import Model, load
from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import BY_NAME
from auricle.kernels.quantize import quantize
from auricle.tools.stages import trace_stages

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "IQ4_NL")
INPUTS = {  # the value that meets the weights, as the graph's labels name it: weights
    "llm.blk.{n}.attn_norm": ("attn.q", "attn.k", "attn.v"),
    "llm.blk.{n}.ffn_norm": ("ffn.gate", "ffn.up"),
}


def collect_inputs(model: Model, audio: Path) -> dict[str, np.ndarray]:
    """{weight name: X [n_tokens, n_in]} for every decoder layer."""
    heard = model.listen(audio)
    layers = range(model.config.decoder.num_layers)
    names = {label.format(n=n): (n, weights) for label, weights in INPUTS.items() for n in layers}
    values = trace_stages(model, heard, model.build_prompt("Transcribe the audio.", heard), list(names))
    return {f"llm.blk.{n}.{w}.weight": values[label] for label, (n, weights) in names.items() for w in weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "audio", "importance_audio"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    a = parser.parse_args()
    encoders = {"ours": quantize, "peer": load_peer(a.peer)}
    with load(a.model, backend="reference", n_ctx=2048) as model:
        inputs, others = collect_inputs(model, a.audio), collect_inputs(model, a.importance_audio)
        weights = {name: model.file.data(name).view("<f4").reshape(model.file.tensors[name].shape) for name in inputs}
        rows = [measure(type_name, encoders, weights, inputs, others) for type_name in TYPES]
    for row in rows:
        plain, weighted = row["plain"], row["weighted"]
        print(
            f"{row['type']:7} ours / peer, mean over {len(weights)} matrices: plain {np.mean(plain):.3f} "
            f"(worst {max(plain):.3f}), with importance {np.mean(weighted):.3f} (worst {max(weighted):.3f})"
        )
    print(json.dumps({"benchmark": "activations", "rows": rows}))


def measure(type_name: str, encoders: dict, weights: dict, inputs: dict, others: dict) -> dict:
    """Ratios of our error to the peer's, a matrix each, without and with importance."""
    fmt, ratios = BY_NAME[type_name], {"plain": [], "weighted": []}
    for name, w in weights.items():
        x = inputs[name].astype(np.float64)
        for kind, importance in (("plain", None), ("weighted", (others[name] ** 2).mean(0).astype(np.float32))):
            error = {
                who: np.linalg.norm((dequantize(encode(w, fmt, importance, 1), fmt).astype(np.float64) - w) @ x.T)
                for who, encode in encoders.items()
            }
            ratios[kind].append(float(error["ours"] / error["peer"]))
    return {"type": type_name, **ratios}


if __name__ == "__main__":
    main()
