"""Adapter folders as peft writes them, and what merging one means, done by hand on a checkpoint's own tensors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from checkpoints import change_tensors, read_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DECODER = r"language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
ENCODER = r"audio_encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc[12])"
ADAPTERS = r"(audio_adapter|deepstack_audio_merger_list\.\d+)\.(gate|up|down)_proj"
EVERYTHING = rf"{DECODER}|{ENCODER}|{ADAPTERS}|lm_head|audio_encoder\.(stem_proj|out_proj)"


def write_adapter(
    folder: Path,
    checkpoint: Path,
    targets: str = DECODER,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    size: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A folder with a random pair for each linear map of a checkpoint whose module name matches `targets`."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, tensor in read_tensors(checkpoint).items():
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and re.fullmatch(targets, module):
            n_out, n_in = tensor.shape
            a, b = (torch.randn(shape, generator=generator) for shape in ((rank, n_in), (n_out, rank)))
            key = f"base_model.model.{module}.lora_"
            tensors[f"{key}A.weight"] = (a / math.sqrt(n_in)).to(dtype)
            tensors[f"{key}B.weight"] = (b * size / math.sqrt(rank)).to(dtype)
    assert tensors, targets
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    usual = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": targets}
    usual |= {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "lora_dropout": 0.0}
    (folder / CONFIG).write_text(json.dumps(usual | {"modules_to_save": None, "init_lora_weights": True} | config))
    return folder


def merge_into(checkpoint: Path, adapter: Path, scale: float = 1.0) -> None:
    """Adds scale * alpha / r * B A to a checkpoint, which becomes float32 throughout."""
    config, pairs = json.loads((adapter / CONFIG).read_text()), load_file(adapter / WEIGHTS)
    factor = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.float()
        for name, a in pairs.items():
            if ".lora_A." in name:
                b, base = pairs[name.replace("_A.", "_B.")], name.removeprefix("base_model.model.")
                key = base.replace(".lora_A", "")
                change = b.double() @ a.double() * factor * scale
                tensors[key] = (tensors[key].double() + change).float()

    change_tensors(checkpoint, change)
