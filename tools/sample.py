"""Makes a small random MOSS-Audio checkpoint in the Hugging Face layout, for demonstrations and tests.

The files are those of a published checkpoint (config, bf16 shards with their index, tokenizer, processor), every
dimension is free, and the weights are random but scaled so that activations stay near 1. Answers are nonsense. Names
and layout are written out here on purpose: nothing of `convert` or of the engine's models is used, so that what
reads such a checkpoint is tested against a second hand.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.outputs import replacing, write_text
from ..kernels.display import show
from ..kernels.errors import AuricleError
from .process import standard_streams

N_MERGE, N_BYTES = 64, 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", None, None, None, "<think>", "</think>")
"""In the order of their ids, after the last merge; None: the audio token and its two brackets, which the tokenizer
files of the published checkpoints do not define either."""

CORPUS = """Transcribe the audio. Transcribe the audio into sentence-level timestamps. Describe this audio.
What do you hear? You are a helpful assistant. What does the speaker say, and how does the voice sound?
system user assistant # ## ### one two three 请转写这段音频。 请描述这段音频。 Écoutez l'enregistrement."""
"""What the byte-pair merges are learnt from; with a merge that begins with `#`, which is no comment in merges.txt."""


class SampleError(AuricleError):
    """The checkpoint can't be written as asked."""


@dataclass(frozen=True)
class SampleShape:
    """Every dimension of a checkpoint; `enc_` marks the audio encoder, names without it the decoder."""

    enc_d_model: int = 128
    enc_n_layer: int = 4
    enc_n_head: int = 4
    enc_d_ff: int = 256
    enc_d_conv: int = 16  # channels of the convolutional stem
    enc_d_out: int = 128  # an output projection exists where this is not enc_d_model
    n_mels: int = 128
    n_window: int = 200  # half a window, in mel frames
    taps: tuple[int, ...] = (0, 1, 2)
    n_inject: int = 3
    d_adapter: int = 128
    d_model: int = 256
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2
    d_head: int = 128
    d_ff: int = 256
    n_vocab: int = 512  # rows of the embedding; ids past the last token are padding
    rope_theta: float = 1e6
    tied: bool = False

    def __post_init__(self) -> None:
        assert self.enc_d_model % self.enc_n_head == 0, f"{self.enc_d_model=} {self.enc_n_head=}"
        assert self.n_head % self.n_kv_head == 0, f"{self.n_head=} {self.n_kv_head=}"
        assert self.d_head % 2 == 0, f"{self.d_head=}"
        assert self.n_window % 4 == 0, f"{self.n_window=}"
        assert self.n_mels % 8 == 0, f"{self.n_mels=}"
        assert len(set(self.taps)) == len(self.taps), f"{self.taps=}"
        assert all(0 <= tap < self.enc_n_layer for tap in self.taps), f"{self.taps=} {self.enc_n_layer=}"
        assert self.n_vocab >= N_BYTES + len(SPECIAL_TOKENS), f"{self.n_vocab=}"

    @property
    def n_merger(self) -> int:
        return min(len(self.taps), self.n_inject)

    @property
    def n_merge(self) -> int:
        """Merges of the tokenizer: fewer in a vocabulary that is nearly filled by the single bytes."""
        return min(N_MERGE, self.n_vocab - N_BYTES - len(SPECIAL_TOKENS))

    @property
    def first_special_id(self) -> int:
        return N_BYTES + self.n_merge


def write_checkpoint(
    directory: str | Path, shape: SampleShape | None = None, seed: int = 0, *, n_shard: int = 2
) -> Path:
    """Write the checkpoint folder and return its path; the same shape, seed and shard count give the same bytes.

    One shard is written without an index, as the hub does. The folder appears complete or not at all.
    Raises SampleError when the folder holds files already or can't be written.
    """
    shape = shape or SampleShape()
    directory = Path(directory)
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise SampleError(f"{directory} is not an empty folder: choose another or remove it first")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.", suffix=".part") as scratch:
            unfinished = Path(scratch) / directory.name
            unfinished.mkdir()
            _write_configs(unfinished, shape)
            write_tokenizer(unfinished, learn_merges(cut_corpus(), shape.n_merge))
            _write_weights(unfinished, make_weights(shape, seed), n_shard)
            os.replace(unfinished, directory)
    except OSError as error:
        raise SampleError(f"can't write {directory}: {error.strerror or error}") from None
    return directory


