"""Checksums of tensors, manifests of them, and what they find."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from auricle.convert.checksums import (
    METADATA,
    ChecksumError,
    compare_manifest,
    format_manifest,
    hash_tensors,
    read_manifest,
    write_manifest,
)
from auricle.engine.gguf import GGUFError, open_gguf, string
from auricle.engine.outputs import OutputError
from auricle.kernels.formats import F32
from gguf_samples import METADATA as KEYS
from gguf_samples import TENSORS, fill


def test_checksums_are_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    contents = fill(path, KEYS, TENSORS)
    reports = []
    digests = hash_tensors(path, jobs=2, progress=lambda *report: reports.append(report))
    assert list(digests) == [METADATA, *contents]
    for name, raw in contents.items():
        assert digests[name] == hashlib.sha256(raw).hexdigest()
    with open_gguf(path) as file:
        start = min(info.offset for info in file.tensors.values())
    assert digests[METADATA] == hashlib.sha256(path.read_bytes()[:start]).hexdigest()
    assert max(reports) == ("verifying", start + sum(map(len, contents.values())), reports[0][2])
    assert max(reports)[1] == max(reports)[2]


def test_manifest_comes_back(tmp_path: Path) -> None:
    names = ["plain.weight", "two words", "line\nbreak", 'quote "and" back\\slash', "日本"]
    fill(tmp_path / "a.gguf", {}, [(name, (3,), F32) for name in names])
    digests = hash_tensors(tmp_path / "a.gguf")
    write_manifest(tmp_path / "a.sums", digests)
    text = (tmp_path / "a.sums").read_text(encoding="utf-8")
    assert text == format_manifest(digests)
    assert len(text.splitlines()) == len(names) + 1
    assert text.splitlines()[1] == f"{digests['plain.weight']}  plain.weight"
    assert compare_manifest(digests, read_manifest(tmp_path / "a.sums")) == {}


def test_what_differs_is_named(tmp_path: Path) -> None:
    contents = fill(tmp_path / "a.gguf", KEYS, TENSORS)
    manifest = hash_tensors(tmp_path / "a.gguf")
    raw = bytearray((tmp_path / "a.gguf").read_bytes())
    at = bytes(raw).index(contents["conv"])
    raw[at + 7] ^= 1
    (tmp_path / "b.gguf").write_bytes(raw)
    assert compare_manifest(hash_tensors(tmp_path / "b.gguf"), manifest) == {"conv": "different"}
    fill(tmp_path / "c.gguf", KEYS | {"general.name": string("other")}, TENSORS)
    assert compare_manifest(hash_tensors(tmp_path / "c.gguf"), manifest) == {METADATA: "different"}
    del manifest["w"]
    manifest["gone"] = "0" * 64
    wrong = compare_manifest(hash_tensors(tmp_path / "a.gguf"), manifest)
    assert wrong == {"gone": "missing", "w": "not in the manifest"}


@pytest.mark.parametrize(("text", "message"), [
    ("", "line 1, is not"),
    ("abc  w\n", "line 1, is not"),
    (f"{'0' * 64}  w\n{'0' * 63}  v\n", "line 2, is not '<SHA-256>  <tensor>'"),
    (f"{'0' * 64} w\n", "line 1, is not"),
    ("\udcff", "it is not text"),
    (None, "No such file"),
])  # fmt: skip
def test_no_manifest(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "m").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ChecksumError, match=message) as caught:
        read_manifest(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*: No such file or directory"):
        write_manifest(tmp_path / "nowhere" / "m", {})
    (tmp_path / "a.gguf").touch()
    with pytest.raises(GGUFError, match="is empty"):
        hash_tensors(tmp_path / "a.gguf")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    fill(tmp_path / "a.gguf", KEYS, [])
    assert hash_tensors(tmp_path / "a.gguf") == {
        METADATA: hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest()
    }
