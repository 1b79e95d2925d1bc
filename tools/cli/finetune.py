"""`auricle finetune`: training on conversations, with the authors' names of the options where they mean the same."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ...kernels.errors import AuricleError
from .app import app, print_json


class ExtraError(AuricleError):
    """What an extra of the package brings is not installed."""


class Part(StrEnum):
    """What --freeze leaves as it is."""

    encoder = "encoder"
    adapters = "adapters"
    decoder = "decoder"


def _option(name: str, help: str, **more: Any) -> Any:
    """An option under both spellings, `--model-dir` and `--model_dir`."""
    names = [f"--{name.replace('_', '-')}", f"--{name}"] if "_" in name else [f"--{name}"]
    return typer.Option(*names, help=help, **more)


@app.command()
def finetune(
    model_dir: Annotated[Path, _option("model_dir", "The checkpoint folder to start from.")],
    data_path: Annotated[Path, _option("data_path", "Conversations to learn from, JSONL.")],
    output_dir: Annotated[Path, _option("output_dir", "Folder for the result, the curves and what --resume needs.")],
    eval_data_path: Annotated[Path | None, _option("eval_data_path", "Conversations to measure on, JSONL.")] = None,
    prompt_default: Annotated[str, _option("prompt_default", "What is asked of clips without a text.")] = "",
    max_len: Annotated[int, _option("max_len", "Tokens of a conversation; what is cut is said.", min=16)] = 8192,
    use_lora: Annotated[bool, _option("use_lora", "Train low-rank adapters of the decoder's matrices only.")] = False,
    lora_rank: Annotated[int, _option("lora_rank", "Rank of the adapters.", min=1)] = 16,
    lora_alpha: Annotated[float, _option("lora_alpha", "Their scale times the rank.")] = 32.0,
    lora_on_audio_encoder: Annotated[
        bool, _option("lora_on_audio_encoder", "Adapters in the encoder's attention, too.")
    ] = False,
    lora_on_adapters: Annotated[
        bool, _option("lora_on_adapters", "Adapters in the audio adapter and mergers, too.")
    ] = False,
    freeze: Annotated[list[Part] | None, _option("freeze", "A part to leave as it is; may be repeated.")] = None,
    learning_rate: Annotated[float, _option("learning_rate", "At its highest; it falls to 0.")] = 1e-4,
    weight_decay: Annotated[float, _option("weight_decay", "Of matrices.")] = 0.0,
    max_grad_norm: Annotated[float, _option("max_grad_norm", "Larger gradients are shortened to it.")] = 1.0,
    warmup_steps: Annotated[int, _option("warmup_steps", "Steps in which the rate rises.", min=0)] = 20,
    num_train_epochs: Annotated[float, _option("num_train_epochs", "Passes over the data.")] = 3.0,
    max_minutes: Annotated[float | None, _option("max_minutes", "End the run, rate and all, by then.")] = None,
    per_device_train_batch_size: Annotated[
        int, _option("per_device_train_batch_size", "Conversations at a time.", min=1)
    ] = 4,
    gradient_accumulation_steps: Annotated[int, _option("gradient_accumulation_steps", "Batches a step.", min=1)] = 1,
    gradient_checkpointing: Annotated[
        bool, _option("gradient_checkpointing", "Less memory, a third more work.")
    ] = False,
    logging_steps: Annotated[int, _option("logging_steps", "Steps from one loss to the next.", min=1)] = 10,
    eval_steps: Annotated[int, _option("eval_steps", "Steps from one measurement to the next.", min=1)] = 200,
    eval_samples: Annotated[int, _option("eval_samples", "Conversations answered for the error rate.", min=0)] = 32,
    eval_new_tokens: Annotated[int, _option("eval_new_tokens", "The longest answer there.", min=1)] = 64,
    save_minutes: Annotated[float, _option("save_minutes", "Minutes from one checkpoint to the next.")] = 5.0,
    workers: Annotated[int, _option("workers", "Processes that read audio ahead, 0 for none.", min=0)] = 1,
    device: Annotated[str, _option("device", "cpu or cuda.")] = "cpu",
    seed: Annotated[int, _option("seed", "Of the order of the data and of new weights.")] = 0,
    resume: Annotated[bool, _option("resume", "Go on from the checkpoint in --output-dir.")] = False,
    as_json: Annotated[bool, _option("json", "A summary in JSON on stdout.")] = False,
) -> None:
    """Train a checkpoint on conversations about audio: all of it, parts, or LoRA adapters.

    The result is a checkpoint folder, or the folder of an adapter; `auricle convert` takes either. Needs the extra
    [finetune]. Losses and error rates go to curves.csv, and to curves.png where matplotlib is installed.
    """
    options = dict(locals())
    as_json = options.pop("as_json")
    try:
        from ..finetune.tune import Task
        from ..finetune.tune import finetune as run
    except ImportError as error:
        raise ExtraError(f"training needs {error.name}: pip install 'auricle[finetune]'") from None

    options["freeze"] = tuple(part.value for part in freeze or ())
    folder = run(Task(**options))
    if as_json:
        print_json({"output_dir": str(folder), "curves": str(folder / "curves.csv")})