def make_weights(shape: SampleShape, seed: int) -> dict[str, np.ndarray]:
    """Every tensor by its Hugging Face name, float32, not yet rounded to bf16.

    A matrix keeps 0.8 of the size of what it multiplies (0.53 before the logits), norms are near 1 and biases near 0,
    each with a spread of 0.1: a wrong, missing or swapped one of them shows.
    """
    rng = np.random.default_rng(seed)
    embedding = "language_model.embed_tokens.weight"
    weights = {}
    for name, dims in tensor_shapes(shape):
        noise = rng.standard_normal(dims, dtype=np.float32)
        fan_in = math.prod(dims[1:])
        if name.endswith(".bias"):
            weights[name] = 0.1 * noise
        elif len(dims) == 1:
            weights[name] = 1 + 0.1 * noise
        elif name == embedding and not shape.tied:
            weights[name] = noise
        else:
            gain = 0.53 if name in (embedding, "lm_head.weight") else 0.8
            weights[name] = np.float32(gain / math.sqrt(fan_in)) * noise
    return weights


def tensor_shapes(shape: SampleShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the checkpoint."""
    yield from _encoder_shapes(shape)
    adapters = ["audio_adapter", *(f"deepstack_audio_merger_list.{k}" for k in range(shape.n_merger))]
    for adapter in adapters:
        yield f"{adapter}.gate_proj.weight", (shape.d_adapter, shape.enc_d_out)
        yield f"{adapter}.up_proj.weight", (shape.d_adapter, shape.enc_d_out)
        yield f"{adapter}.down_proj.weight", (shape.d_model, shape.d_adapter)
    yield from _decoder_shapes(shape)


def _encoder_shapes(shape: SampleShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, d_ff, d_conv = shape.enc_d_model, shape.enc_d_ff, shape.enc_d_conv
    biased = {
        "conv1": (d_conv, 1, 3, 3),
        "conv2": (d_conv, d_conv, 3, 3),
        "conv3": (d_conv, d_conv, 3, 3),
        "stem_proj": (d, d_conv * (shape.n_mels // 8)),
        "layer_norm": (d,),
    }
    layer = {
        "self_attn_layer_norm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.v_proj": (d, d),
        "self_attn.out_proj": (d, d),
        "final_layer_norm": (d,),
        "fc1": (d_ff, d),
        "fc2": (d, d_ff),
    }
    for n in range(shape.enc_n_layer):
        biased |= {f"layers.{n}.{name}": dims for name, dims in layer.items()}
        yield f"audio_encoder.layers.{n}.self_attn.k_proj.weight", (d, d)
    for name, dims in biased.items():
        yield f"audio_encoder.{name}.weight", dims
        yield f"audio_encoder.{name}.bias", dims[:1]
    if shape.enc_d_out != d:
        yield "audio_encoder.out_proj.weight", (shape.enc_d_out, d)


def _decoder_shapes(shape: SampleShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, d_q, d_kv = shape.d_model, shape.n_head * shape.d_head, shape.n_kv_head * shape.d_head
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d_q, d),
        "self_attn.k_proj": (d_kv, d),
        "self_attn.v_proj": (d_kv, d),
        "self_attn.o_proj": (d, d_q),
        "self_attn.q_norm": (shape.d_head,),
        "self_attn.k_norm": (shape.d_head,),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (shape.d_ff, d),
        "mlp.up_proj": (shape.d_ff, d),
        "mlp.down_proj": (d, shape.d_ff),
    }
    yield "language_model.embed_tokens.weight", (shape.n_vocab, d)
    for n in range(shape.n_layer):
        for name, dims in layer.items():
            yield f"language_model.layers.{n}.{name}.weight", dims
    yield "language_model.norm.weight", (d,)
    if not shape.tied:
        yield "lm_head.weight", (shape.n_vocab, d)


def _write_weights(directory: Path, weights: dict[str, np.ndarray], n_shard: int) -> None:
    """Tensors are dealt out in turn, so that the parts of a layer lie in different shards, as they may on the hub."""
    import torch
    from safetensors.torch import save_file

    names = sorted(weights)
    files = ["model.safetensors"] if n_shard == 1 else []
    files = files or [f"model-{i + 1:05}-of-{n_shard:05}.safetensors" for i in range(n_shard)]
    for i, file in enumerate(files):
        shard = {name: torch.from_numpy(weights[name]).to(torch.bfloat16) for name in names[i::n_shard]}
        with replacing(directory / file) as part:
            save_file(shard, part.path, metadata={"format": "pt"})
    if n_shard > 1:
        total = sum(2 * weights[name].size for name in names)
        weight_map = {name: files[i % n_shard] for i, name in enumerate(names)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _write_configs(directory: Path, shape: SampleShape) -> None:
    first = shape.first_special_id
    ids = {"eos_token_id": first + 2, "bos_token_id": first}
    config = {
        "architectures": ["MossAudioModel"],
        "model_type": "moss_audio",
        "audio_config": _audio_config(shape),
        "language_config": _language_config(shape) | ids,
        "adapter_hidden_size": shape.d_adapter,
        "deepstack_num_inject_layers": shape.n_inject,
        "ignore_index": -100,
        "tie_word_embeddings": shape.tied,
        **ids,
        "vocab_size": shape.n_vocab,
        "torch_dtype": "bfloat16",
    }
    processor = {
        "audio_token_id": first + 3,
        "audio_start_id": first + 4,
        "audio_end_id": first + 5,
        "enable_time_marker": True,
        "mel_config": {"mel_sr": 16000, "mel_dim": shape.n_mels, "mel_n_fft": 400, "mel_hop_length": 160},
    }
    generation = {
        "eos_token_id": [first + 2, first],
        "pad_token_id": first,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    write_json(directory / "config.json", config)
    write_json(directory / "processor_config.json", processor)
    write_json(directory / "generation_config.json", generation)


def _audio_config(shape: SampleShape) -> dict[str, Any]:
    return {
        "d_model": shape.enc_d_model,
        "output_dim": shape.enc_d_out,
        "num_mel_bins": shape.n_mels,
        "encoder_layers": shape.enc_n_layer,
        "encoder_attention_heads": shape.enc_n_head,
        "encoder_ffn_dim": shape.enc_d_ff,
        "downsample_rate": 8,
        "downsample_hidden_size": shape.enc_d_conv,
        "encoder_attention_window_size": 100,
        "max_source_positions": 1500,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "layer_norm_eps": 1e-5,
        "n_window": shape.n_window,
        "conv_chunksize": 64,
        "deepstack_encoder_layer_indexes": list(shape.taps),
    }


def _language_config(shape: SampleShape) -> dict[str, Any]:
    return {
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": shape.tied,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "head_dim": shape.d_head,
        "intermediate_size": shape.d_ff,
        "vocab_size": shape.n_vocab,
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
    }


def byte_symbols() -> dict[int, str]:
    """Byte -> the character that stands for it, in the order of the ids 0..255: GPT-2's, so "0".."9" are 15..24.

    The printable bytes of Latin-1 come first and stand for themselves; the others are U+0100 onwards.
    """
    printable = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def cut_corpus() -> list[str]:
    """The pieces of the corpus that merges never cross."""
    return re.findall(r" ?[^\W\d]+|\d| ?[^\w\s]+|\s+", CORPUS)


def learn_merges(words: Sequence[str], n_merge: int) -> list[tuple[str, str]]:
    """At most `n_merge` merges, the most frequent pair first, until each word is one token; ties by the alphabet."""
    symbol = byte_symbols()
    pieces = [[symbol[byte] for byte in word.encode()] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < n_merge:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_join(piece, best) for piece in pieces]
    return merges


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def special_ids(n_merge: int) -> dict[str, int]:
    """{token: id} of what the tokenizer files define; the audio token and its two marks stand between, unnamed."""
    return {token: N_BYTES + n_merge + at for at, token in enumerate(SPECIAL_TOKENS) if token}


def write_tokenizer(directory: Path, merges: Sequence[tuple[str, str]]) -> None:
    """vocab.json, merges.txt, added_tokens.json and tokenizer_config.json, as on the hub."""
    tokens = [*byte_symbols().values(), *("".join(pair) for pair in merges)]
    specials = special_ids(len(merges))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 131072,
        "add_prefix_space": False,
        "errors": "replace",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {"content": token, **plain, "special": token.startswith("<|")} for token, i in specials.items()
        },
    }
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_text(directory / "merges.txt", "\n".join(lines) + "\n")
    write_json(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(directory / "added_tokens.json", specials)
    write_json(directory / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m auricle.tools.sample`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="auricle.tools.sample", description="Write a small random checkpoint.")
    parser.add_argument("directory", type=Path, help="folder to make; must not hold files yet")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    options = parser.parse_args(arguments)
    try:
        write_checkpoint(options.directory, seed=options.seed)
    except AuricleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote a small random checkpoint to {show(options.directory)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
