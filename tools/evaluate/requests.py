"""Puts the questions of conversations to a model, one after another. Knows no metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine import Model
from ...engine.segments import parse_segments
from ...kernels.errors import AuricleError
from ..conversations import Conversation, ConversationError
from .measures import Answer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """A question about clips (paths), and the right answer; from line `line` of the data."""

    line: int
    clips: tuple[str, ...]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Row:
    """A request and what came of it; `finish_reason` is "length" for an answer that was cut off."""

    request: Request
    answer: Answer
    finish_reason: str
    audio_seconds: float


def first_requests(conversations: Sequence[Conversation], path: object) -> tuple[list[Request], int]:
    """The first exchange of each conversation, and how many exchanges follow those: a model is asked afresh each time.

    Raises ConversationError for a line whose first answer follows no text of the user, or that brings a system prompt.
    """
    requests, n_more = [], 0
    for conversation in conversations:
        (before, answer), *more = conversation.exchanges()
        where = f"{path}, line {conversation.line}"
        if any(turn.role == "system" for turn in before):
            raise ConversationError(f"{where}: a system message; models are evaluated with their own")
        prompt = "\n".join(turn.content for turn in before if turn.kind == "text")
        if not prompt.strip():
            raise ConversationError(f"{where}: no question of the user before the answer")
        clips = tuple(turn.content for turn in before if turn.kind == "audio")
        requests.append(Request(conversation.line, clips, prompt, answer))
        n_more += len(more)
    return requests, n_more


def run_requests(model: Model, requests: Sequence[Request], path: object, **options: Any) -> Iterator[Row]:
    """Each request's row, as it is done; `options` as for `Model.generate`.

    Raises what that raises, with the line at fault before it.
    """
    for request in requests:
        try:
            result = model.generate(request.prompt, list(request.clips) or None, **options)
        except AuricleError as error:
            raise type(error)(f"{path}, line {request.line}: {error}") from error
        wanted = parse_segments(request.answer, result.audio_seconds)
        answer = Answer(request.answer, result.text, wanted, result.segments)
        yield Row(request, answer, result.finish_reason, result.audio_seconds)
