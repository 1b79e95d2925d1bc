"""What some minutes of LoRA do for a voice the model never heard, as a user would go about it: commands only.

    python benchmarks/voice.py FSDD_FOLDER --minutes 4

The model in the box becomes a checkpoint folder; an adapter is trained on recordings of the speaker that was kept out
of its training, turned into a GGUF file, loaded beside the model and merged into it, all in float32; each is asked to
transcribe recordings of that speaker that are in neither. The answers with the adapter loaded and with it merged must
be the same, text for text. Writes voice.json into --out; needs the extras finetune and evaluate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from auricle.engine.outputs import write_text
from auricle.tools.demo import MODEL
from auricle.tools.finetune.digits.recordings import UNHEARD_SPEAKER
from auricle.tools.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
AURICLE, PYTHON = (sys.executable, "-m", "auricle.tools"), (sys.executable, "-m")


def run(*command: object) -> str:
    """Its output. A command that fails ends this one, and has said why."""
    print("+", *command[len(PYTHON) :], flush=True)
    done = subprocess.run(list(map(str, command)), check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def train(folder: Path, a: argparse.Namespace) -> None:
    """talks/, checkpoint/, adapter/ and voice.gguf."""
    run(*PYTHON, "auricle.tools.finetune.digits.talks", a.fsdd, folder / "talks", "--speaker", a.speaker)
    run(*PYTHON, "auricle.tools.demo.checkpoint", folder / "checkpoint", "--model", a.model)
    options = {
        "--model-dir": folder / "checkpoint",
        "--data-path": folder / "talks/train.jsonl",
        "--output-dir": folder / "adapter",
        "--learning-rate": a.learning_rate,
        "--per-device-train-batch-size": 8,
        "--num-train-epochs": 1000,
        "--max-minutes": a.minutes,
        "--logging-steps": 50,
    }
    everywhere = ("--use-lora", "--lora-on-audio-encoder", "--lora-on-adapters")
    run(*AURICLE, "finetune", *everywhere, *(part for pair in options.items() for part in pair))
    run(*AURICLE, "convert", "--lora", folder / "adapter", "-o", folder / "voice.gguf")


def answer(folder: Path) -> dict[str, dict[str, Any]]:
    """What `auricle evaluate` prints without the adapter, with it loaded, and with it merged."""
    plain, merged, lora = folder / "plain.gguf", folder / "merged.gguf", ("--lora", folder / "voice.gguf")
    run(*AURICLE, "convert", folder / "checkpoint", "-o", plain, "--type", "f32")
    run(*AURICLE, "quantize", plain, merged, "--type", "f32", *lora)
    asked = {"without": (plain,), "loaded": (plain, *lora), "merged": (merged,)}
    return {
        name: json.loads(run(*AURICLE, "evaluate", folder / "talks/test.jsonl", "--json", "-m", *model))
        for name, model in asked.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("fsdd", type=Path, help="folder of the recordings")
    parser.add_argument("--model", type=Path, default=MODEL, help="of the shape of the one in the box (the default)")
    parser.add_argument("--speaker", default=UNHEARD_SPEAKER)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training (default 4)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        train(Path(name), a)
        answers = answer(Path(name))
        adapter_bytes = (Path(name) / "voice.gguf").stat().st_size
    texts = {name: [row["hypothesis"] for row in document["rows"]] for name, document in answers.items()}
    same = sum(x == y for x, y in zip(texts["loaded"], texts["merged"], strict=True))
    facts = {
        "speaker": a.speaker,
        "minutes": a.minutes,
        "learning_rate": a.learning_rate,
        "machine": describe_machine(),
    }
    facts |= {"seconds": round(time.perf_counter() - start), "adapter_bytes": adapter_bytes}
    facts |= {"scores": {name: document["scores"] for name, document in answers.items()}}
    facts |= {"same_text": same, "answers": len(texts["loaded"])}
    a.out.mkdir(parents=True, exist_ok=True)
    write_text(a.out / "voice.json", json.dumps(facts) + "\n")
    for name, document in answers.items():
        print(f"{name}: {100 * document['scores']['wer']:.2f} % of digits wrong, {len(texts[name])} sequences")
    print(f"loaded and merged give the same text for {same} of {len(texts['loaded'])}")
    sys.exit(same != len(texts["loaded"]))


if __name__ == "__main__":
    main()
