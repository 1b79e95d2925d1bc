"""Small checkpoint folders for tests, and hands to damage or change them with."""

from __future__ import annotations

import atexit
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from auricle.convert.hf import convert, plan_conversion
from auricle.tools import sample
from auricle.tools.sample import SampleShape, tensor_shapes, write_checkpoint

SHAPE = SampleShape(
    enc_d_model=32, enc_n_head=2, enc_d_ff=64, enc_d_out=32, d_adapter=32, d_model=64, d_ff=96, d_head=32, n_layer=3
)
WEIGHTS = "model.safetensors"

# The table of the format's description, written out a second time: Hugging Face on the left.
RENAMES = (
    (r"^audio_encoder\.layers\.", "enc.blk."),
    (r"^audio_encoder\.layer_norm\.", "enc.norm."),
    (r"^audio_encoder\.", "enc."),
    (r"^audio_adapter\.", "adapter."),
    (r"^deepstack_audio_merger_list\.", "deepstack."),
    (r"^language_model\.embed_tokens\.", "llm.embed."),
    (r"^language_model\.norm\.", "llm.final_norm."),
    (r"^language_model\.layers\.", "llm.blk."),
    (r"^lm_head\.", "llm.lm_head."),
    (r"\.(self_attn_layer_norm|input_layernorm)\.", ".attn_norm."),
    (r"\.(final_layer_norm|post_attention_layernorm)\.", ".ffn_norm."),
    (r"\.self_attn\.out_proj\.", ".attn.o."),
    (r"\.self_attn\.([qkvo])_proj\.", r".attn.\1."),
    (r"\.self_attn\.([qk])_norm\.", r".attn.\1_norm."),
    (r"\.(fc[12])\.", r".ffn.\1."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".ffn.\1."),
    (r"\.(gate|up|down)_proj\.", r".\1."),
)


def gguf_name(name: str) -> str:
    """The published name of a Hugging Face tensor."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


@cache
def _template(shape: SampleShape) -> Path:
    scratch = Path(mkdtemp(prefix="auricle-test-"))
    atexit.register(shutil.rmtree, scratch)
    return write_checkpoint(scratch / "template", shape, n_shard=1)


def copy_checkpoint(folder: Path, shape: SampleShape = SHAPE) -> Path:
    """A fresh one-shard checkpoint of random weights at `folder`."""
    return Path(shutil.copytree(_template(shape), folder))


def change_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Set dotted keys of a JSON file; None takes a key away."""
    content = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        node = content
        for parent in parents:
            node = node[parent]
        if value is None:
            node.pop(key, None)
        else:
            node[key] = value
    path.write_text(json.dumps(content))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors package."""
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the single shard after `change` has had its way with {name: tensor}."""
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def sparse_checkpoint(folder: Path, shape: SampleShape) -> Path:
    """A checkpoint of any size whose weights are a hole in the file: zeros that take no room on the disk."""
    with patch.object(sample, "make_weights"), patch.object(sample, "_write_weights"):
        write_checkpoint(folder, shape)
    header, end = {}, 0
    for name, dims in tensor_shapes(shape):
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def build_f32(folder: Path, shape: SampleShape, seed: int) -> tuple[Path, Path]:
    """A random checkpoint in `folder`, and the F32 file made of it."""
    write_checkpoint(folder / "checkpoint", shape, seed=seed)
    convert(plan_conversion(folder / "checkpoint", "f32"), folder / "f32.gguf")
    return folder / "checkpoint", folder / "f32.gguf"
