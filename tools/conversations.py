"""Reads conversations about audio: the official JSONL format, one request with its answers a line.

    {"conversation": [{"role": "user", "message_type": "audio", "content": "clips/a.wav"},
                      {"role": "user", "message_type": "text", "content": "Transcribe the audio."},
                      {"role": "assistant", "message_type": "text", "content": "one two"}]}

A relative path is relative to the file. Opens no audio; knows no prompts and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..convert.documents import parse_document
from ..engine.fields import as_kind
from ..kernels.errors import AuricleError
from ..kernels.quote import quote

Role = Literal["system", "user", "assistant"]
Kind = Literal["audio", "text"]
ROLES, KINDS = ("system", "user", "assistant"), ("audio", "text")
MAX_LINE = 1 << 24  # characters


class ConversationError(AuricleError):
    """A file of conversations that cannot be read: the line, and what is wrong with it."""


@dataclass(frozen=True)
class Turn:
    """One message; `content` is a text, or the path of a recording."""

    role: Role
    kind: Kind
    content: str


@dataclass(frozen=True)
class Conversation:
    """The messages of line `line` (from 1)."""

    turns: tuple[Turn, ...]
    line: int

    @property
    def clips(self) -> list[str]:
        """Paths of all recordings, in order."""
        return [turn.content for turn in self.turns if turn.kind == "audio"]

    def exchanges(self) -> list[tuple[tuple[Turn, ...], str]]:
        """Each answer, with every message before it."""
        return [(self.turns[:i], turn.content) for i, turn in enumerate(self.turns) if turn.role == "assistant"]


def read_conversations(path: str | Path, limit: int | None = None) -> list[Conversation]:
    """The first `limit` conversations of a JSONL file, all by default; empty lines are skipped.

    Raises ConversationError, one line with the number of the line at fault, for a file that cannot be read, holds none,
    or is not in the format.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ConversationError(f"{path} cannot be read: it is not a regular file")
    found: list[Conversation] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in _lines(path, file):
                found.append(parse_line(text, f"{path}, line {number}", number, path.parent))
                if len(found) == limit:
                    break
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConversationError(f"{path} cannot be read: {reason}") from error
    if not found:
        raise ConversationError(f"{path} holds no conversation; write one JSON object a line")
    return found


def _lines(path: Path, file: Any) -> Iterator[tuple[int, str]]:
    number = 0
    while text := file.readline(MAX_LINE + 1):
        number += 1
        if len(text) > MAX_LINE:
            raise ConversationError(
                f"{path}, line {number}: longer than {MAX_LINE} characters; write one request a line"
            )
        if text.strip():
            yield number, text


def parse_line(text: str, where: str, number: int, folder: Path) -> Conversation:
    """One line. Raises ConversationError that begins with `where`."""
    document = parse_document(text.encode(), where, ConversationError, "write one object a line")
    messages = document.look_up("conversation")
    if not isinstance(messages, list) or not messages:
        raise ConversationError(f'{document.where}: no list of messages under "conversation"')
    turns = tuple(_parse_turn(message, f"{where}, message {n}", folder) for n, message in enumerate(messages, 1))
    if turns[-1].role != "assistant" or not any(turn.role == "user" for turn in turns):
        raise ConversationError(f"{where}: the last message must be the assistant's, after at least one of the user")
    if next(turn.role for turn in turns if turn.role != "system") != "user":
        raise ConversationError(f"{where}: the assistant speaks before the user; it answers, and learns to answer")
    return Conversation(turns, number)


def _parse_turn(message: Any, where: str, folder: Path) -> Turn:
    fields = message if isinstance(message, dict) else {}
    role, kind, content = (as_kind(fields.get(key), str) for key in ("role", "message_type", "content"))
    if role not in ROLES or kind not in KINDS or content is None:
        wanted = f"role ({', '.join(ROLES)}), message_type ({', '.join(KINDS)}) and content, a text"
        raise ConversationError(f"{where}: {quote(message)} does not have {wanted}")
    if kind == "text":
        return Turn(role, kind, content)
    if role != "user":
        raise ConversationError(f"{where}: audio of the role {role}; only the user's is heard")
    if not content or "\0" in content:
        raise ConversationError(f"{where}: no path of a recording")
    return Turn(role, kind, str(folder / content))
