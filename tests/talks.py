"""Small checkpoints to train, and conversations to train them on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import soundfile

from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint
from sounds import synthetic

SHAPE = SampleShape(
    enc_d_model=32, enc_n_head=2, enc_d_ff=48, enc_d_out=32, d_adapter=24, d_model=48, d_ff=64, d_head=16,
    n_window=100, n_layer=4,
)  # fmt: skip
OTHER = SampleShape(
    enc_d_model=32, enc_n_head=2, enc_d_ff=48, enc_d_out=40, d_adapter=24, d_model=48, d_ff=64, d_head=16,
    n_window=20, taps=(3, 0, 2), n_inject=2, n_kv_head=4, tied=True,
)  # fmt: skip


@cache
def checkpoint_of(base: Path, shape: SampleShape) -> Path:
    """A folder of a random checkpoint in `base`, made once."""
    return copy_checkpoint(base / str(hash(shape)), shape)


def write_conversations(folder: Path, conversations: list[list[tuple[str, str]]]) -> Path:
    """Contents that end in .wav are recordings, written too, each with its own length."""
    lines = []
    for messages in conversations:
        turns = []
        for role, content in messages:
            kind = "audio" if content.endswith(".wav") else "text"
            if kind == "audio" and not (folder / content).exists():
                seconds = 0.4 + 0.37 * (ord(content[0]) - ord("a"))
                soundfile.write(folder / content, synthetic(seconds, 16_000, seed=ord(content[0])), 16_000)
            turns.append({"role": role, "message_type": kind, "content": content})
        lines.append(json.dumps({"conversation": turns}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def digits_data(folder: Path) -> Path:
    words = ["one", "two", "three", "one two", "two two"]
    clips = [f"{letter}.wav" for letter in "abcde"]
    return write_conversations(
        folder,
        [[("user", clip), ("user", "Say."), ("assistant", word)] for clip, word in zip(clips, words, strict=True)],
    )
