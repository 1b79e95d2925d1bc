"""The segment parser: the authors' grammar, every kind of disorder a model writes, and any way to cut the text."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auricle.engine.segments import Segment, SegmentParser, parse_segments

SECONDS = 10.0


def triples(text: str, seconds: float = SECONDS) -> list[tuple[float, float, str]]:
    return [(segment.start, segment.end, segment.text) for segment in parse_segments(text, seconds)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[0.00]hello there[2.01][2.01]the weather is nice today[4.32]",
            [(0.0, 2.01, "hello there"), (2.01, 4.32, "the weather is nice today")],
        ),
        ("[0.50] a [1.5]\n[2.0] b [3.25]\n", [(0.5, 1.5, "a"), (2.0, 3.25, "b")]),
        ("", []),
        ("no stamps at all, [laughs] and [S01]", []),
        ("Here it is: [0.00]a[1.00]", [(0.0, 1.0, "a")]),
        # a missing end: the next start, or the end of the clip
        ("[0.00]a[2.00]b[4.00]", [(0.0, 2.0, "a"), (2.0, 4.0, "b")]),
        ("[0.00]a[2.00][3.00]b", [(0.0, 2.0, "a"), (3.0, 10.0, "b")]),
        ("[1.00]cut off in the st[2.", [(1.0, 10.0, "cut off in the st")]),
        ("[1.00]cut off [", [(1.0, 10.0, "cut off")]),
        ("[1.00]cut off [2.25", [(1.0, 10.0, "cut off")]),
        ("[1.00]cut off [laug", [(1.0, 10.0, "cut off [laug")]),
        # a reversed pair, an overlap, times outside the clip
        ("[2.00]a[1.00][3.00]b[4.00]", [(1.0, 2.0, "a"), (3.0, 4.0, "b")]),
        ("[0.00]a[3.00][2.00]b[5.00]", [(0.0, 3.0, "a"), (3.0, 5.0, "b")]),
        ("[0.00]a[3.00][1.00]b[2.00][4.00]c[5.00]", [(0.0, 3.0, "a"), (3.0, 3.0, "b"), (4.0, 5.0, "c")]),
        ("[8.00]a[12.00][13.00]b[14.00]", [(8.0, 10.0, "a"), (10.0, 10.0, "b")]),
        # brackets that are no times
        (
            "[0.00]see [12], [laughs], [1.2.3] and [-1.00][2.00]",
            [(0.0, 2.0, "see [12], [laughs], [1.2.3] and [-1.00]")],
        ),
        ("[0.00]a [[1.00]", [(0.0, 1.0, "a [")]),
        ("[0.00][1.00]a[2.00][2.00][3.00]", [(1.0, 2.0, "a")]),
        ("[1.00]音频[2.00]", [(1.0, 2.0, "音频")]),
    ],
)
def test_grammar_and_disorder(text, expected):
    assert triples(text) == expected


def test_speakers():
    text = "[0.00][S01]hello[1.00][1.00] [S12] hi, [S02] is not mine[2.00][2.00]nobody[3.00][3.00][S03][4.00]"
    assert parse_segments(text, SECONDS) == (
        Segment(0.0, 1.0, "hello", "S01"),
        Segment(1.0, 2.0, "hi, [S02] is not mine", "S12"),
        Segment(2.0, 3.0, "nobody", None),
    )
    assert parse_segments("[0.00]a[1.00][1.00][S0", SECONDS) == (Segment(0.0, 1.0, "a"),)


def test_segments_come_as_soon_as_they_are_complete():
    parser = SegmentParser(SECONDS)
    assert parser.feed("[0.0") == parser.feed("0]hel") == parser.feed("lo[1.0") == []
    assert parser.feed("0]") == [Segment(0.0, 1.0, "hello")]
    assert parser.feed("[1.50]and") == []
    assert parser.close() == [Segment(1.5, 10.0, "and")]
    assert parser.close() == []


def test_segments_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Segment(0.0, 1.0, "a").text = "b"


STAMPS = st.floats(0, 20).map(lambda seconds: f"[{seconds:.2f}]")
PARTS = st.one_of(
    STAMPS, st.sampled_from(["[S01]", "[", "]", "[1", "1.", "[12]", "[2.5", "\n", " "]), st.text(max_size=4)
)


@given(st.lists(PARTS, max_size=10).map("".join), st.data())
def test_any_split_gives_the_same_segments(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parser = SegmentParser(SECONDS)
    segments = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        segments += parser.feed(text[start:end])
    assert (*segments, *parser.close()) == parse_segments(text, SECONDS)


@given(st.lists(PARTS, max_size=30).map("".join))
def test_segments_are_in_order_and_inside_the_clip(text):
    last = 0.0
    for segment in parse_segments(text, SECONDS):
        assert last <= segment.start <= segment.end <= SECONDS
        assert segment.text == segment.text.strip() != ""
        last = segment.end


WORDS = st.sampled_from(["hello there", "the weather is nice", "12.50 euros", "音频", "a [laugh] b"])


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300), WORDS), max_size=10))
def test_well_formed_answers_come_back(spans):
    clock, expected = 0, []
    for pause, length, words in spans:
        expected.append(((clock + pause) / 100, (clock + pause + length) / 100, words))
        clock += pause + length
    text = "".join(f"[{start:.2f}]{words}[{end:.2f}]" for start, end, words in expected)
    assert triples(text, clock / 100) == expected
