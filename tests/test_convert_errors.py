"""Checkpoints that cannot be converted: each is refused before anything is written, with a line that says why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auricle.convert.checkpoint import ConversionError, open_checkpoint
from auricle.convert.hf import convert, plan_conversion
from auricle.kernels.errors import AuricleError
from checkpoints import WEIGHTS, change_json, change_tensors, copy_checkpoint, read_tensors

CONFIG = "config.json"
Change = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "sample")


def refuse(folder: Path, message: str, type_name: str = "f16") -> str:
    with pytest.raises(ConversionError, match=message) as caught:
        plan_conversion(folder, type_name)
    return str(caught.value)


def config(**changes: Any) -> Change:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return lambda folder: change_json(folder / CONFIG, dotted)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return lambda folder: change_tensors(folder, change)


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def truncate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-100])


def lengthen(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + bytes(10))


def list_shards(*names: str) -> Change:
    def change(folder: Path) -> None:
        weight_map = {tensor: names[i % len(names)] for i, tensor in enumerate(read_tensors(folder))}
        (folder / WEIGHTS).rename(folder / names[0])
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def text_index(content: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def duplicate_shard(folder: Path) -> None:
    list_shards("a.safetensors")(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    change_json(index, {"weight_map": json.loads(index.read_text())["weight_map"] | {"x": "b.safetensors"}})


def two_ids(folder: Path) -> None:
    change_json(folder / "added_tokens.json", {"<think>": 3})


HEAD, EMBED = "lm_head.weight", "language_model.embed_tokens.weight"

REFUSED: dict[str, tuple[Change, str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (without(CONFIG), r"has no config\.json"),
    "config is no JSON": (text(CONFIG, "{"), r"config\.json is not JSON"),
    "config is a list": (text(CONFIG, "[1]"), "holds a list"),
    "no weights": (without(WEIGHTS), r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    "missing shard": (list_shards("a.safetensors", "b.safetensors"), r"lacks shards .*: b\.safetensors; fetch"),
    "shard elsewhere": (list_shards("a.safetensors", "../b.safetensors"), r"lists '\.\./b\.safetensors'"),
    "nameless shard": (list_shards("a.safetensors", ""), "lists '': a shard is a .safetensors file"),
    "shard of a control character": (list_shards("a.safetensors", "b\x1b[2J.safetensors"), r"lists 'b\\x1b\[2J"),
    "shard with a null byte": (list_shards("a.safetensors", "b\0.safetensors"), r"lists 'b\\x00"),
    "shard of a long name": (list_shards("a.safetensors", "b" * 5000 + ".safetensors"), "lists 'b*…': a shard"),
    "many missing shards": (list_shards("a.safetensors", *(f"{n}.safetensors" for n in range(9))), "and 6 more; fetch"),
    "weight map of numbers": (text_index({"weight_map": {"a": 1}}), "lists 1: a shard is"),
    "weight map is a list": (text_index({"weight_map": ["a"]}), r"weight_map = \['a'\]: it must be an object"),
    "no weight map": (text_index({}), "lacks weight_map"),
    "tensor in two shards": (duplicate_shard, r"is in both a\.safetensors and b\.safetensors"),
    "truncated shard": (truncate, r"is truncated: its header asks for \d+ bytes, it has \d+"),
    "bytes at the end": (lengthen, "10 bytes after its last tensor"),
    "shard is text": (text(WEIGHTS, "version https://git-lfs"), "is no whole safetensors file"),
    "float64": (tensors(lambda t: t.update({HEAD: t[HEAD].double()})), "lm_head.weight is stored as F64"),
    "wrong shape": (
        tensors(lambda t: t.update({"lm_head.weight": t[HEAD][:, :-1].contiguous()})),
        r"lm_head\.weight has shape \[512, 63\], config\.json asks for \[512, 64\]",
    ),
    "vocabulary and embedding disagree": (
        config(language_config__vocab_size=600),
        r"embed_tokens\.weight has shape \[512, 64\], config\.json asks for \[600, 64\].*; 1 more tensors differ",
    ),
    "another model": (config(model_type="qwen3", architectures=["Qwen3ForCausalLM"]), "model_type 'qwen3'.*only"),
    "another class": (config(architectures=["WhisperModel"]), "WhisperModel.*only moss_audio"),
    "nameless": (config(model_type=None, architectures=None), "model_type None"),
    "window": (config(audio_config__n_window=50), "n_window = 50: a window of 100 frames is no multiple of 8"),
    "tap out of range": (config(audio_config__deepstack_encoder_layer_indexes=[0, 1, 4]), "layers 0 to 3"),
    "tap below zero": (config(audio_config__deepstack_encoder_layer_indexes=[-1, 1, 2]), "layers 0 to 3"),
    "tap twice": (config(audio_config__deepstack_encoder_layer_indexes=[1, 1, 2]), "tapped only once"),
    "key missing": (config(language_config__head_dim=None), r"lacks language_config\.head_dim"),
    "section missing": (config(audio_config=None), r"lacks audio_config\.num_mel_bins"),
    "key of another kind": (config(adapter_hidden_size="32"), "adapter_hidden_size = '32': .*whole number"),
    "epsilon of zero": (config(audio_config__layer_norm_eps=0), "layer_norm_eps = 0: it must be a positive number"),
    "odd group": (config(language_config__num_key_value_heads=3), "no multiple of .*num_key_value_heads = 3"),
    "a billion layers": (config(language_config__num_hidden_layers=10**9), "has only 1.. tensors"),
    "other activation": (config(audio_config__activation_function="relu"), "activation_function = 'relu'"),
    "scaled rotation": (config(language_config__rope_scaling={"rope_type": "yarn"}), "rope_type = 'yarn'"),
    "tied is no bool": (config(tie_word_embeddings="no"), "tie_word_embeddings = 'no'"),
    "no tokenizer": (without("vocab.json"), r"looked for vocab\.json with merges\.txt, and for tokenizer\.json"),
    "no merges": (without("merges.txt"), r"looked for vocab\.json with merges\.txt, and for tokenizer\.json"),
    "foreign tokenizer": (
        lambda folder: (folder / "vocab.json").rename(folder / "tokenizer.json"),
        "holds no BPE",
    ),
    "token beyond the vocabulary": (
        lambda folder: change_json(folder / "added_tokens.json", {"<late>": 512}),
        "token '<late>' has the id 512: the embedding has rows 0 to 511",
    ),
    "two tokens for an id": (
        lambda folder: change_json(folder / "vocab.json", {"twin": 5}),
        "two tokens have the id 5: '&' and 'twin'",
    ),
    "two ids for a token": (two_ids, "token '<think>' has two ids: 3 and 326"),
    "placeholder on a plain token": (
        lambda folder: change_json(folder / "processor_config.json", {"audio_token_id": 5}),
        r"two tokens have the id 5: '&' and '<\|AUDIO\|>'",
    ),
    "placeholder beyond the vocabulary": (
        lambda folder: change_json(folder / "processor_config.json", {"audio_token_id": 512}),
        r"audio_token_id = 512 is no row of the embedding \(0 to 511\)",
    ),
    "no placeholder": (
        lambda folder: change_json(folder / "processor_config.json", {"audio_token_id": None}),
        "lack audio_token_id, and the usual 151654 is no row",
    ),
    "merge of nothing": (
        lambda folder: (folder / "merges.txt").write_text("#version: 0.2\na b\nq zz\n"),
        r"merge [01] \('.*'\) does not join two tokens",
    ),
    "a digit too many": (
        lambda folder: change_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {}}}),
        "lists {} as added token '999",
    ),
    "an added token that is a text": (
        lambda folder: change_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"9": "x"}}),
        "lists 'x' as added token '9'",
    ),
    "an added token without a text": (
        lambda folder: change_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": 3}}}),
        "added token 9 says content = 3: it must be a text",
    ),
    "half a character": (
        lambda folder: (folder / "added_tokens.json").write_text(r'{"\ud800": 500}'),
        "half a character",
    ),
    "an id of 5,000 digits": (
        lambda folder: (folder / "added_tokens.json").write_text('{"a": ' + "9" * 5000 + "}"),
        "is not JSON .a number of 5000 digits",
    ),
    "an id of 99 digits": (
        lambda folder: (folder / "added_tokens.json").write_text('{"a": ' + "9" * 99 + "}"),
        "token 'a' has the id a number of 329 bits",
    ),
    "a rotation that is a list": (config(language_config__rope_scaling=[1]), r"rope_scaling = \[1\]: it must be"),
    "other front end": (
        lambda folder: change_json(folder / "processor_config.json", {"mel_config.mel_hop_length": 128}),
        "mel_hop_length = 128",
    ),
    "other spectrogram": (
        lambda folder: change_json(folder / "processor_config.json", {"mel_config.mel_dim": 80}),
        "mel_dim = 80",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_line(folder: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(folder)
    assert "\n" not in refuse(folder, message)


def test_missing_and_surplus_tensors_are_listed(folder: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        for n in range(3):
            del t[f"language_model.layers.{n}.mlp.up_proj.weight"]
        del t["audio_encoder.conv2.bias"]
        t["language_model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)
        t["extra"] = torch.zeros(1)

    change_tensors(folder, change)
    first, missing, surplus = refuse(folder, "nothing was written").split("\n")
    assert str(folder) in first
    assert missing == "missing (4): audio_encoder.conv2.bias, language_model.layers.{0-2}.mlp.up_proj.weight"
    assert surplus == "surplus (2): extra, language_model.layers.3.mlp.up_proj.weight"


def test_head_must_be_there_unless_tied(folder: Path) -> None:
    change_tensors(folder, lambda t: t.pop(HEAD))
    assert re.search(r"missing \(1\): lm_head\.weight\nsurplus \(0\): none", refuse(folder, "missing"))
    change_json(folder / CONFIG, {"tie_word_embeddings": True})
    plan_conversion(folder, "f16")


def test_unknown_type_lists_the_known(folder: Path) -> None:
    refuse(folder, "there is no type 'q9': choose one of q4_k, .*, q8_0, f16, bf16, f32", "q9")


def fails_while_writing(folder: Path, out: Path, type_name: str, message: str) -> None:
    out.mkdir()
    with pytest.raises(ConversionError, match=message):
        convert(plan_conversion(folder, type_name), out / "a.gguf")
    assert not list(out.iterdir())


@pytest.mark.parametrize("type_name", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_weights_that_are_not_finite(folder: Path, tmp_path: Path, type_name: str, value: str) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t[EMBED][300, 7] = float(value)

    change_tensors(folder, change)
    message = rf"tensor {EMBED}\[300, 7\] is {value}"
    fails_while_writing(folder, tmp_path / "out", type_name, message)


@pytest.mark.parametrize(("name", "position"), [(EMBED, (511, 63)), ("audio_encoder.conv2.weight", (2, 1, 0, 2))])
def test_weights_beyond_f16(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, position: tuple[int, ...]
) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t[name][position] = -70144.0

    change_tensors(folder, change)
    monkeypatch.setattr("auricle.convert.slabs.SLAB_WEIGHTS", 1 << 10)
    message = re.escape(f"tensor {name}{list(position)} is -70144.0, beyond F16's range: use --type bf16")
    fails_while_writing(folder, tmp_path / "out", "f16", message)
    convert(plan_conversion(folder, "bf16"), tmp_path / "b.gguf")


def test_source_that_shrinks_meanwhile(folder: Path, tmp_path: Path) -> None:
    plan = plan_conversion(folder, "f32")
    truncate(folder)
    with pytest.raises(ConversionError, match="it was cut short while being read"):
        convert(plan, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("a.gguf*"))


STRANGE = [None, "x", "", -1, 0, 1.5, True, [], [1], ["a"], [None], {}, {"a": 1}, 10**30, float("nan"), 2**31]


@pytest.mark.parametrize("name", [CONFIG, "processor_config.json", "tokenizer_config.json", "generation_config.json"])
def test_strange_values_never_crash(folder: Path, name: str) -> None:
    original = json.loads((folder / name).read_text())
    sections = {key: value for key, value in original.items() if isinstance(value, dict)}
    keys = [*original, *(f"{section}.{key}" for section, value in sections.items() for key in value)]
    for i, key in enumerate(keys):
        for value in STRANGE[i % 3 :: 3]:
            change_json(folder / name, {key: value})
            with suppress(AuricleError):
                plan_conversion(folder, "q8_0")
        (folder / name).write_text(json.dumps(original))


def small_shard() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    (folder / CONFIG).write_text("{}")
    return folder


@given(at=st.integers(0, len(small_shard()) - 1), byte=st.integers(0, 255))
def test_damaged_headers_never_crash(shard_folder: Path, at: int, byte: int) -> None:
    raw = bytearray(small_shard())
    raw[at] = byte
    (shard_folder / WEIGHTS).write_bytes(raw)
    try:
        checkpoint = open_checkpoint(shard_folder)
    except ConversionError:
        return
    for tensor in checkpoint.tensors.values():
        assert checkpoint.read_bytes(tensor.name, 0, tensor.n_rows).nbytes == tensor.nbytes
    checkpoint.close()


def test_every_truncation_is_noticed(shard_folder: Path) -> None:
    raw = small_shard()
    (shard_folder / WEIGHTS).write_bytes(raw)
    assert list(open_checkpoint(shard_folder).tensors) == ["a", "b"]
    for length in range(len(raw)):
        (shard_folder / WEIGHTS).write_bytes(raw[:length])
        with pytest.raises(ConversionError):
            open_checkpoint(shard_folder)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(("raw", "message"), [
    (b"\xff" * 8 + b"{}", "no whole safetensors file"),
    ((2).to_bytes(8, "little") + b"[]", "header that is a list"),
    ((16).to_bytes(8, "little") + b'{"a": 1, "a": 2}', "'a' is in the header twice"),
    ((9999).to_bytes(8, "little") + b"[" * 9999, "header is not JSON"),
    (header(a=5), "tensor a has a damaged header entry: "),
    (header(a={"dtype": "F4", "shape": [], "data_offsets": [0, 1]}), "unknown dtype 'F4'"),
    (header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}), "tensor a has a damaged header entry"),
    (header(a={"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}), "says dtype = .*: it must be a text"),
    (header(a={"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}), "says shape = 2: it must be a list of whole"),
    (header(a={"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}), "tensor a has a damaged header entry"),
    (header(a={"dtype": "F32", "shape": [10**99] * 2, "data_offsets": [0, 4]}), "tensor a has a damaged header entry"),
    (header(**{"a\x1b[2J": {}}), r"a tensor of the name 'a\\x1b\[2J'"),
    (header(**{"a" * 5000: {}}), "a tensor of the name 'aaa"),
    (header(**{"a\ud800": {}}), "half a character"),
    (header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}), "needs 8 bytes, its header gives it 4"),
    (header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}), "starts at byte"),
    (header(a={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**126]}), "damaged header entry"),
])  # fmt: skip
def test_nonsense_in_a_header(shard_folder: Path, raw: bytes, message: str) -> None:
    (shard_folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(ConversionError, match=message):
        open_checkpoint(shard_folder)
