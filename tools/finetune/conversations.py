"""Conversations about audio as rows to learn from: several turns and clips, batches of like length.

Knows the prompt's form and how long things get; what a line of the file looks like is tools/conversations.py's, and
what a row becomes is batches.py's. Nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...engine.audio import AudioError, count_samples, load_audio
from ...engine.mel import HOP, log_mel
from ..conversations import Conversation, ConversationError, Turn, read_conversations
from .batches import Batch, Codec, Row, collate

SYSTEM = "You are a helpful assistant."
_POOL = 64  # batches among which rows are sorted by length

Part = tuple[str, str]  # "text", "clip" or "answer", and its content


def lay_out(turns: Sequence[Turn], prompt_default: str = "") -> list[Part]:
    """The conversation as it stands in the decoder: texts, clips and answers in turn.

    The form is the default prompt's (engine/prompts.py), repeated a turn: in a user's turn each clip and each text has
    a line; `prompt_default` is put to clips that come without a text. Consecutive answers are one, line by line.
    """
    system = "\n".join(turn.content for turn in turns if turn.role == "system") or SYSTEM
    parts: list[Part] = [("text", f"<|im_start|>system\n{system}<|im_end|>\n")]
    for role, messages in _group(turns):
        if role == "assistant":
            parts += [("answer", "\n".join(turn.content for turn in messages)), ("text", "\n")]
            continue
        if all(turn.kind == "audio" for turn in messages):
            messages = [*messages, Turn("user", "text", prompt_default)]
        parts.append(("text", "<|im_start|>user\n"))
        for at, turn in enumerate(messages):
            parts += [("text", "\n")] if at else []
            parts.append(("clip" if turn.kind == "audio" else "text", turn.content))
        parts.append(("text", "<|im_end|>\n<|im_start|>assistant\n"))
    parts.pop()  # nothing follows the last answer
    return _merge_texts(parts)


def _group(turns: Sequence[Turn]) -> list[tuple[str, list[Turn]]]:
    """Neighbouring messages of one role; the system's are not among them."""
    groups: list[tuple[str, list[Turn]]] = []
    for turn in turns:
        if turn.role == "system":
            continue
        if not groups or groups[-1][0] != turn.role:
            groups.append((turn.role, []))
        groups[-1][1].append(turn)
    return groups


def _merge_texts(parts: Sequence[Part]) -> list[Part]:
    """Texts between clips and answers are tokenised in one call, so they become one part."""
    merged: list[Part] = []
    for kind, content in parts:
        if kind == "text" and merged and merged[-1][0] == "text":
            merged[-1] = ("text", merged[-1][1] + content)
        else:
            merged.append((kind, content))
    return merged


@dataclass
class Conversations:
    """The rows of one JSONL file, made when they are asked for."""

    path: Path
    codec: Codec
    max_len: int
    prompt_default: str = ""
    layouts: list[list[Part]] = field(init=False)
    lines: list[int] = field(init=False)
    lengths: list[int] = field(init=False)  # tokens of each row, from what the headers of the recordings say

    def __post_init__(self) -> None:
        """Reads the file and the headers of its recordings, and leaves out what cannot be learnt from at `max_len`.

        Raises ConversationError for a file out of form, a missing recording, or when nothing is left.
        """
        found = [(turns, lay_out(turns.turns, self.prompt_default)) for turns in read_conversations(self.path)]
        sizes = [self._measure(conversation, layout) for conversation, layout in found]
        self.n_read, self.n_cut = len(found), 0
        self.layouts, self.lines, self.lengths, self.left_out = [], [], [], []
        for (conversation, layout), (length, first_answer) in zip(found, sizes, strict=True):
            if first_answer >= self.max_len:
                self.left_out.append(conversation.line)
                continue
            self.n_cut += length > self.max_len
            self.layouts.append(layout)
            self.lines.append(conversation.line)
            self.lengths.append(min(length, self.max_len))
        if not self.layouts:
            raise ConversationError(
                f"{self.path}: no conversation has an answer within {self.max_len} tokens; raise --max-len"
            )

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def report(self) -> str | None:
        """One line about what is cut at `max_len`, None when nothing is."""
        if not self.n_cut and not self.left_out:
            return None
        lines = f" (line {', '.join(map(str, self.left_out[:5]))})" if self.left_out else ""
        return (
            f"{self.path}: of {self.n_read} conversations {self.n_cut} are cut at {self.max_len} tokens, "
            f"{len(self.left_out)}{lines} left out since their first answer begins later"
        )

    def row(self, at: int) -> Row:
        """Raises AudioError, with the line, for a recording that cannot be read."""
        row = Row(self.codec)
        for kind, content in self.layouts[at]:
            if kind == "answer":
                row.answer(content)
            elif kind == "clip":
                row.clip(log_mel(self._load(content, self.lines[at])))
            else:
                row.text(content)
        row.cut(self.max_len)
        return row

    def _load(self, clip: str, line: int) -> np.ndarray:
        try:
            return load_audio(clip)
        except AudioError as error:
            raise AudioError(f"{self.path}, line {line}: {error}") from error

    def _measure(self, conversation: Conversation, layout: Sequence[Part]) -> tuple[int, int]:
        """Tokens of the whole, and before the first token of the first answer."""
        length, first_answer = 0, None
        for kind, content in layout:
            if kind == "clip":
                length += self._measure_clip(content, conversation.line)
                continue
            if kind == "answer" and first_answer is None:
                first_answer = length
            length += len(self.codec.tokenizer.encode(content)) + (kind == "answer")
        assert first_answer is not None, f"{conversation.line=}"
        return length, first_answer

    def _measure_clip(self, clip: str, line: int) -> int:
        try:
            n_samples = count_samples(clip)
        except AudioError as error:
            raise AudioError(f"{self.path}, line {line}: {error}") from error
        if n_samples is None:
            n_samples = len(self._load(clip, line))
        return self.codec.count_span(max(n_samples // HOP, 1))


@dataclass
class ConversationSource:
    """Batch number n of an endless run over the conversations: each epoch has every one once, in another order."""

    conversations: Conversations
    n_rows: int
    seed: int

    def __post_init__(self) -> None:
        self._epoch, self._batches = -1, []

    @property
    def n_batches(self) -> int:
        """In an epoch."""
        return -(-len(self.conversations) // self.n_rows)

    def __call__(self, number: int) -> Batch:
        epoch, at = divmod(number, self.n_batches)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._deal(epoch)
        return collate([self.conversations.row(row) for row in self._batches[at]])

    def _deal(self, epoch: int) -> list[list[int]]:
        """Rows of like length together, shortest first within a batch: little is computed for filling up."""
        rng = np.random.default_rng([self.seed, epoch])
        order, lengths = rng.permutation(len(self.conversations)), self.conversations.lengths
        pool = _POOL * self.n_rows
        batches = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool].tolist(), key=lambda row: lengths[row])
            batches += [rows[at : at + self.n_rows] for at in range(0, len(rows), self.n_rows)]
        rng.shuffle(batches)
        return batches
