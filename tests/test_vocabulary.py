"""From the tokenizer files of a checkpoint to the token list of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from auricle.convert.hf import plan_conversion
from auricle.convert.vocabulary import TokenType, Vocabulary, read_vocabulary
from auricle.engine.gguf import open_gguf
from checkpoints import SHAPE, change_json, copy_checkpoint
from support import SHARED, needs_shared

GOLDEN = SHARED / "golden" / "a" / "checkpoint"
QWEN = SHARED / "data" / "tokenizer" / "ggml-vocab-qwen2.gguf"
N = SHAPE.n_vocab
AUDIO, BOS, EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "sample")


def read(folder: Path) -> Vocabulary:
    ids = json.loads((folder / "processor_config.json").read_text())
    keys = {AUDIO: "audio_token_id", BOS: "audio_start_id", EOS: "audio_end_id"}
    return read_vocabulary(folder, N, {token: ids[key] for token, key in keys.items()})


def as_tokenizer_json(folder: Path, pairs: bool) -> None:
    """Leave only tokenizer.json, in one of the two ways it writes merges."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = [{"id": int(i), **entry} for i, entry in settings["added_tokens_decoder"].items()]
    merges = [line.split(" ") for line in lines] if pairs else lines
    model = {"type": "BPE", "vocab": json.loads((folder / "vocab.json").read_text()), "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    change_json(folder / "tokenizer_config.json", {"added_tokens_decoder": None})
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (folder / name).unlink()


@needs_shared
def test_golden_tokenizer() -> None:
    metadata = plan_conversion(GOLDEN, "f32").metadata
    tokens = metadata["tokenizer.ggml.tokens"].value
    types = metadata["tokenizer.ggml.token_type"].value
    assert len(tokens) == len(types) == 1024
    assert tokens[446:455] == [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", AUDIO, BOS, EOS, "<think>", "</think>", "[PAD454]",
    ]  # fmt: skip
    assert types[445:455] == [1, 3, 3, 3, 3, 3, 3, 4, 4, 5]
    assert tokens[1023] == "[PAD1023]"
    lines = (GOLDEN / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert metadata["tokenizer.ggml.merges"].value == lines[1:]
    single = {key: metadata[f"tokenizer.ggml.{key}"].value for key in ("model", "pre", "eos_token_id", "bos_token_id")}
    assert single == {"model": "gpt2", "pre": "qwen2", "eos_token_id": 448, "bos_token_id": 446}
    assert metadata["tokenizer.ggml.padding_token_id"].value == 446


@needs_shared
def test_real_vocabulary_survives(tmp_path: Path) -> None:
    """Qwen's own 151,643 tokens and 151,387 merges, as hub files and back; 96 of the merges begin with `#`."""
    with open_gguf(QWEN) as file:
        tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens[:151643])}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8", newline="")
    special = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_pad|>": 151654}
    (tmp_path / "added_tokens.json").write_text(json.dumps(special))
    vocabulary = read_vocabulary(tmp_path, 151936, {AUDIO: 151654, BOS: 151669, EOS: 151670})
    assert vocabulary.merges == merges
    assert sum(merge.startswith("#") for merge in vocabulary.merges) == 96
    assert vocabulary.tokens[:151646] == tokens[:151646]
    assert vocabulary.tokens[151654] == AUDIO
    assert vocabulary.notes == ("id 151654: the tokenizer's <|vision_pad|> is written as <|AUDIO|>",)
    assert [vocabulary.types.count(t) for t in (TokenType.NORMAL, TokenType.CONTROL)] == [151643, 6]


@pytest.mark.parametrize("pairs", [True, False])
def test_tokenizer_json_alone_is_enough(folder: Path, pairs: bool) -> None:
    expected = read(folder)
    as_tokenizer_json(folder, pairs)
    assert read(folder) == expected


def test_only_the_first_line_is_a_comment(folder: Path) -> None:
    path = folder / "merges.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    assert any(line.startswith("#") for line in lines[1:])
    with_comment = read(folder).merges
    assert with_comment == lines[1:-1]
    path.write_bytes("\r\n".join(lines[1:]).encode())
    assert read(folder).merges == with_comment
    hashes_first = sorted(with_comment, key=lambda line: not line.startswith("#"))
    path.write_text("\n".join(hashes_first), encoding="utf-8")
    assert read(folder).merges == hashes_first


def test_types_without_flags(folder: Path) -> None:
    """added_tokens.json says nothing of a token's kind: what is written `<…>` is special."""
    change_json(folder / "tokenizer_config.json", {"added_tokens_decoder": None})
    change_json(folder / "added_tokens.json", {"plain": 400})
    vocabulary = read(folder)
    assert vocabulary.types[vocabulary.ids["<think>"]] is TokenType.CONTROL
    assert vocabulary.types[400] is TokenType.USER_DEFINED
    assert vocabulary.tokens[401] == "[PAD401]"
    assert vocabulary.types[401] is TokenType.UNUSED


def test_added_tokens_may_stand_in_the_vocabulary_too(folder: Path) -> None:
    expected = read(folder)
    change_json(folder / "vocab.json", json.loads((folder / "added_tokens.json").read_text()))
    assert read(folder) == expected


def test_tokenizer_that_knows_the_placeholders(folder: Path) -> None:
    expected = read(folder)
    change_json(folder / "added_tokens.json", {AUDIO: expected.ids[AUDIO]})
    assert read(folder) == expected


def test_end_and_padding_come_from_the_tokenizer(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<|im_start|>"}, "pad_token": None})
    metadata = plan_conversion(folder, "f16").metadata
    first = metadata["moss_audio.bos_token_id"].value
    assert metadata["tokenizer.ggml.eos_token_id"].value == first + 1
    assert metadata["moss_audio.eos_token_id"].value == first + 2
    assert metadata["tokenizer.ggml.padding_token_id"].value == first


def test_ids_that_no_configuration_states(folder: Path) -> None:
    keys = {"eos_token_id": None, "bos_token_id": None}
    change_json(folder / "config.json", keys | {f"language_config.{key}": None for key in keys})
    (folder / "generation_config.json").unlink()
    plan = plan_conversion(folder, "f16").metadata
    tokens = plan["tokenizer.ggml.tokens"].value
    assert tokens[plan["moss_audio.bos_token_id"].value] == "<|endoftext|>"
    assert tokens[plan["moss_audio.eos_token_id"].value] == "<|im_end|>"


def test_chat_template(folder: Path) -> None:
    assert "tokenizer.chat_template" not in plan_conversion(folder, "f16").metadata
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "named"}]
    for template, expected in (("plain", "plain"), (named, "named")):
        change_json(folder / "tokenizer_config.json", {"chat_template": template})
        assert plan_conversion(folder, "f16").metadata["tokenizer.chat_template"].value == expected
    (folder / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    assert plan_conversion(folder, "f16").metadata["tokenizer.chat_template"].value == "{{ 'é' }}"


def test_time_markers_are_read(folder: Path) -> None:
    assert plan_conversion(folder, "f16").metadata["moss_audio.time_markers"].value is True
    change_json(folder / "processor_config.json", {"enable_time_marker": False})
    assert plan_conversion(folder, "f16").metadata["moss_audio.time_markers"].value is False
