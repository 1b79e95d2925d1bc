"""Fine-tunes a checkpoint on conversations: all of it, parts of it, or LoRA adapters. Knows no command line."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...engine.outputs import check_outputs
from ...kernels.errors import AuricleError
from ..oracle.model import MossAudio
from .batches import Codec, collate
from .conversations import Conversations, ConversationSource
from .curves import CURVE_FILES, draw_curves
from .folder import WEIGHTS, copy_files, read_codec, read_model, small_files, write_weights
from .greedy import continue_greedily, count_errors
from .loader import given, load
from .lora import LORA_FILES, add_lora, write_lora
from .model import Trainee, to_tensors
from .train import RUN_FILE, Run, Settings

LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_on_audio_encoder", "lora_on_adapters")
SAME_WHEN_RESUMED = ("use_lora", *LORA_OPTIONS, "freeze", "max_len", "seed", "per_device_train_batch_size")
SAME_WHEN_RESUMED += ("gradient_accumulation_steps",)
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

    Raises TaskError, FolderError, ConversationError, AudioError, TrainingError or OutputError.
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
    options = {f"--{name.replace('_', '-')}": str(getattr(task, name)) for name in SAME_WHEN_RESUMED}
    run = Run(trainee, make_settings(task, source.n_batches), task.output_dir, options)
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
    """Raises TaskError for options that make no sense, and makes the output folder."""
    for option, fits, expected in (
        ("learning_rate", task.learning_rate > 0, "above 0"),
        ("weight_decay", task.weight_decay >= 0, "0 or more"),
        ("max_grad_norm", task.max_grad_norm >= 0, "0 (no limit) or more"),
        ("num_train_epochs", task.num_train_epochs > 0, "above 0"),
        ("max_minutes", task.max_minutes is None or task.max_minutes > 0, "above 0"),
        ("save_minutes", task.save_minutes > 0, "above 0"),
        ("lora_alpha", task.lora_alpha > 0, "above 0"),
    ):
        if not fits:
            raise TaskError(f"--{option.replace('_', '-')} is {getattr(task, option)}; it must be {expected}")
    unknown = set(task.freeze) - PARTS.keys()
    if unknown:
        raise TaskError(f"--freeze {sorted(unknown)[0]}: the parts are {', '.join(PARTS)}")
    if not PARTS.keys() - set(task.freeze):
        raise TaskError("--freeze names all parts: nothing is left to train")
    if task.use_lora and task.freeze:
        raise TaskError("--freeze goes with training of all parameters; LoRA leaves the model's own alone")
    for option in LORA_OPTIONS:
        if not task.use_lora and getattr(task, option) != getattr(Task, option):
            raise TaskError(f"--{option.replace('_', '-')} goes with --use-lora: add it, or leave the option out")
    if task.device != "cpu" and not torch.cuda.is_available():
        raise TaskError(f"--device {task.device}: this PyTorch sees no GPU; leave the option out")
    _check_output(task)


def _check_output(task: Task) -> None:
    """Before hours of work, not after."""
    if task.output_dir.resolve() == task.model_dir.resolve():
        raise TaskError(f"--output-dir {task.output_dir} is the model's own folder; choose another")
    if (task.output_dir / RUN_FILE).exists() and not task.resume:
        raise TaskError(f"{task.output_dir} holds a run already: --resume it, or choose another folder")
    try:
        task.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=task.output_dir):
            pass
    except OSError as error:
        raise TaskError(f"can't write into {task.output_dir}: {error.strerror or error}; choose another") from None
    small = small_files(task.model_dir) if task.model_dir.is_dir() else ()
    own = (RUN_FILE, *CURVE_FILES, *(LORA_FILES if task.use_lora else (WEIGHTS, *small)))
    check_outputs([task.output_dir / name for name in own], [task.model_dir, task.data_path, task.eval_data_path])


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
        rate = {"validation_wer": self._error_rate(trainee)} if self.n_answered else {}
        return {"validation_loss": total / max(weight, 1), **rate}

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
    if data.report:
        print(data.report, file=sys.stderr)
    return Validator(data, task.per_device_train_batch_size, task.eval_new_tokens, task.eval_samples)
