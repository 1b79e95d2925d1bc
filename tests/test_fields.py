"""What a file says is asked for with its kind: every reader's one way, for metadata and for JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auricle.convert import documents
from auricle.convert.documents import Document, parse_document, read_document
from auricle.convert.source import ConversionError
from auricle.engine.fields import WORDS, Fields, as_kind
from auricle.kernels.errors import AuricleError
from auricle.kernels.quote import quote

VALUES: dict[str, Any] = {
    "int": 3, "float": 0.5, "str": "x", "bool": True, "dict": {"a": 1}, "ints": [1, 2], "floats": [1, 0.5],
    "strs": ["a", ""], "dicts": [{}], "pairs": [["a", "b"]], "empty": [], "array": np.array([1, 2], np.int32),
    "flags": np.array([True]), "nan": float("nan"), "inf": float("inf"), "huge": 10**5000, "null": None,
    "mixed": [1, "a"], "nested": [[1]], "scalar": np.float32(1),
}  # fmt: skip
NUMBERS = {"ints", "floats", "array", "empty"}
OF_KIND: dict[Any, set[str]] = {
    int: {"int", "huge"},
    float: {"int", "float"},
    str: {"str"},
    bool: {"bool"},
    dict: {"dict"},
    list: {"ints", "floats", "strs", "dicts", "pairs", "empty", "mixed", "nested"},
    list[int]: {"ints", "array", "empty"},
    list[float]: {"ints", "floats", "array", "empty"},
    list[str]: {"strs", "empty"},
    list[dict]: {"dicts", "empty"},
    list[list[str]]: {"pairs", "empty"},
    np.ndarray: NUMBERS,
}


def test_every_kind_has_words_and_a_case() -> None:
    assert OF_KIND.keys() == WORDS.keys()


@pytest.mark.parametrize("kind", OF_KIND, ids=str)
def test_each_value_is_of_its_kinds_and_of_no_other(kind: Any) -> None:
    assert {name for name, value in VALUES.items() if as_kind(value, kind) is not None} == OF_KIND[kind]
    fields = Fields(VALUES, "a.gguf", AuricleError, "convert again")
    for name in VALUES:
        if name in OF_KIND[kind] or name == "null":
            fields.get(name, kind)
            continue
        with pytest.raises(AuricleError) as caught:
            fields.get(name, kind)
        message = str(caught.value)
        assert message.startswith(f"a.gguf says {name} = ")
        assert message.endswith(f": it must be {WORDS[kind]}; convert again")
        assert "\n" not in message
        assert len(message) < 200


def test_absent_keys() -> None:
    fields = Fields(VALUES, "a.gguf", AuricleError, "convert again")
    for key in ("absent", "null"):
        assert fields.get(key, int) is None
        assert fields.get(key, int, 5) == 5
        with pytest.raises(AuricleError, match=rf"a\.gguf lacks {key}; convert again"):
            fields.require(key, int)


def test_ranges() -> None:
    fields = Fields(VALUES, "a.gguf", AuricleError, "convert again")
    assert fields.require("int", int, within=(3, 3)) == 3
    with pytest.raises(AuricleError, match="it must be 4 to 9; convert"):
        fields.get("int", int, within=(4, 9))
    with pytest.raises(AuricleError, match="it must be 4 or more; convert"):
        fields.require("int", int, within=(4, float("inf")))


def test_whole_numbers_serve_as_numbers_and_keep_none_of_their_kind() -> None:
    assert type(as_kind(3, float)) is float
    assert as_kind([1, 0.5], list[float]) == [1.0, 0.5]
    assert as_kind(np.array([1, 2]), list[int]) == [1, 2]
    assert as_kind([1, 2], np.ndarray).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb\x1b[2J", r"'a\nb\x1b[2J'"),
        ("x" * 100_000, f"'{'x' * 80}…'"),
        ("\ud800", r"'\ud800'"),
        (10**5000, "a number of 16610 bits"),
        ([1] * 1000, "[1, 1, 1, 1, 1, 1, ...]"),
        (None, "None"),
    ],
    ids=["controls", "long", "half", "digits", "list", "nothing"],
)
def test_values_are_shown_in_a_short_harmless_line(value: Any, shown: str) -> None:
    assert quote(value) == shown
    assert len(quote([value] * 1000)) < 100
    assert "\n" not in quote({"a": [value]})


# JSON.


def document(text: str | bytes) -> Document:
    return parse_document(text if isinstance(text, bytes) else text.encode(), "config.json")


def test_keys_of_a_document_are_paths() -> None:
    found = document('{"a": {"b": {"c": 3}, "n": null}, "l": [1]}')
    assert found.require("a.b.c", int) == 3
    assert found.get("a.n.x", int) is None
    assert found.get("z.b", int, 7) == 7
    assert found.inside({"x": 1}, "entry 2").where == "config.json, entry 2"
    with pytest.raises(ConversionError, match=r"config\.json says l = \[1\]: it must be an object"):
        found.get("l.b", int)
    with pytest.raises(ConversionError, match=r"config\.json lacks a\.b\.d; fetch it again"):
        found.require("a.b.d", int)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b'"x"', "holds a str, not a JSON object"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"is not JSON \(a number of 5000 digits\)"),
        (rb'{"a": ["x", {"b": "\ud800"}]}', "half a character"),
        (rb'{"\uDFFF": 1}', "half a character"),
    ],
    ids=range(9),
)
def test_what_is_no_document(data: bytes, complaint: str) -> None:
    with pytest.raises(ConversionError, match=complaint) as caught:
        document(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_whole_characters_in_two_halves_are_text() -> None:
    assert document(rb'{"a": "\ud83d\ude42"}').require("a", str) == "🙂"


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_document(tmp_path / "absent.json") is None
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path, tmp_path / "pipe.json"):
        with pytest.raises(ConversionError, match="is not a regular file"):
            read_document(path)
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_document(tmp_path / "a.json").require("a", int) == 1
    monkeypatch.setattr(documents, "MAX_BYTES", 7)
    with pytest.raises(ConversionError, match="has more than 7 bytes"):
        read_document(tmp_path / "a.json")
