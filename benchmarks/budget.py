"""Types made to measure beside the fixed recipes: divergence of the logits from the F16 file's at the same size.

    python benchmarks/budget.py CHECKPOINT --report jfk.wav --audio late_loud.wav test_en.mp3

Beside the checkpoint, two random ones with the structure that training leaves: channels of very different size, heavy
tails, layers of unlike weight. Reports are made on one recording and divergence is measured on others, over the prompt
and the answer of the F16 file. Four ways to choose the types: by the damage of each tensor alone ("tensor"), by that of
layers and roles ("layer"), by the error of each tensor's output without regard to what it does ("error"), and the
recipe. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from auricle.convert.budget import Budget, read_report
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.requantize import plan_requantization
from auricle.engine.outputs import replacing, write_text
from auricle.engine.prompts import TASKS
from auricle.kernels.formats import Q3_K, Q8_0
from auricle.tools.diff.network import Network
from auricle.tools.diff.request import make_request, open_model
from auricle.tools.diff.sensitivity import measure
from auricle.tools.sample import SampleShape, write_checkpoint

RECIPES = {"q5_k": Q8_0, "q4_k": Q8_0, "q3_k": Q8_0, "q4_k_all": Q3_K}  # and the least type of the encoder
WAYS = ("tensor", "layer", "error")
N_NEW = 32
ENCODER = {"enc_d_model": 256, "enc_d_out": 256, "enc_d_ff": 512, "d_adapter": 512}
SHAPES = {
    "structured": SampleShape(**ENCODER, n_layer=6, d_ff=768, n_vocab=1024),
    "structured, tied": SampleShape(**ENCODER, d_model=512, n_layer=4, d_ff=1024, n_vocab=1024, tied=True),
}


def add_structure(folder: Path, seed: int) -> None:
    """Gives a random checkpoint what training does: channels of the residual stream that are loud, by way of the norms;
    heavy tails; rows and matrices of different weight."""
    rng = np.random.default_rng(seed)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in sorted(tensors.items()):
            w = tensor.float().numpy()
            if w.ndim == 1 and "norm" in name and name.endswith("weight"):
                w *= np.exp(0.4 * rng.standard_normal(w.shape))
            elif w.ndim == 2:
                tails = np.sqrt(rng.chisquare(6, w.shape) / 6)
                size = 0.4 * rng.standard_normal() if ".layers." in name else 0.0
                w *= np.exp(0.2 * rng.standard_normal((len(w), 1)) + size) / tails
            tensors[name] = torch.from_numpy(w.astype(np.float32)).to(torch.bfloat16)
        with replacing(path) as part:
            save_file(tensors, part.path, metadata={"format": "pt"})


def checkpoints(given: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    yield given.name if given.name != "checkpoint" else "golden", given
    for seed, (name, shape) in enumerate(SHAPES.items()):
        path = write_checkpoint(folder / f"{name}.checkpoint", shape, seed=seed)
        add_structure(path, seed)
        yield name, path


def divergence(path: Path, reference: Path, clips: list[Path]) -> list[float]:
    """Mean divergence in nats over the positions of each clip's prompt and the reference's answer."""
    found = []
    for clip in clips:
        request = make_request([clip], TASKS["transcribe"], N_NEW)
        with open_model(reference, request, backend="reference") as exact:
            network = Network(exact, request)
        with open_model(path, request, backend="reference") as model:
            found.append(network.divergence_of(model))
    return found


def make_report(ways: Path, f16: Path, q4: Path, clip: Path, way: str) -> Path:
    request = make_request([clip], TASKS["transcribe"], N_NEW)
    probe = "layer" if way == "layer" else "tensor"
    with open_model(q4, request, backend="reference") as own, open_model(f16, request, backend="reference") as exact:
        report = measure(own, exact, request, probe=probe)
    if way == "error":
        for tensor in report["tensors"]:
            for entry in tensor["types"].values():
                entry["kl"] = entry["error"] ** 2
    path = ways / f"{way}.json"
    write_text(path, json.dumps(report))
    return path


def compare(name: str, checkpoint: Path, folder: Path, report_clip: Path, clips: list[Path]) -> Iterator[dict]:
    """One row for each recipe."""
    folder.mkdir()
    f16 = folder / "f16.gguf"
    convert(plan_conversion(checkpoint, "f16"), f16)
    fixed = {recipe: folder / f"{recipe}.gguf" for recipe in RECIPES}
    for recipe, path in fixed.items():
        convert(plan_requantization(f16, recipe), path)
    reports = {way: read_report(make_report(folder, f16, fixed["q4_k"], report_clip, way)) for way in WAYS}
    for recipe, floor in RECIPES.items():
        size = fixed[recipe].stat().st_size
        row = {"model": name, "recipe": recipe, "bytes": size, "kl": divergence(fixed[recipe], f16, clips)}
        for way, report in reports.items():
            out = folder / f"{recipe}.{way}.gguf"
            convert(plan_requantization(f16, budget=Budget(size, report, floor)), out)
            kl = divergence(out, f16, clips)
            ratio = float(np.mean(kl) / np.mean(row["kl"]))
            row[way] = {"bytes": out.stat().st_size, "kl": kl, "ratio": ratio}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--report", type=Path, required=True, help="recording the reports are made on")
    parser.add_argument("--audio", type=Path, nargs="+", required=True, help="recordings to measure on")
    a = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'model':18} {'recipe':9} {'bytes':>11} {'KL':>8}  ratio of KL: " + "  ".join(f"{w:>6}" for w in WAYS))
        for i, (name, checkpoint) in enumerate(checkpoints(a.checkpoint, Path(scratch))):
            for row in compare(name, checkpoint, Path(scratch) / str(i), a.report, a.audio):
                ratios = "  ".join(f"{row[way]['ratio']:6.3f}" for way in WAYS)
                print(
                    f"{name:18} {row['recipe']:9} {row['bytes']:11,} {np.mean(row['kl']):8.1e} {'':13} {ratios}",
                    flush=True,
                )
                rows.append(row)
    clips = {"report": a.report.name, "audio": [clip.name for clip in a.audio]}
    print(json.dumps({"benchmark": "budget", **clips, "rows": rows}))


if __name__ == "__main__":
    main()
