"""Whether the engine and PyTorch's model say the same: greedy answers to human recordings, token for token, in float32.

    python benchmarks/agreement.py FSDD_FOLDER

Sequences of test recordings, by speakers heard in training and by the one who was not, are transcribed without and with
times: by the engine from an F32 file with an F32 cache (the default, F16, rounds by more than parts some tokens), and
by the oracle, transformers' layers put together, from a checkpoint folder with these weights, prompt and spectrogram.
Writes agreement.json into --out; needs the extra oracle.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from quality_asks import LIMITS, N_CTX, RATE, SPLITS, quantise, read_examples

from auricle.engine import Model, load
from auricle.engine.outputs import write_text
from auricle.tools.demo import MODEL
from auricle.tools.demo.checkpoint import write_checkpoint
from auricle.tools.finetune.digits import PROMPTS, Example
from auricle.tools.machine import describe_machine
from auricle.tools.oracle.model import Oracle, load_oracle

RESULTS = Path(__file__).parent / "results"
TASKS = ("transcribe", "timestamps")


def compare(model: Model, oracle: Oracle, example: Example) -> tuple[int, float | None]:
    """How many tokens the engine says, and None if the oracle says the same and then ends as the engine does; else the
    margin by which the oracle's logits prefer another token where the answers part."""
    limit = next(LIMITS[task] for task in TASKS if PROMPTS[task] == example.prompt)
    said = model.generate(example.prompt, example.samples, sample_rate=RATE, max_new_tokens=limit)
    heard = model.listen(example.samples, RATE)
    prompt = model.build_prompt(example.prompt, heard)
    kept: dict[str, np.ndarray] = {}

    def keep(name: str, value: Any) -> None:
        if name in ("generated_ids", "decode.logits"):
            kept[name] = value.numpy()

    n = len(said.token_ids)
    oracle.trace(heard.mels, prompt.ids, prompt.audio_rows >= 0, keep, n + 1, all_logits=False)
    ends = model.stop_ids if said.finish_reason == "stop" else set(kept["generated_ids"][n:].tolist())
    allowed = [*({token_id} for token_id in said.token_ids), ends]
    for token_id, ours, logits in zip(kept["generated_ids"].tolist(), allowed, kept["decode.logits"], strict=True):
        if token_id not in ours:
            return n, float(logits[token_id] - max(logits[other] for other in ours))
    return n, None


def compare_all(model: Model, oracle: Oracle, a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, split in SPLITS.items():
        examples = read_examples(a.fsdd, split, a.sequences, a.seed)
        for task in TASKS:
            results = [compare(model, oracle, example.asked(task)) for example in examples]
            row = {"speakers": name, "task": task, "answers": len(results), "tokens": sum(n for n, _ in results)}
            margins = [margin for _, margin in results if margin is not None]
            yield row | {"same": len(results) - len(margins), "margins": margins}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("fsdd", type=Path, help="folder of the recordings")
    parser.add_argument("--model", type=Path, default=MODEL, help="of the shape of the one in the box (the default)")
    parser.add_argument("--sequences", type=int, default=100, help="of each kind of speakers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        oracle = load_oracle(write_checkpoint(Path(folder) / "checkpoint", a.model))
        exact = quantise(a.model, Path(folder) / "f32.gguf", "f32")
        with load(exact, backend="cpu", n_ctx=N_CTX, kv_type="f32") as model:
            for row in compare_all(model, oracle, a):
                rows.append(row)
                margins = f"; margins of the others: {row['margins']}" if row["margins"] else ""
                print(
                    f"{row['speakers']}, {row['task']}: {row['same']} of {row['answers']} answers are the same{margins}"
                )
    a.out.mkdir(parents=True, exist_ok=True)
    facts = {"sequences": a.sequences, "seed": a.seed, "machine": describe_machine(), "rows": rows}
    write_text(a.out / "agreement.json", json.dumps(facts) + "\n")
    sys.exit(any(row["same"] != row["answers"] for row in rows))


if __name__ == "__main__":
    main()
