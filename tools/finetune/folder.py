"""Checkpoint folders in the Hugging Face layout: a codec and a model from one, and weights into one.

Knows the files; the model's maths is the oracle's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...convert.checkpoint import CONFIG
from ...convert.documents import read_document
from ...convert.hf import find_audio_ids, read_processor
from ...convert.hyperparameters import read_tied
from ...convert.names.moss_audio import ARCHITECTURE, AUDIO_TOKENS, TENSORS
from ...convert.names.table import rename
from ...convert.vocabulary import read_vocabulary
from ...engine.gguf import open_gguf
from ...engine.models.moss_audio import MAX_WINDOW
from ...engine.outputs import copy_file, disk_errors, replacing
from ...engine.prompts import SpecialIds
from ...engine.tokenizer import Tokenizer
from ...kernels.dequantize import dequantize
from ...kernels.errors import AuricleError
from ..oracle.model import MossAudio, open_world, read_tensor
from .batches import Codec, make_codec

WEIGHTS = "model.safetensors"
MAX_VOCABULARY = 1 << 22
SMALL_FILES = (".json", ".txt", ".jinja", ".model")


class FolderError(AuricleError):
    """A checkpoint folder lacks something that training needs."""


def read_codec(folder: Path, time_markers: bool | None = None) -> Codec:
    """Tokenizer, ids and window of a checkpoint; time markers as its processor_config.json says unless given.

    Raises FolderError, ConversionError or PromptError for files that are missing or wrong.
    """
    config = read_document(folder / CONFIG)
    if config is None:
        raise FolderError(f"{folder} has no {CONFIG}; give the folder of a Hugging Face checkpoint")
    processor = read_processor(folder)
    key = "language_config.vocab_size" if config.look_up("language_config.vocab_size") is not None else "vocab_size"
    n_vocab = config.require(key, int, within=(1, MAX_VOCABULARY))
    audio = find_audio_ids(processor, config, n_vocab)
    vocabulary = read_vocabulary(folder, n_vocab, {text: audio[key] for key, _, text in AUDIO_TOKENS})
    metadata = {key: typed.value for key, typed in vocabulary.metadata().items()}
    metadata |= {f"{ARCHITECTURE}.{key}": token_id for key, token_id in audio.items()}
    tokenizer = Tokenizer.from_metadata(metadata)
    end_id = tokenizer.id_of("<|im_end|>")
    if end_id is None:
        raise FolderError(f"{folder}: the tokenizer has no <|im_end|>; training needs it to end answers")
    special = SpecialIds(audio["audio_token_id"], audio["audio_start_id"], audio["audio_end_id"])
    if time_markers is None:
        time_markers = processor.get("enable_time_marker", bool, True)
    window = 2 * config.get("audio_config.n_window", int, 200, within=(1, MAX_WINDOW))
    return make_codec(tokenizer, special, end_id, time_markers=time_markers, window=window)


def read_model(folder: Path) -> MossAudio:
    """The model of a checkpoint folder with its weights in float32, to be trained.

    Raises ConversionError as `open_world` does.
    """
    with open_world(folder) as checkpoint:
        model = MossAudio(checkpoint.config.values)
        if read_tied(checkpoint.config):
            model.lm_head.weight = model.language_model.embed_tokens.weight
        wanted = checkpoint.tensors.keys() & model.state_dict().keys()
        if is_tied(model):
            wanted -= {"lm_head.weight"}
        _assign(model, {name: read_tensor(checkpoint, name) for name in wanted}, folder)
    return model


def read_gguf_weights(model: MossAudio, path: Path) -> None:
    """Weights of a GGUF file into a model of the same shape, as float32. Raises FolderError or GGUFError."""
    weights = {}
    with open_gguf(path) as file:
        for name in model.state_dict():
            renamed = rename(name, TENSORS)
            info = file.tensors.get(renamed[0]) if renamed else None
            if info is None:
                raise FolderError(f"{path} lacks {renamed[0] if renamed else name}: it is of another model")
            values = dequantize(file.data(info.name), info.format).reshape(info.shape)
            weights[name] = torch.from_numpy(values.astype(np.float32))
    _assign(model, weights, path)


def _assign(model: MossAudio, weights: dict[str, Tensor], where: Path) -> None:
    """All of them, or FolderError. A tied head has no name in the file."""
    wanted = model.state_dict()
    if is_tied(model) and "language_model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["language_model.embed_tokens.weight"]
    wrong = sorted(weights.keys() ^ wanted.keys())
    wrong += [name for name in weights.keys() & wanted.keys() if weights[name].shape != wanted[name].shape]
    if wrong:
        raise FolderError(
            f"{where}: {wrong[0]} and {len(wrong) - 1} more tensors are not those that config.json asks for"
        )
    model.load_state_dict(weights)


def is_tied(model: MossAudio) -> bool:
    """Whether the embedding serves as head, too."""
    return model.lm_head.weight is model.language_model.embed_tokens.weight


def small_files(folder: Path) -> list[str]:
    """The files of a checkpoint folder but its weights."""
    return [p.name for p in folder.iterdir() if p.is_file() and p.suffix in SMALL_FILES and "safetensors" not in p.name]


def copy_files(source: Path, target: Path) -> None:
    """Everything of a checkpoint folder but its weights. Raises FolderError or OutputError."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in small_files(source):
            copy_file(source / name, target / name)
    except OSError as error:
        raise FolderError(f"can't copy {source} to {target}: {error.strerror or error}") from None


def write_weights(folder: Path, model: MossAudio) -> None:
    """model.safetensors, float32, complete or not at all; the names are the checkpoint's. Raises FolderError or
    OutputError."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if is_tied(model):
        del weights["lm_head.weight"]
    path = folder / WEIGHTS
    try:
        with replacing(path) as part, disk_errors(path):
            save_file(weights, part.path, metadata={"format": "pt"})
    except SafetensorError as error:  # which a full disk is, too
        raise FolderError(f"cannot write {path}: {error}; make room or choose another") from None
