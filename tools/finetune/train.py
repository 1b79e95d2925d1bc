"""The training loop: AdamW, warm-up and linear decay to zero, checkpoints that a run resumes from, curves.

Knows a trainee, numbered batches and a clock; knows neither what the data are nor which parameters train.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...engine.outputs import disk_errors, replacing
from ...kernels.errors import AuricleError
from .batches import Batch
from .curves import CURVE_FILES, Curves
from .model import Trainee, to_tensors

RUN_FILE = "checkpoint.pt"


class TrainingError(AuricleError):
    """The run cannot start or go on."""


@dataclass(frozen=True)
class Settings:
    """How a run goes. With `minutes` the schedule follows the clock and ends in time on a busy machine; with `steps`
    it is the same on any machine; with both, whichever is further on."""

    learning_rate: float = 1e-3
    steps: int | None = None
    minutes: float | None = None  # of training, over all resumed runs
    warmup_steps: int = 200
    decay_from: float = 0.1  # share of the run after which the rate falls
    weight_decay: float = 0.02
    clip: float = 1.0  # of the gradient's norm; 0: none
    sound_weight: float = 1.0
    place_weight: float = 1.0
    aim_weight: float = 0.5
    accumulate: int = 1  # batches a step
    save_minutes: float = 5.0
    validate_steps: int = 1000
    log_steps: int = 50

    def progress(self, step: int, minutes: float) -> float:
        """0 at the start, 1 at the end."""
        parts = [step / self.steps] if self.steps else []
        parts += [minutes / self.minutes] if self.minutes else []
        return min(max(parts), 1.0)

    def rate(self, step: int, progress: float) -> float:
        decay = min(1.0, (1 - progress) / (1 - self.decay_from))
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1)) * decay


Validate = Callable[[Trainee], dict[str, float]]


class Run:
    """A trainee with its optimiser and how far it has come."""

    def __init__(
        self, trainee: Trainee, settings: Settings, folder: Path, options: Mapping[str, str] | None = None
    ) -> None:
        """`options`: what else must be the same when the run is resumed, by the names that a user knows."""
        if not settings.steps and not settings.minutes:
            raise TrainingError("give --steps or --minutes: a run needs an end")
        self.trainee, self.settings, self.folder = trainee, settings, folder
        self.options = dict(options or {})
        self.step, self.minutes = 0, 0.0
        trained = [p for p in trainee.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)
        self.curves = Curves(folder / CURVE_FILES[0])

    @property
    def path(self) -> Path:
        return self.folder / RUN_FILE

    def save(self) -> None:
        """Weights that train, optimiser and place, complete and on the disk, or not at all. Raises TrainingError or
        OutputError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = {name for name, value in self.trainee.named_parameters() if value.requires_grad}
        state = {
            "weights": {name: value for name, value in self.trainee.state_dict().items() if name in names},
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
            "random": torch.get_rng_state(),
            "options": self.options,
        }
        try:
            with replacing(self.path) as part, disk_errors(self.path):
                torch.save(state, part.path)
        except RuntimeError as error:  # which a full disk is, too
            raise TrainingError(f"cannot write {self.path}: {error}; make room and --resume") from None

    def resume(self) -> None:
        """Go on from the folder's checkpoint. Raises TrainingError when there is none, or one of another model."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(f"can't resume from {self.path}: {error}") from None
        for name, value in state["options"].items():
            if self.options.get(name, value) != value:
                raise TrainingError(f"{self.path} is of a run with {name} {value}, not {self.options[name]}")
        names = {name for name, value in self.trainee.named_parameters() if value.requires_grad}
        if names != state["weights"].keys():
            raise TrainingError(f"{self.path} is of another model or of another choice of trained parameters")
        self.trainee.load_state_dict(state["weights"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.minutes = state["step"], state["minutes"]
        torch.set_rng_state(state["random"])

    def go(self, load: Callable[[int], Iterator[Batch]], validate: Validate | None = None) -> None:
        """Train to the end of the schedule. `load(n)` gives batches from number n on, `accumulate` a step."""
        self.curves.forget_after(self.step)  # a run that was killed before its first checkpoint may have left some
        batches = load(self.step * self.settings.accumulate)
        saved = self.minutes
        self.trainee.train()
        while (progress := self.settings.progress(self.step, self.minutes)) < 1:
            began = time.monotonic()
            rate = self.settings.rate(self.step, progress)
            losses = self._update([next(batches) for _ in range(self.settings.accumulate)], rate)
            self.step += 1
            self.minutes += (time.monotonic() - began) / 60
            self._record(losses, rate, validate)
            if self.minutes - saved > self.settings.save_minutes:
                saved = self.minutes
                self.save()
        self.save()
        if self.step % self.settings.log_steps:
            self.curves.write(self.step, self.minutes, self.settings.rate(self.step, progress))
        if validate and self.step % self.settings.validate_steps:
            self._validate(validate)

    def _record(self, losses: dict[str, float], rate: float, validate: Validate | None) -> None:
        self.curves.add(losses)
        if self.step % self.settings.log_steps == 0:
            self.curves.write(self.step, self.minutes, rate)
        if validate and self.step % self.settings.validate_steps == 0:
            self._validate(validate)

    def _update(self, batches: Sequence[Batch], rate: float) -> dict[str, float]:
        """One step of the optimiser; returns the mean losses and the gradient's size before clipping."""
        told = dict.fromkeys(("loss", "sounds", "places", "aims"), 0.0)
        weights = [float(batch.weights.sum()) for batch in batches]
        for batch, weight in zip(batches, weights, strict=True):
            losses = self.trainee(to_tensors(batch, self.trainee.device))
            share, part = weight / max(sum(weights), 1e-6), 1 / len(batches)
            besides = self.settings.sound_weight * losses.sounds + self.settings.place_weight * losses.places
            besides = besides + self.settings.aim_weight * losses.aims
            total = share * losses.answer + part * besides
            if total.requires_grad:  # not of a batch without audio when only the encoder trains
                total.backward()
            for name, weight, loss in zip(told, (share, part, part, part), losses, strict=True):
                told[name] += weight * float(loss.detach())
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        size = float(nn.utils.clip_grad_norm_(trained, self.settings.clip or math.inf))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {**told, "gradient": size}

    def _validate(self, validate: Validate) -> None:
        began = time.monotonic()
        self.trainee.eval()
        results: dict[str, Any] = validate(self.trainee)
        self.trainee.train()
        self.minutes += (time.monotonic() - began) / 60
        self.curves.write_validation(self.step, self.minutes, results)
