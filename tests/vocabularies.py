"""Tokenizer metadata for several test files: a small trained one, the golden checkpoint's and the real vocabulary."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from auricle.engine.tokenizer import QWEN2_PATTERN
from support import SHARED

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't care. You're right, I'll see, we've been there.",
    "Transcribe the audio. Describe this audio. What do you hear? <think> is a tag; # include <x> ## heading #endif",
    "Größe, façade, naïve, Äpfel, пример текста, 音频转写 音频, 日本語のテキスト, 한국어 텍스트",
    "🙂🙃 1 2 33 444\n\n\tindented",
] * 3
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@cache
def trained() -> Any:
    """A byte-level BPE of at most 420 tokens, trained here by the `tokenizers` package."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def small_metadata(n_pads: int = 8) -> dict[str, Any]:
    """The trained vocabulary as GGUF metadata: BPE tokens, then `SPECIALS`, then fillers."""
    model = json.loads(trained().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return _metadata(tokens, merges, dict(enumerate(SPECIALS, len(tokens))), len(tokens) + len(SPECIALS) + n_pads)


@cache
def golden_metadata() -> dict[str, Any]:
    """The golden checkpoint's tokenizer files as a converter would write them."""
    folder = SHARED / "golden/a/checkpoint"
    vocab, added = (json.loads((folder / f"{name}.json").read_text()) for name in ("vocab", "added_tokens"))
    lines = (folder / "merges.txt").read_text().splitlines()
    config, processor = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "processor_config"))
    metadata = _metadata(
        sorted(vocab, key=vocab.get),
        [line for line in lines if not line.startswith("#version")],
        {i: token for token, i in added.items()},
        config["vocab_size"],
    )
    ids = {f"moss_audio.{key}": processor[key] for key in ("audio_token_id", "audio_start_id", "audio_end_id")}
    return metadata | {"general.architecture": "moss_audio"} | ids


@cache
def qwen2_metadata() -> dict[str, Any]:
    """The metadata of the real vocabulary: 151,936 tokens."""
    from auricle.engine.gguf import open_gguf

    with open_gguf(SHARED / "data/tokenizer/ggml-vocab-qwen2.gguf") as file:
        return dict(file.metadata)


def _metadata(tokens: list[str], merges: list[str], added: dict[int, str], n_vocab: int) -> dict[str, Any]:
    """`<think>` and `</think>` are ordinary added tokens in Qwen's files, the others control tokens."""
    types = [NORMAL] * len(tokens) + [UNUSED] * (n_vocab - len(tokens))
    tokens = tokens + [added.get(i, f"[PAD{i}]") for i in range(len(tokens), n_vocab)]
    for i, token in added.items():
        types[i] = USER_DEFINED if "think" in token else CONTROL
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
