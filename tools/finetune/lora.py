"""LoRA adapters in a model's linear layers, by peft, and the folder that peft writes.

Hu et al., LoRA, 2021. Which layers: the decoder's seven projections; on demand the encoder's q, k and v as the authors
choose them, and the adapters between the two. Knows no data and no loop.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ...engine.outputs import copy_file, disk_errors
from .train import TrainingError

LORA_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")  # as peft calls them
DECODER = r"language_model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ENCODER = r"audio_encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"
ADAPTERS = r"(audio_adapter|deepstack_audio_merger_list\.\d+)\.(gate_proj|up_proj|down_proj)"


def add_lora(model: nn.Module, rank: int, alpha: float, *, on_encoder: bool = False, on_adapters: bool = False) -> Any:
    """Puts adapters into `model`, in place; only they train. Returns peft's model around it, which writes them.

    Raises TrainingError without peft and for a rank below 1.
    """
    if rank < 1:
        raise TrainingError(f"--lora-rank {rank}: must be 1 or more")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainingError("LoRA needs peft: pip install 'auricle[finetune]'") from None
    targets = [DECODER, *([ENCODER] if on_encoder else []), *([ADAPTERS] if on_adapters else [])]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="|".join(targets), bias="none")
    return get_peft_model(model, config)


def write_lora(wrapped: Any, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, which `auricle convert --lora` takes. Raises TrainingError or
    OutputError."""
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as scratch:
                wrapped.save_pretrained(scratch, safe_serialization=True, save_embedding_layers=False)
                for path in Path(scratch).iterdir():
                    copy_file(path, folder / path.name)
    except SafetensorError as error:  # which a full disk is, too
        raise TrainingError(f"cannot write {folder}: {error}; make room or choose another") from None
