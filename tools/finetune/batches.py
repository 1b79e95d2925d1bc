"""Rows of tokens with their labels and audio slots, and batches of them: arrays that a training step reads.

Prompts are built as at inference (engine/prompts.py): time markers inside the audio spans, each text between spans
tokenised in one call. Knows token ids and log-mels; knows no model, no files and no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...engine.prompts import SpecialIds, audio_span, digit_ids
from ...engine.tokenizer import Tokenizer

IGNORED = -1  # label of a position from which nothing is learnt
FRAMES_PER_TOKEN = 8


@dataclass(frozen=True)
class Codec:
    """A tokenizer with the ids that conversations need."""

    tokenizer: Tokenizer
    special: SpecialIds
    end_id: int  # closes an answer
    digits: tuple[int, ...] | None  # ids of '0' to '9' when time markers are on
    window: int  # mel frames that the encoder sees at a time

    def count_span(self, n_frames: int) -> int:
        """Tokens of a clip with its marks and time markers."""
        n_tokens = count_audio_tokens(n_frames, self.window)
        return len(audio_span(n_tokens, self.special, self.digits))


def make_codec(
    tokenizer: Tokenizer, special: SpecialIds, end_id: int, *, time_markers: bool = True, window: int = 400
) -> Codec:
    """Raises PromptError when time markers are wanted and the vocabulary lacks a digit."""
    return Codec(tokenizer, special, end_id, digit_ids(tokenizer) if time_markers else None, window)


def count_audio_tokens(n_frames: int, window: int) -> int:
    """Each window of `window` mel frames, the last one too, becomes an eighth of its length, rounded up."""
    full, rest = divmod(n_frames, window)
    return full * -(-window // FRAMES_PER_TOKEN) + -(-rest // FRAMES_PER_TOKEN)


@dataclass
class Row:
    """One sequence of the decoder, built from left to right. A branch sees what was there before the first branch,
    and itself: so several questions about one clip share its encoding, each as if it stood alone."""

    codec: Codec
    mels: list[np.ndarray] = field(default_factory=list)  # clips, each [n_mels, n_frames]
    sounds: list[int] = field(default_factory=list)  # what is heard in each audio token, a class, or IGNORED
    places: list[Sequence[int]] = field(default_factory=list)  # where each stands: some classes, or nothing known
    ids: list[int] = field(default_factory=list)
    audio: list[int] = field(default_factory=list)  # row in the concatenated clips, -1 for text
    labels: list[int] = field(default_factory=list)  # the id to follow, or IGNORED
    weights: list[float] = field(default_factory=list)  # of the labels in the loss
    aims: list[int] = field(default_factory=list)  # row in the concatenated clips where a label is decided, or IGNORED
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)  # 0 for what all branches share
    spans: list[tuple[int, int]] = field(default_factory=list)  # of the clips in `ids`

    _branch: int = 0
    _position: int = 0
    _n_shared: int = 0
    _n_audio: int = 0

    def text(self, text: str) -> None:
        """Text that is read, not learnt."""
        self.tokens(self.codec.tokenizer.encode(text))

    def tokens(self, ids: Sequence[int]) -> None:
        """The same, of ready ids."""
        self._append(ids)

    def clip(self, mel: np.ndarray, sounds: Sequence[int] = (), places: Sequence[Sequence[int]] = ()) -> None:
        """The span of a clip [n_mels, n_frames], with time markers when the model has them. `sounds`: a class for each
        audio token, which the encoder shall tell; `places`: some for each, which the decoder shall know."""
        n_tokens = count_audio_tokens(mel.shape[1], self.codec.window)
        assert {len(sounds), len(places)} <= {0, n_tokens}, f"{len(sounds)=} {len(places)=} {n_tokens=}"
        self.sounds += sounds or [IGNORED] * n_tokens
        self.places += places or [()] * n_tokens
        span = audio_span(n_tokens, self.codec.special, self.codec.digits)
        at = len(self.ids)
        self._append(span)
        self.spans.append((at, len(self.ids)))
        slots = [at + i for i, token_id in enumerate(span[1:-1], 1) if token_id == self.codec.special.audio]
        for slot in slots:
            self.audio[slot] = self._n_audio
            self._n_audio += 1
        self.mels.append(mel)

    def answer(self, text: str, weight: float = 1.0, aims: Sequence[int] = ()) -> None:
        """What the model shall say here, and the token that ends it. `aims`: for each token of the text the row of the
        clips where the model shall look for it, or IGNORED."""
        assert self.ids, "an answer needs something before it"
        answer = [*self.codec.tokenizer.encode(text), self.codec.end_id]
        first = len(self.ids) - 1
        self._append(answer)
        self.labels[first:-1] = answer
        self.weights[first:-1] = [weight] * len(answer)
        if aims:
            self.aims[first:-1] = [*aims, IGNORED]
            assert len(self.aims) == len(self.ids), f"{len(aims)=} {len(answer)=}"

    def branch(self) -> None:
        """From here on nothing of an earlier branch is seen, and positions go on from the shared part."""
        if self._branch == 0:
            self._n_shared = len(self.ids)
        self._branch += 1
        self._position = self._n_shared

    def cut(self, n_tokens: int) -> None:
        """Keep at most the first `n_tokens`, no clip in part. Only for rows without branches."""
        assert self._branch == 0, f"{self._branch=}"
        kept = n_tokens
        for first, end in self.spans:
            if first < n_tokens < end:
                kept = first
        self.mels = self.mels[: sum(end <= kept for _, end in self.spans)]
        n_kept = sum(count_audio_tokens(mel.shape[1], self.codec.window) for mel in self.mels)
        del self.sounds[n_kept:], self.places[n_kept:]
        for part in (self.ids, self.audio, self.labels, self.weights, self.aims, self.positions, self.branches):
            del part[kept:]
        if kept < self._position and self.labels:
            self.labels[-1], self.weights[-1] = IGNORED, 0.0  # what it announces is gone

    def take_last_answer(self) -> list[int]:
        """Its ids, without the one that ends it; they and what follows leave the row, for the model to answer.

        Only for rows without branches.
        """
        assert self._branch == 0, f"{self._branch=}"
        end = max(at for at, label in enumerate(self.labels) if label != IGNORED)
        first = end
        while first and self.labels[first - 1] != IGNORED:
            first -= 1
        answer = [label for label in self.labels[first : end + 1] if label != self.codec.end_id]
        self.cut(first + 1)
        self._position = first + 1
        return answer

    def _append(self, ids: Sequence[int]) -> None:
        n = len(ids)
        self.ids += ids
        self.audio += [-1] * n
        self.labels += [IGNORED] * n
        self.weights += [0.0] * n
        self.aims += [IGNORED] * n
        self.positions += range(self._position, self._position + n)
        self.branches += [self._branch] * n
        self._position += n


@dataclass(frozen=True)
class Batch:
    """Rows without padding, one after another, and all windows of their clips. Numpy arrays throughout."""

    windows: np.ndarray  # [n_windows, n_mels, n_frames] float32, zeros after a window's end
    n_frames: np.ndarray  # [n_windows] int64, frames of audio
    n_padded: np.ndarray  # [n_windows] int64, frames that the stem reads at inference: a clip with one full window has
    # its last one filled with zeros to that length, a single short window is not filled
    ids: np.ndarray  # [n_tokens] int64
    audio_rows: np.ndarray  # [n_tokens] int64, row of the encoder's output, -1 for text
    rows: np.ndarray  # [n_tokens] int64, which row of the batch
    columns: np.ndarray  # [n_tokens] int64, place in the row
    positions: np.ndarray  # [n_tokens] int64, for RoPE
    branches: np.ndarray  # [n_tokens] int64
    labels: np.ndarray  # [n_tokens] int64
    weights: np.ndarray  # [n_tokens] float32
    aims: np.ndarray  # [n_tokens] int64, row of the encoder's output where a label is decided, or IGNORED
    sounds: np.ndarray  # [n_audio] int64, class of each row of the encoder's output
    places: np.ndarray  # [n_audio, n_kinds] int64, classes of the same rows in the decoder, IGNORED where not known


def collate(rows: Sequence[Row]) -> Batch:
    """One batch of rows, with the clips of all of them in order."""
    window = rows[0].codec.window
    windows, n_padded, sounds, places, audio_rows, aims = [], [], [], [], [], []
    for row in rows:
        first = len(sounds)
        sounds += row.sounds
        places += row.places
        audio_rows += [first + at if at >= 0 else -1 for at in row.audio]
        aims += [first + at if at != IGNORED else IGNORED for at in row.aims]
        pieces = [mel[:, at : at + window] for mel in row.mels for at in range(0, mel.shape[1], window)]
        longest = max((piece.shape[1] for piece in pieces), default=0)  # of the request, as at inference
        windows += pieces
        n_padded += [longest] * len(pieces)
    lengths = [len(row.ids) for row in rows]
    return Batch(
        windows=_stack(windows),
        n_frames=_int64([piece.shape[1] for piece in windows]),
        n_padded=_int64(n_padded),
        ids=_int64(_chain(row.ids for row in rows)),
        audio_rows=_int64(audio_rows),
        rows=np.repeat(np.arange(len(rows)), lengths),
        columns=np.concatenate([np.arange(length) for length in lengths]),
        positions=_int64(_chain(row.positions for row in rows)),
        branches=_int64(_chain(row.branches for row in rows)),
        labels=_int64(_chain(row.labels for row in rows)),
        weights=np.array(_chain(row.weights for row in rows), np.float32),
        aims=_int64(aims),
        sounds=_int64(sounds),
        places=_fill(places),
    )


def _stack(pieces: Sequence[np.ndarray]) -> np.ndarray:
    if not pieces:
        return np.zeros((0, 0, 0), np.float32)
    stacked = np.zeros((len(pieces), pieces[0].shape[0], max(piece.shape[1] for piece in pieces)), np.float32)
    for at, piece in enumerate(pieces):
        stacked[at, :, : piece.shape[1]] = piece
    return stacked


def _fill(places: Sequence[Sequence[int]]) -> np.ndarray:
    n_kinds = max(map(len, places), default=0)
    return _int64([place or [IGNORED] * n_kinds for place in places]).reshape(len(places), n_kinds)


def _chain(parts: Iterable[Sequence]) -> list:
    return [item for part in parts for item in part]


def _int64(values: Sequence) -> np.ndarray:
    return np.array(values, np.int64)
