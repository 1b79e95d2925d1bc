"""Fine-tunes a checkpoint on conversations: all of it, parts of it, or LoRA adapters. Knows no command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...kernels.errors import AuricleError
from ..oracle.model import MossAudio
from .batches import Codec, collate
from .conversations import Conversations, ConversationSource
from .curves import draw_curves
from .folder import copy_files, read_codec, read_model, write_weights
from .greedy import continue_greedily, count_errors
from .loader import given, load
from .lora import add_lora, write_lora
from .model import Trainee, to_tensors
from .train import Run, Settings

PARTS = {"encoder": "audio_encoder.", "adapters": ("audio_adapter.", "deepstack_audio_merger_list."), "decoder": None}


@dataclass(frozen=True)
class Task:
    """What to train on what; the fields are the options of `auricle finetune`."""

    model_dir: Path
    data_path: Path
    output_dir: Path
    eval_data_path: Path | None = None
    prompt_default: str = ""
    max_len: int = 8192
    use_lora: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_on_audio_encoder: bool = False
    lora_on_adapters: bool = False
    freeze: tuple[str, ...] = ()
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 20
    num_train_epochs: float = 3.0
    max_minutes: float | None = None
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    eval_steps: int = 200
    eval_samples: int = 32
    eval_new_tokens: int = 64
    save_minutes: float = 5.0
    workers: int = 1
    device: str = "cpu"
    seed: int = 0
    resume: bool = False


class TaskError(AuricleError):
    """Options that don't go together."""


def finetune(task: Task) -> Path:
    """Trains and writes `output_dir`: a checkpoint folder, or the folder of a LoRA adapter; curves and a checkpoint to
    resume from beside it. Returns it.

    Raises TaskError, FolderError, ConversationError, AudioError, LoraError or TrainingError.
    """
    check(task)
    torch.manual_seed(task.seed)
    codec = read_codec(task.model_dir)
    data = Conversations(task.data_path, codec, task.max_len, task.prompt_default)
    if data.report:
        print(data.report, file=sys.stderr)
    model = read_model(task.model_dir)
    wrapped = choose_trained(model, task)
    trainee = Trainee(model).to(task.device)
    trainee.checkpointing = task.gradient_checkpointing
    source = ConversationSource(data, task.per_device_train_batch_size, task.seed)
    run = Run(trainee, make_settings(task, source.n_batches), task.output_dir)
    if task.resume:
        run.resume()
    run.go(partial(load, partial(given, source), n_workers=task.workers), _open_validator(task, codec))
    if wrapped is None:
        copy_files(task.model_dir, task.output_dir)
        write_weights(task.output_dir, model)
    else:
        write_lora(wrapped, task.output_dir)
    draw_curves(run.curves.path)
    return task.output_dir


def check(task: Task) -> None:
    """Raises TaskError."""
    unknown = set(task.freeze) - PARTS.keys()
    if unknown:
        raise TaskError(f"--freeze {sorted(unknown)[0]}: the parts are {', '.join(PARTS)}")
    if task.use_lora and task.freeze:
        raise TaskError("--freeze goes with training of all parameters; LoRA leaves the model's own alone")
    if task.device != "cpu" and not torch.cuda.is_available():
        raise TaskError(f"--device {task.device}: this PyTorch sees no GPU; leave the option out")
    if (task.output_dir / "checkpoint.pt").exists() and not task.resume:
        raise TaskError(f"{task.output_dir} holds a run already: --resume it, or choose another folder")


def choose_trained(model: MossAudio, task: Task) -> object | None:
    """Marks the parameters that train; returns peft's wrapper when those are adapters."""
    if task.use_lora:
        on = {"on_encoder": task.lora_on_audio_encoder, "on_adapters": task.lora_on_adapters}
        return add_lora(model, task.lora_rank, task.lora_alpha, **on)
    for name, value in model.named_parameters():
        value.requires_grad_(part_of(name) not in task.freeze)
    return None


def part_of(name: str) -> str:
    """Which of PARTS a tensor belongs to."""
    return next((part for part, prefix in PARTS.items() if prefix and name.startswith(prefix)), "decoder")


def make_settings(task: Task, n_batches: int) -> Settings:
    """The schedule of a run over `n_batches` an epoch."""
    steps = max(1, round(task.num_train_epochs * n_batches / task.gradient_accumulation_steps))
    return Settings(
        learning_rate=task.learning_rate,
        steps=steps,
        minutes=task.max_minutes,
        warmup_steps=min(task.warmup_steps, max(1, steps // 10)),
        decay_from=0.0,
        weight_decay=task.weight_decay,
        clip=task.max_grad_norm,
        ctc_weight=0.0,
        accumulate=task.gradient_accumulation_steps,
        save_minutes=task.save_minutes,
        validate_steps=task.eval_steps,
        log_steps=task.logging_steps,
    )


@dataclass
class Validator:
    """Loss over the conversations of a file, and word error rate of their last answers."""

    data: Conversations
    n_rows: int
    n_new: int
    n_answered: int

    def __call__(self, trainee: Trainee) -> dict[str, float]:
        total, weight = 0.0, 0
        for start in range(0, len(self.data), self.n_rows):
            rows = [self.data.row(at) for at in range(start, min(start + self.n_rows, len(self.data)))]
            batch = collate(rows)
            n_learnt = int((batch.labels >= 0).sum())
            with torch.inference_mode():
                total += n_learnt * float(trainee(to_tensors(batch, trainee.device)).answer)
            weight += n_learnt
        return {"validation_loss": total / max(weight, 1), "validation_wer": self._error_rate(trainee)}

    def _error_rate(self, trainee: Trainee) -> float:
        """In percent of the words of the right answers, case and marks included."""
        n_errors = n_words = 0
        decode = self.data.codec.tokenizer.decode
        for start in range(0, min(len(self.data), self.n_answered), self.n_rows):
            rows = [self.data.row(at) for at in range(start, min(start + self.n_rows, len(self.data), self.n_answered))]
            wanted = [decode(row.take_last_answer()).split() for row in rows]
            heard = [decode(answer).split() for answer in continue_greedily(trainee, rows, self.n_new)]
            n_errors += sum(count_errors(*pair) for pair in zip(heard, wanted, strict=True))
            n_words += sum(map(len, wanted))
        return 100 * n_errors / max(n_words, 1)


def _open_validator(task: Task, codec: Codec) -> Validator | None:
    if task.eval_data_path is None:
        return None
    data = Conversations(task.eval_data_path, codec, task.max_len, task.prompt_default)
    return Validator(data, task.per_device_train_batch_size, task.eval_new_tokens, task.eval_samples)
