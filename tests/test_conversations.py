"""The JSONL format of conversations: what is read, and one line for whatever is not it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auricle.tools.conversations import MAX_LINE, Conversation, ConversationError, Turn, read_conversations

AUDIO = {"role": "user", "message_type": "audio", "content": "a.wav"}
TEXT = {"role": "user", "message_type": "text", "content": "Transcribe the audio."}
ANSWER = {"role": "assistant", "message_type": "text", "content": "one two"}
GOOD = [AUDIO, TEXT, ANSWER]


def write(path: Path, *conversations: Any) -> Path:
    path.write_text("\n".join(json.dumps({"conversation": c}, ensure_ascii=False) for c in conversations))
    return path


def test_turns_in_order(tmp_path: Path) -> None:
    more = {"role": "assistant", "message_type": "text", "content": "trois « quatre »"}
    absolute = AUDIO | {"content": "/clips/b.flac"}
    path = write(tmp_path / "data.jsonl", GOOD, [AUDIO, absolute, TEXT, ANSWER, TEXT, more])
    one, two = read_conversations(path)
    clip = Turn("user", "audio", str(tmp_path / "a.wav"))
    question, answer = Turn("user", "text", "Transcribe the audio."), Turn("assistant", "text", "one two")
    assert one == Conversation((clip, question, answer), 1)
    assert one.exchanges() == [((clip, question), "one two")]
    assert two.clips == [str(tmp_path / "a.wav"), "/clips/b.flac"]
    assert [(len(before), answer) for before, answer in two.exchanges()] == [(3, "one two"), (5, "trois « quatre »")]


def test_limit_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    line = json.dumps({"conversation": GOOD, "id": 7})
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"\n{line}\r\n  \n{line}\nnot read".encode())
    assert [c.line for c in read_conversations(path, 2)] == [2, 4]
    with pytest.raises(ConversationError, match="line 5 is not JSON"):
        read_conversations(path)


FAULTS: dict[str, tuple[Any, str]] = {
    "a number": (3, 'no list of messages under "conversation"'),
    "empty": ([], 'no list of messages under "conversation"'),
    "a message that is a text": (["hello", ANSWER], "message 1: .hello. does not have role"),
    "no role": ([{**TEXT, "role": None}, ANSWER], "message 1: .* does not have role"),
    "role of another": ([TEXT, {**ANSWER, "role": "tool"}], "message 2: .* does not have role"),
    "kind of another": ([{**AUDIO, "message_type": "video"}, ANSWER], "message 1: .* message_type"),
    "role is a list": ([{**TEXT, "role": ["user"]}, ANSWER], "message 1: .* does not have role"),
    "kind is an object": ([{**TEXT, "message_type": {"text": 1}}, ANSWER], "message 1: .* message_type"),
    "a number of many digits": ([{**TEXT, "content": 10**4000}, ANSWER], "is not JSON .a number of 4001 digits"),
    "content is a list": ([{**TEXT, "content": ["x"]}, ANSWER], "message 1: .* and content, a text"),
    "audio of the assistant": ([TEXT, {**AUDIO, "role": "assistant"}], "message 2: audio of the role assistant"),
    "no path": ([{**AUDIO, "content": ""}, ANSWER], "message 1: no path of a recording"),
    "null byte": ([{**AUDIO, "content": "a\0b"}, ANSWER], "message 1: no path of a recording"),
    "no answer": ([AUDIO, TEXT], "the last message must be the assistant's"),
    "no question": ([ANSWER], "after at least one of the user"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_lines_that_are_none(tmp_path: Path, fault: str) -> None:
    conversation, message = FAULTS[fault]
    with pytest.raises(ConversationError, match=rf"data\.jsonl, line 2.*{message}") as caught:
        read_conversations(write(tmp_path / "data.jsonl", GOOD, conversation))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for content, message in (
        (b"", "holds no conversation"),
        (b"\n \n", "holds no conversation"),
        (b"\xff\xfe{", "it is not UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (rb'{"conversation": [{"role": "\ud800"}]}', "line 1 has half a character in a text"),
        (b"{}", "line 1: no list"),
        (b'{"conversation": [NaN]}', "message 1"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConversationError, match=message):
            read_conversations(path)
    path.write_text("x" * (MAX_LINE + 2))
    with pytest.raises(ConversationError, match="line 1: longer than"):
        read_conversations(path)
    for absent in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(ConversationError, match="cannot be read"):
            read_conversations(absent)
