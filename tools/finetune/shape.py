"""The demo model: its dimensions, its words and the files around its weights.

About 6.7 million parameters, widths all multiples of 256 so that every quantised type fits. Knows no training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from ...engine.prompts import TASKS, default_prompt
from ...engine.tokenizer import QWEN2_PATTERN
from ..sample import N_BYTES, SPECIAL_TOKENS, learn_merges, special_ids, write_json, write_tokenizer
from .digits import PROMPTS, WORDS

N_VOCAB = 544
TAPS = (0, 1, 2)


def demo_merges() -> list[tuple[str, str]]:
    """Merges that make each word of the prompts and answers one token, as far as the vocabulary has room."""
    texts = [default_prompt(""), *PROMPTS.values(), *(f"{word} {word}" for word in WORDS), "none", TASKS["describe"]]
    words = [word for word in split_words(texts) if not word.startswith(("[", "]", "<", "|"))]
    return learn_merges(words, N_VOCAB - N_BYTES - len(SPECIAL_TOKENS))


def split_words(texts: Iterable[str]) -> list[str]:
    """The pieces that merges never cross, as the model's pre-tokeniser cuts them."""
    splitter = Split(Regex(QWEN2_PATTERN), "isolated")
    return [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]


def audio_ids(n_merge: int) -> dict[str, int]:
    """The three ids that processor_config.json names."""
    first = N_BYTES + n_merge + SPECIAL_TOKENS.index(None)
    return {"audio_token_id": first, "audio_start_id": first + 1, "audio_end_id": first + 2}


def demo_config(n_merge: int) -> dict[str, Any]:
    """config.json in the form of the published checkpoints."""
    specials = special_ids(n_merge)
    ids = {"eos_token_id": specials["<|im_end|>"], "bos_token_id": specials["<|endoftext|>"]}
    return {
        "architectures": ["MossAudioModel"],
        "model_type": "moss_audio",
        "audio_config": {
            "d_model": 256,
            "output_dim": 256,
            "num_mel_bins": 128,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 1024,
            "downsample_rate": 8,
            "downsample_hidden_size": 16,
            "encoder_attention_window_size": 100,
            "max_source_positions": 1500,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "activation_function": "gelu",
            "layer_norm_eps": 1e-5,
            "n_window": 200,
            "conv_chunksize": 64,
            "deepstack_encoder_layer_indexes": list(TAPS),
        },
        "language_config": {
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 512,
            "vocab_size": N_VOCAB,
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_bias": False,
            **ids,
        },
        "adapter_hidden_size": 256,
        "deepstack_num_inject_layers": len(TAPS),
        "ignore_index": -100,
        "tie_word_embeddings": False,
        **ids,
        "vocab_size": N_VOCAB,
        "torch_dtype": "float32",
    }


def write_demo_files(directory: Path) -> dict[str, Any]:
    """Everything of a checkpoint but its weights; returns config.json's content."""
    merges = demo_merges()
    config = demo_config(len(merges))
    mel = {"mel_sr": 16000, "mel_dim": 128, "mel_n_fft": 400, "mel_hop_length": 160}
    end, pad = config["eos_token_id"], config["bos_token_id"]
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    write_json(
        directory / "processor_config.json", {**audio_ids(len(merges)), "enable_time_marker": True, "mel_config": mel}
    )
    write_json(
        directory / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False}
    )
    write_tokenizer(directory, merges)
    return config
