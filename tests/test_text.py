"""Streaming text: whole characters, the think block by ids, stop strings over any cut of the text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auricle.engine.sampling import OptionError
from auricle.engine.text import StopStrings, TextStream, ThinkSplitter
from auricle.engine.tokenizer import Tokenizer
from vocabularies import small_metadata

TEXT = st.text(max_size=40)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(small_metadata())


def byte_pieces() -> Tokenizer:
    """A vocabulary of SentencePiece's kind, for which decoding takes a leading space away."""
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁The", "▁fox", "<0xE9>", "<0x9F>", "<0xB3>"],
            "tokenizer.ggml.scores": [0.0] * 8,
        }
    )


def pushed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.close()]


def test_a_character_of_several_tokens_comes_whole():
    ids = [tokenizer().id_of(char) for char in "ðŁĻĤ"]  # the four bytes of one emoji in the byte alphabet
    assert pushed(TextStream(tokenizer()), ids) == ["", "", "", "🙂", ""]
    assert pushed(TextStream(tokenizer()), ids[:3]) == ["", "", "", "\ufffd"]
    assert pushed(TextStream(tokenizer()), [*ids[:2], tokenizer().id_of("a")]) == ["", "", "\ufffda", ""]


@given(st.lists(st.integers(0, tokenizer().n_tokens - 1), max_size=40))
@settings(deadline=None)
def test_pieces_are_what_decode_gives(ids):
    for skip_special in (True, False):
        pieces = pushed(TextStream(tokenizer(), skip_special), ids)
        assert "".join(pieces) == tokenizer().decode(ids, skip_special)


@given(TEXT)
@settings(deadline=None)
def test_no_piece_of_a_good_text_has_half_a_character(text):
    assert all(
        "\ufffd" not in piece or "\ufffd" in text for piece in pushed(TextStream(tokenizer()), tokenizer().encode(text))
    )


def test_special_tokens_are_not_shown():
    end, think = tokenizer().id_of("<|im_end|>"), tokenizer().id_of("<think>")
    assert pushed(TextStream(tokenizer()), [end, think]) == ["", "<think>", ""]
    assert pushed(TextStream(tokenizer(), skip_special=False), [end]) == ["<|im_end|>", ""]


def test_leading_space_of_sentencepiece():
    ids = [1, 3, 4, 5, 6, 7]
    assert pushed(TextStream(byte_pieces()), ids) == ["", "The", " fox", "", "", "音", ""]
    assert byte_pieces().decode(ids) == "The fox音"


THINK, END, WORD = 1, 2, 3


def split(*pieces: tuple[int, str], think: int | None = THINK, end: int | None = END) -> dict[str, str]:
    splitter, texts = ThinkSplitter(think, end), {"reasoning": "", "content": ""}
    for token_id, piece in (*pieces, (None, "")):
        channel, text = splitter.push(token_id, piece)
        texts[channel] += text
    return texts


def words(text: str) -> list[tuple[int, str]]:
    return [(WORD, char) for char in text]


@pytest.mark.parametrize(
    "mark", [("<think>", "</think>"), ("", "")]
)  # shown or not by the stream, as the vocabulary says
@pytest.mark.parametrize("cut", [words, lambda text: [(WORD, text)] if text else []])
@pytest.mark.parametrize(
    ("before", "inside", "after", "reasoning", "content"),
    [
        ("", "\n", "\n\nHere we go...\n\nIt ends.\n", "", "Here we go...\n\nIt ends.\n"),
        ("", "\nreasoning content\n", "\n\nfinal answer", "reasoning content", "final answer"),
        ("", "two  words\n\nlines ", "answer", "two  words\n\nlines", "answer"),
        ("", "x", " \n \n  indented", "x", "  indented"),
        ("Before ", "x", "after", "x", "Before after"),
        ("", "x", "\n\n", "x", ""),
    ],
)
def test_think_block(mark, cut, before, inside, after, reasoning, content):
    pieces = [*cut(before), (THINK, mark[0]), *cut(inside), (END, mark[1]), *cut(after)]
    assert split(*pieces) == {"reasoning": reasoning, "content": content}


def test_answer_cut_inside_the_think_block():
    assert split((THINK, "<think>"), *words("\nI hear ")) == {"reasoning": "I hear", "content": ""}
    assert split((THINK, "<think>")) == {"reasoning": "", "content": ""}


def test_answer_without_think_block_is_untouched():
    assert split(*words("\n\n a \n")) == {"reasoning": "", "content": "\n\n a \n"}
    assert split(*words("<think>a</think>")) == {"reasoning": "", "content": "<think>a</think>"}


@pytest.mark.parametrize(("think", "end"), [(None, None), (THINK, None), (None, END)])
def test_vocabulary_without_think_tokens_splits_nothing(think, end):
    pieces = [(THINK, "<think>"), (WORD, "\na"), (END, "</think>"), (WORD, "\n\nb")]
    assert split(*pieces, think=think, end=end) == {"reasoning": "", "content": "<think>\na</think>\n\nb"}


def test_last_piece_goes_where_the_stream_is():
    splitter = ThinkSplitter(THINK, END)
    splitter.push(THINK, "<think>")
    assert splitter.push(None, "\ufffd") == ("reasoning", "\ufffd")


def test_stop_string_over_pieces():
    stop = StopStrings(["\n\nUser:", "###"])
    assert stop.push("Hello.\n") == ("Hello.", False)
    assert stop.push("\nWorld #") == ("\n\nWorld ", False)
    assert stop.push("#!") == ("##!", False)
    assert stop.push("\n\nUs") == ("", False)
    assert stop.push("er: hi") == ("", True)
    assert stop.push("more") == ("", True)
    assert stop.flush() == ""


def test_held_text_comes_at_the_end():
    stop = StopStrings(["###"])
    assert stop.push("a##") == ("a", False)
    assert stop.flush() == "##"
    assert stop.flush() == ""


def test_no_stop_strings():
    stop = StopStrings([])
    assert [stop.push("abc"), stop.flush()] == [("abc", False), ""]


def test_empty_stop_string():
    with pytest.raises(OptionError, match="--stop is empty"):
        StopStrings(["a", ""])


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, a character at a time: the first complete stop string ends the answer, of several the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_the_cut(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stop, shown, stopped = StopStrings(stops), "", False
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, stopped = stop.push(text[start:end])
        shown += piece
    assert (shown + stop.flush(), stopped) == first_stop(text, stops)
