"""What each weight type costs: the smallest cosine of a row at chosen stages, and the divergence of the logits.

Converts a checkpoint to every recipe, runs a recording, and compares with stages that the official code computed:

    python benchmarks/stages.py CHECKPOINT STAGES.safetensors AUDIO --readme README.md

Prints the table, puts it between the marks in the README, and gives as its last line one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.engine.outputs import write_text
from auricle.tools.stages import (
    drop_padding,
    mean_divergence,
    read_stages,
    row_cosines,
    trace_stages,
    window_lengths,
)

BEGIN, END = "<!-- stages -->", "<!-- /stages -->"
RECIPES = ("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_k_f16enc", "q4_k_all", "q3_k")


def compare(model_path: Path, audio: Path, want: dict[str, np.ndarray], names: list[str], prompt: str) -> dict:
    """Smallest cosine at each stage, mean KL divergence of the logits in nats, and the share of equal top tokens."""
    with load(model_path, backend="reference", n_ctx=2048) as model:
        heard = model.listen(audio)
        got = trace_stages(model, heard, model.build_prompt(prompt, heard), names)
        lengths = window_lengths(model.config.encoder, [mel.shape[1] for mel in heard.mels])
    cosines = {
        name: float(row_cosines(drop_padding(got[name], lengths), drop_padding(want[name], lengths)).min())
        for name in names
    }
    same = float((got["logits"].argmax(-1) == want["logits"].argmax(-1)).mean())
    return {"cosine": cosines, "kl": mean_divergence(got["logits"], want["logits"]), "top1": same}


def last_of(want: dict[str, np.ndarray], prefix: str) -> str:
    return max((name for name in want if name.startswith(prefix)), key=lambda name: int(name.rpartition(".")[2]))


def make_table(rows: list[dict], names: list[str]) -> str:
    header = ["recipe", "MB", *(f"`{name}`" for name in names), "KL", "top-1"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cosines = [f"{row['cosine'][name]:.6f}" for name in names]
        lines.append([row["recipe"], f"{row['bytes'] / 1e6:.1f}", *cosines, f"{row['kl']:.1e}", f"{row['top1']:.1%}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def put_between_marks(path: Path, table: str) -> None:
    before, rest = path.read_text().split(BEGIN)
    write_text(path, f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("checkpoint", "stages", "audio"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    want, metadata = read_stages(arguments.stages)
    names = [last_of(want, "enc.blk."), "enc.out", "adapter", last_of(want, "deepstack."), "llm.blk.0"]
    names += [last_of(want, "llm.blk."), "logits"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            path = Path(folder) / f"{recipe}.gguf"
            convert(plan_conversion(arguments.checkpoint, recipe), path)
            found = compare(path, arguments.audio, want, names, metadata["text"])
            rows.append({"recipe": recipe, "bytes": path.stat().st_size, **found})
    table = make_table(rows, names)
    print(table)
    if arguments.readme:
        put_between_marks(arguments.readme, table)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
