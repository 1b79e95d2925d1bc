"""The random checkpoints: their bytes, their layout, their tokenizer, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from auricle.tools.oracle.model import load_oracle
from auricle.tools.sample import SampleError, SampleShape, main, write_checkpoint
from support import SHARED, needs_shared

GOLDEN = SHARED / "golden" / "a" / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sample") / "model", seed=7)


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(shard) for shard in directory.glob("*.safetensors")]
    return {name: value for shard in shards for name, value in shard.items()}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_seed_decides_every_byte(tmp_path):
    one, same, other = (files_of(write_checkpoint(tmp_path / n, seed=s)) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {name for name in one if name.endswith(".safetensors")}


@needs_shared
def test_the_folder_has_the_layout_of_the_golden_checkpoint(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    assert set(files_of(directory)) == set(files_of(GOLDEN))
    for name in ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (directory, GOLDEN))
        assert ours.keys() == theirs.keys()
        for section in ("audio_config", "language_config"):
            assert ours.get(section, {}).keys() == theirs.get(section, {}).keys()
    layer = re.compile(r"\.\d+\.")
    ours, theirs = ({layer.sub(".N.", name) for name in read_weights(folder)} for folder in (directory, GOLDEN))
    assert ours == theirs
    vocabularies = (json.loads((folder / "vocab.json").read_text(encoding="utf-8")) for folder in (directory, GOLDEN))
    assert len({tuple(vocabulary)[:256] for vocabulary in vocabularies}) == 1


@pytest.mark.parametrize("n_shard", [1, 2, 5])
def test_weights_do_not_depend_on_the_number_of_shards(tmp_path, checkpoint, n_shard):
    directory = write_checkpoint(tmp_path / "model", seed=7, n_shard=n_shard)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) == n_shard
    index = directory / "model.safetensors.index.json"
    assert index.exists() == (n_shard > 1)
    weights, expected = read_weights(directory), read_weights(checkpoint)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    if n_shard > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"].keys() == weights.keys()
        assert content["metadata"]["total_size"] == 2 * sum(value.numel() for value in weights.values())
        for shard in shards:
            listed = {name for name, file in content["weight_map"].items() if file == shard}
            assert load_file(directory / shard).keys() == listed
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert load_oracle(directory).model.lm_head.weight.dtype == torch.float32


def test_the_tokenizer_files_make_a_tokenizer(checkpoint):
    directory = checkpoint
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    specials = json.loads((directory / "added_tokens.json").read_text())
    assert sorted(vocabulary.values()) == list(range(320))
    assert [vocabulary[digit] for digit in "0123456789"] == list(range(15, 25))
    assert specials == {"<|endoftext|>": 320, "<|im_start|>": 321, "<|im_end|>": 322, "<think>": 326, "</think>": 327}
    assert json.loads((directory / "processor_config.json").read_text())["audio_token_id"] == 323
    assert re.search("^#+ #", (directory / "merges.txt").read_text(encoding="utf-8"), re.MULTILINE)

    tokenizer = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "Transcribe the audio. 请转写这段音频。 ½ naïve\x00\n\U0001f600"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("Transcribe the audio").tokens == ["Transcribe", "Ġthe", "Ġaudio"]
    assert len(ids) < len(text.encode()) * 0.7


def test_a_small_vocabulary_has_fewer_merges(tmp_path):
    directory = write_checkpoint(tmp_path / "model", SampleShape(n_vocab=264))
    assert len(json.loads((directory / "vocab.json").read_text(encoding="utf-8"))) == 256
    assert (directory / "merges.txt").read_text() == "#version: 0.2\n"
    with pytest.raises(AssertionError, match="n_vocab"):
        SampleShape(n_vocab=263)


def test_files_that_are_there_are_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(SampleError, match="not an empty folder: choose another or remove it first") as caught:
        write_checkpoint(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]
    (tmp_path / "empty").mkdir()
    assert (write_checkpoint(tmp_path / "empty") / "config.json").is_file()


def test_nothing_is_left_of_an_interrupted_checkpoint(tmp_path, monkeypatch):
    def fail(*_args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("auricle.tools.sample.make_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    target = tmp_path / "deep" / "model"
    command = [sys.executable, "-m", "auricle.tools.sample", str(target), "--seed", "5"]
    subprocess.run(command, check=True, timeout=120)
    assert files_of(target) == files_of(write_checkpoint(tmp_path / "again", seed=5))
    assert main([str(target)]) == 1
    assert capsys.readouterr().err == f"error: {target} is not an empty folder: choose another or remove it first\n"
