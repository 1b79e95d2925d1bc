"""The readers of files: models, adapters, importance matrices, checkpoint folders, reports, conversations.

A target is its seeds and what is done with bytes made from them. Whatever is not an AuricleError in one line is a
finding.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from auricle.convert.budget import FORMAT, VERSION, read_report
from auricle.convert.checkpoint import read_header
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.importance import ColumnSums, ImportanceMatrix, read_matrix, write_matrix
from auricle.convert.lora import CONFIG, plan_lora
from auricle.engine.gguf import GGUFFile, Typed, ValueType, open_gguf
from auricle.engine.gguf_cursor import NUMBERS
from auricle.engine.gguf_header import read_header as read_gguf_header
from auricle.engine.lora import read_loras
from auricle.engine.models.moss_audio import read_moss_audio
from auricle.engine.tokenizer import Tokenizer
from auricle.kernels.errors import AuricleError
from auricle.tools.conversations import read_conversations
from auricle.tools.describe import describe_file
from auricle.tools.sample import SampleShape, write_checkpoint

SHAPE = SampleShape(
    enc_n_layer=1, enc_d_model=32, enc_n_head=2, enc_d_ff=32, enc_d_out=32, d_adapter=32, d_model=32, d_ff=32,
    d_head=16, n_layer=1, taps=(0,), n_inject=1,
)  # fmt: skip
TEXT = "Transcribe <|im_start|>the audio. 42 音频\n"
Check = Callable[[bytes], None]


def refused_in_one_line(read: Check) -> Check:
    """`read`, where an error of ours in one line (or in three: two lists of names) is as good as success."""

    def check(data: bytes) -> None:
        try:
            read(bytes(data))
        except AuricleError as error:
            lines = str(error).split("\n")
        else:
            return
        assert len(lines) == 1 or (len(lines) == 3 and "nothing was written" in lines[0]), lines
        assert max(map(len, lines)) < 4000, lines

    return check


@cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="auricle-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def checkpoint() -> Path:
    return write_checkpoint(scratch() / "checkpoint", SHAPE, n_shard=1)


@cache
def model() -> Path:
    convert(plan_conversion(checkpoint(), "f16"), scratch() / "model.gguf")
    return scratch() / "model.gguf"


def put(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


# Models.


def read_model(data: bytes) -> None:
    with open_gguf(put("fuzzed.gguf", data)) as file:
        describe_file(file)
        for name in file.tensors:
            file.data(name)
        read_moss_audio(file)
        Tokenizer.from_metadata(file.metadata).encode(TEXT)


def read_keys(data: bytes) -> None:
    """A model with some keys that have other values: each is two bytes for the key, one for the kind, and the rest."""
    header = read_gguf_header(model())
    names = [key for key in header.types if key.startswith(("moss_audio.", "general."))]
    header.types.update({names[at % len(names)]: value for at, value in changes(data)})
    with GGUFFile(model(), [header]) as file:
        describe_file(file)
        read_moss_audio(file)


def read_tokenizer(data: bytes) -> None:
    with open_gguf(model()) as file:
        metadata = dict(file.metadata)
    if data[:1] >= b"\x80":
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": np.zeros(SHAPE.n_vocab, np.float32)}
    names = [*TOKENIZER_KEYS, *(f"moss_audio.{key}" for key in ("audio_token_id", "audio_start_id", "audio_end_id"))]
    for at, typed in changes(data[1:]):
        name, value = names[at % len(names)], typed.value
        old = metadata.get(name)
        if isinstance(old, list) and isinstance(value, list):  # a few other tokens or merges
            start = at // len(names) % len(old)
            value = old[:start] + value + old[start + len(value) :]
        metadata[name] = value
    tokenizer = Tokenizer.from_metadata(metadata)
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.decode(range(tokenizer.n_tokens))


TOKENIZER_KEYS = [
    f"tokenizer.ggml.{key}"
    for key in ("tokens", "merges", "token_type", "pre", "scores", "add_space_prefix", "precompiled_charsmap", "model")
]
KINDS = [kind for kind in ValueType if kind is not ValueType.ARRAY]


def changes(data: bytes) -> Iterator[tuple[int, Typed]]:
    """(a number that picks a key, a value) for each line of `data`."""
    for line in data.split(b"\n")[:8]:
        if len(line) < 4:
            continue
        kind = KINDS[(line[2] & 0x7F) % len(KINDS)]
        value = Typed(kind, line[3:].decode("utf-8", "replace"))
        is_list = line[2] & 0x80
        if kind is ValueType.STRING and is_list:
            value = Typed(ValueType.ARRAY, value.value.split(","), kind)
        elif kind is not ValueType.STRING:
            dtype = NUMBERS[kind]
            raw = line[3:].ljust(dtype.itemsize, b"\0")
            raw = raw.translate(bytes(n & 1 for n in range(256))) if kind is ValueType.BOOL else raw
            numbers = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
            value = Typed(ValueType.ARRAY, numbers, kind) if is_list else Typed(kind, numbers[0].item())
        yield int.from_bytes(line[:2], "little"), value


def some_changes() -> Iterator[bytes]:
    for at in range(0, 64, 5):
        for kind in range(len(KINDS)):
            yield b"\x00" + b"\n".join(bytes([at, 1, flag | kind]) + b"7\0\0\0\0\0\0\x40a,b" for flag in (0, 0x80))
            yield b"\x80" + bytes([at, 0, 0x80 | kind]) + bytes(range(16, 64))


# What goes with a model.


def read_adapter(data: bytes) -> None:
    with open_gguf(model()) as file:
        shapes = {name: info.shape for name, info in file.tensors.items()}
    read_loras([put("fuzzed-lora.gguf", data)], "moss_audio", shapes, model())


def adapter_folder() -> Path:
    from safetensors.numpy import save_file

    folder = scratch() / "adapter"
    if not folder.exists():
        folder.mkdir()
        key = "base_model.model.language_model.layers.0.self_attn.q_proj.lora_"
        n_out = SHAPE.n_head * SHAPE.d_head
        shapes = {"A": (2, SHAPE.d_model), "B": (n_out, 2)}
        pair = {f"{key}{half}.weight": np.ones(shape, np.float32) for half, shape in shapes.items()}
        save_file(pair, folder / "adapter_model.safetensors")
        (folder / CONFIG).write_bytes(next(adapter_configs()))
    return folder


def adapter_configs() -> Iterator[bytes]:
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False, "rank_pattern": {}}
    yield json.dumps(usual | {"init_lora_weights": True, "modules_to_save": None, "alpha_pattern": {}}).encode()
    yield json.dumps(usual | {"r": [2], "lora_alpha": 10**90, "rank_pattern": {"a": 1}}).encode()


def adapters() -> Iterator[bytes]:
    (adapter_folder() / CONFIG).write_bytes(next(adapter_configs()))  # whatever has been tried there
    convert(plan_lora(adapter_folder()), scratch() / "lora.gguf")
    yield (scratch() / "lora.gguf").read_bytes()


def read_adapter_config(data: bytes) -> None:
    (adapter_folder() / CONFIG).write_bytes(data)
    plan_lora(adapter_folder(), base=model())


def matrices() -> Iterator[bytes]:
    sums = {"enc.blk.0.attn.q.weight": ColumnSums(np.ones(32), 3), "adapter.up.weight": ColumnSums(np.ones(32), 5)}
    write_matrix(scratch() / "matrix.gguf", ImportanceMatrix(sums, ("a.wav",)))
    yield (scratch() / "matrix.gguf").read_bytes()


def read_importances(data: bytes) -> None:
    read_matrix(put("fuzzed-matrix.gguf", data)).importance()


def reports() -> Iterator[bytes]:
    tensors = [{"name": "llm.blk.0.attn.q.weight", "shape": [32, 32], "types": {"Q8_0": {"bytes": 9, "kl": 0.5}}}]
    about = {"name": "m", "fingerprint": "0"}
    yield json.dumps({"format": FORMAT, "version": VERSION, "model": about, "tensors": tensors}).encode()


# Checkpoints and conversations.

SMALL = ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json", "vocab.json")
SMALL += ("merges.txt", "added_tokens.json", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja")


def small_files() -> Iterator[bytes]:
    for at, name in enumerate(SMALL):
        path = checkpoint() / name
        yield bytes([at]) + (path.read_bytes() if path.exists() else b"{}")


def read_checkpoint(data: bytes) -> None:
    """The first byte says which of the small files the rest is."""
    path = checkpoint() / SMALL[data[0] % len(SMALL) if data else 0]
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data[1:])
    try:
        plan_conversion(checkpoint(), "q8_0")
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def shards() -> Iterator[bytes]:
    entries = {"__metadata__": {"format": "pt"}, "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    text = json.dumps(entries | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}).encode()
    yield len(text).to_bytes(8, "little") + text + bytes(16)


def talks() -> Iterator[bytes]:
    question = {"role": "user", "message_type": "audio", "content": "a.wav"}
    text = {"role": "user", "message_type": "text", "content": "What?"}
    answer = {"role": "assistant", "message_type": "text", "content": "one"}
    line = json.dumps({"conversation": [question, text, answer]})
    yield f"{line}\n\n{line}\n".encode()


TARGETS: dict[str, tuple[Callable[[], Iterator[bytes]], Check]] = {
    "gguf": (lambda: iter([model().read_bytes()]), refused_in_one_line(read_model)),
    "keys": (some_changes, refused_in_one_line(read_keys)),
    "tokenizer": (some_changes, refused_in_one_line(read_tokenizer)),
    "lora": (adapters, refused_in_one_line(read_adapter)),
    "lora_config": (adapter_configs, refused_in_one_line(read_adapter_config)),
    "imatrix": (matrices, refused_in_one_line(read_importances)),
    "report": (reports, refused_in_one_line(lambda data: read_report(put("report.json", data)))),
    "checkpoint": (small_files, refused_in_one_line(read_checkpoint)),
    "shard": (shards, refused_in_one_line(lambda data: read_header(put("a.safetensors", data)))),
    "conversations": (talks, refused_in_one_line(lambda data: read_conversations(put("talks.jsonl", data)))),
}
