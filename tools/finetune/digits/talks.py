"""Writes spoken digits as conversations: `python -m auricle.tools.finetune.digits.talks RECORDINGS OUT --speaker NAME`.

RECORDINGS is the folder of the Free Spoken Digit Dataset. OUT gets train.jsonl, validation.jsonl and test.jsonl in the
format that `auricle finetune` and `auricle evaluate` read, and their clips as FLAC. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile

from ....engine.mel import SAMPLE_RATE
from ....engine.outputs import replacing, write_text
from ....kernels.display import show
from ....kernels.errors import AuricleError
from ...process import standard_streams
from .compose import Digits
from .tasks import PROMPTS, Example


def write_talks(out: Path, name: str, examples: Iterable[Example]) -> Path:
    """OUT/name.jsonl, a conversation an example, and its clips in OUT/name."""
    (out / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, example in enumerate(examples):
        clip = f"{name}/{number:04}.flac"
        with replacing(out / clip) as part:
            soundfile.write(part.path, example.samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
        turns = (("user", "audio", clip), ("user", "text", example.prompt), ("assistant", "text", example.answer))
        messages = [{"role": role, "message_type": kind, "content": content} for role, kind, content in turns]
        lines.append(json.dumps({"conversation": messages}) + "\n")
    path = out / f"{name}.jsonl"
    write_text(path, "".join(lines))
    return path


def training_examples(digits: Digits, n: int, seed: int) -> Iterable[Example]:
    """Half of them as recorded, the others changed; transcripts, and every third with times."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        task = "timestamps" if number % 3 == 2 else "transcribe"
        yield digits.draw(rng, augment=number % 2 == 1, task=task, n_words=int(rng.integers(1, 8)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="auricle.tools.finetune.digits.talks", description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--speaker", help="of this one alone; by default all but the one kept out")
    parser.add_argument("--sequences", type=int, default=400, help="to train on (default 400)")
    parser.add_argument("--test-sequences", type=int, default=100, help="(default 100)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    try:
        splits = {split: Digits(a.recordings, split, speaker=a.speaker) for split in ("train", "validation", "test")}
        examples = {split: splits[split].fixed(a.test_sequences, a.seed) for split in ("validation", "test")}
        examples["train"] = training_examples(splits["train"], a.sequences, a.seed)
        for split, some in examples.items():
            write_talks(a.out, split, some)
    except AuricleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{show(a.out)}: train.jsonl, validation.jsonl and test.jsonl; the question is {PROMPTS['transcribe']!r}")
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
