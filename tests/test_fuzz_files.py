"""What the fuzzers of files begin with: every key of a model with values of each kind, whole files of each reader."""

from __future__ import annotations

import sys

import pytest

from support import ROOT

sys.path.append(str(ROOT / "benchmarks" / "fuzz"))

from targets_files import SMALL, TARGETS, changes, read_checkpoint, read_model, small_files

from auricle.convert.source import ConversionError
from auricle.engine import AuricleError


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_fuzzer_begins_with_is_read_or_refused_in_one_line(name: str) -> None:
    seeds, check = TARGETS[name]
    assert [check(seed) for seed in seeds()]


def test_whole_files_are_read() -> None:
    """Nothing is refused because of the fuzzer itself."""
    for seed in TARGETS["gguf"][0]():
        read_model(seed)
    for at, seed in enumerate(small_files()):
        if SMALL[at] in ("config.json", "vocab.json", "merges.txt", "chat_template.jinja"):
            read_checkpoint(seed)


def test_a_finding_would_be_seen() -> None:
    with pytest.raises(ConversionError, match=r"config\.json is not JSON"):
        read_checkpoint(b"\0{")
    with pytest.raises(AuricleError, match="the file ends at"):
        read_model(next(TARGETS["gguf"][0]())[:-1000])
    at, typed = next(changes(b"\x05\x01\x08text"))
    assert (at, typed.value) == (261, "text")
    at, typed = next(changes(b"\x05\x01\x88a,b"))
    assert typed.value == ["a", "b"]
