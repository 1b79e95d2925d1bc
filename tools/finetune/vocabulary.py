"""A small byte-level BPE tokenizer with Qwen's layout: merges learnt from given texts, and the files of a checkpoint.

Ids: the 256 bytes, one id a merge, the special tokens. Knows no model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from ...engine.tokenizer import QWEN2_PATTERN
from ..sample import SPECIAL_TOKENS, byte_symbols

N_BYTES = 256


def split_words(texts: Iterable[str]) -> list[str]:
    """The pieces that merges never cross, as the model's pre-tokeniser cuts them."""
    splitter = Split(Regex(QWEN2_PATTERN), "isolated")
    return [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]


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


def special_ids(n_merge: int) -> dict[str, int]:
    """{token: id} of what the tokenizer files define; the audio token and its two marks stand between, unnamed."""
    return {token: N_BYTES + n_merge + at for at, token in enumerate(SPECIAL_TOKENS) if token}


def audio_ids(n_merge: int) -> dict[str, int]:
    """The three ids that processor_config.json names."""
    first = N_BYTES + n_merge + SPECIAL_TOKENS.index(None)
    return {"audio_token_id": first, "audio_start_id": first + 1, "audio_end_id": first + 2}


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
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    write_json(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(directory / "added_tokens.json", specials)
    write_json(directory / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
