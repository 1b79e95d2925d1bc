"""Trains the demo model on spoken digits: `python -m auricle.tools.finetune.demo --fsdd FOLDER --out FOLDER`.

The result is a checkpoint in the Hugging Face layout, OUT/model, which `auricle convert` takes; the curves are in
OUT/curves.csv. An interrupted run goes on with --resume.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...engine.mel import log_mel
from ...kernels.errors import AuricleError
from ..oracle.model import MossAudio
from ..process import standard_streams
from . import spectra
from .batches import Batch, Codec, Row, collate, count_audio_tokens
from .digits import MAX_WORDS, PROMPTS, Digits, Example
from .digits.grid import N_PLACES, N_SOUNDS, aims_of, on_grid, places_of, sounds_of
from .folder import read_codec, read_gguf_weights, write_weights
from .greedy import continue_greedily, count_errors
from .loader import load
from .model import Trainee, to_tensors
from .shape import write_demo_files
from .train import Run, Settings

CONV_GAIN = 4.0  # keeps the spread of a log-mel through GELU
N_HELD_OUT = 6  # synthetic voices kept for validation
TIMESTAMPS_WEIGHT = 0.5  # of a token; a stamped answer has ten times as many as a plain one
SPEECHLESS = 0.04  # of the clips
BEFORE_AUDIO = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER_AUDIO = "\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

_SHARES = {"timestamps": 0.5, "count": 0.15, "last": 0.15}  # of the clips; all are transcribed
_LONGEST = ((4800, 2), (12_800, 4), (22_400, 7))  # until so many clips are drawn, at most so many words


def make_row(codec: Codec, mel: np.ndarray, examples: list[Example], answered: bool = True) -> Row:
    """One clip and all its questions, each in a branch of its own."""
    row = Row(codec)
    row.text(BEFORE_AUDIO)
    sounds = sounds_of(examples[0], count_audio_tokens(mel.shape[1], codec.window))
    row.clip(mel, sounds, places_of(sounds))
    (bracket,) = codec.tokenizer.encode("[")
    for example in examples:
        row.branch()
        row.text(AFTER_AUDIO.format(prompt=example.prompt))
        if answered:
            opens = [token_id == bracket for token_id in codec.tokenizer.encode(example.answer)]
            weight = TIMESTAMPS_WEIGHT if example.prompt == PROMPTS["timestamps"] else 1.0
            row.answer(example.answer, weight, aims_of(example, opens, len(sounds)))
    return row


@dataclass
class DigitSource:
    """Batch number n of training, always the same for the same seed."""

    codec: Codec
    digits: Digits
    seed: int
    n_rows: int
    plain: float = 0.3  # share of the clips that are as recorded; the others are changed in many ways
    gently: bool = True  # short sequences first

    def __post_init__(self) -> None:
        self._log_mel = spectra.LogMel()

    def __call__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        rows = [self._draw_row(rng, number) for _ in range(self.n_rows)]
        return collate(sorted(rows, key=lambda row: len(row.ids)))

    def _draw_row(self, rng: np.random.Generator, number: int) -> Row:
        steps = _LONGEST if self.gently else ()
        longest = next((n for until, n in steps if number * self.n_rows < until), MAX_WORDS)
        n_words = 0 if rng.random() < SPEECHLESS else int(rng.integers(1, longest + 1))
        plain = rng.random() < self.plain
        example = self.digits.draw(rng, augment=not plain, task="transcribe", n_words=n_words)
        mel = self._log_mel(example.samples)
        if not plain:
            if rng.random() < 0.4:
                mel = spectra.warp_frequency(mel, np.exp(rng.uniform(np.log(0.88), np.log(1.14))))
            if rng.random() < 0.5:
                mel = spectra.expand(mel, np.exp(rng.uniform(np.log(0.8), np.log(1.8))))
            if rng.random() < 0.5:
                mel = spectra.mask(mel, rng)
        asked = [task for task, share in _SHARES.items() if rng.random() < share]
        example = on_grid(example)
        return make_row(self.codec, mel, [example, *(example.asked(task) for task in asked)])


def open_source(out: Path, fsdd: Path, voices: Path | None, seed: int, n_rows: int, **how: Any) -> DigitSource:
    """The source of training; some of the synthetic voices are left to the validator."""
    digits = Digits(fsdd, "train", voices)
    for name in sorted(digits.voices)[-N_HELD_OUT:]:
        del digits.voices[name]
    return DigitSource(read_codec(out / "model"), digits, seed, n_rows, **how)


@dataclass
class Validator:
    """Loss and digit error rate on recordings kept for validation; the rate on synthetic voices kept out."""

    codec: Codec
    known: list[Example]
    synthetic: list[Example]

    def __call__(self, trainee: Trainee) -> dict[str, float]:
        results = {"validation_loss": self._loss(trainee), "validation_wer": self.error_rate(trainee, self.known)}
        if self.synthetic:
            results["synthetic_wer"] = self.error_rate(trainee, self.synthetic)
        return results

    def _loss(self, trainee: Trainee) -> float:
        tasks = ("transcribe", "timestamps", "count", "last")
        rows = [
            make_row(self.codec, log_mel(example.samples), [on_grid(example).asked(task) for task in tasks])
            for example in self.known[:40]
        ]
        with torch.inference_mode():
            return float(trainee(to_tensors(collate(rows))).answer)

    def error_rate(self, trainee: Trainee, examples: list[Example]) -> float:
        """Errors a digit spoken, in percent."""
        rows = [make_row(self.codec, log_mel(example.samples), [example], answered=False) for example in examples]
        answers = continue_greedily(trainee, rows, 14)
        heard = [self.codec.tokenizer.decode(answer).split() for answer in answers]
        n_errors = sum(count_errors(words, example.words) for words, example in zip(heard, examples, strict=True))
        return 100 * n_errors / sum(len(example.words) for example in examples)


def open_validator(out: Path, fsdd: Path, voices: Path | None) -> Validator:
    digits = Digits(fsdd, "validation", voices)
    known = digits.fixed(60, seed=1)
    synthetic: list[Example] = []
    if digits.voices:
        digits.speakers = {name: digits.voices[name] for name in sorted(digits.voices)[-N_HELD_OUT:]}
        synthetic = digits.fixed(50, seed=2)
    return Validator(read_codec(out / "model"), known, synthetic)


def initialise(model: MossAudio) -> None:
    """Matrices near 1 / sqrt(width), smaller where a branch joins the residual stream, embeddings small beside both."""
    n_encoder, n_decoder = len(model.audio_encoder.layers), len(model.language_model.layers)
    joins = {"fc2": n_encoder, "out_proj": n_encoder, "o_proj": n_decoder}
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear):
            depth = n_decoder if kind == "down_proj" and "language_model" in name else joins.get(kind, 0.5)
            nn.init.normal_(module.weight, std=(module.in_features * 2 * depth) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(CONV_GAIN / module.weight[0].numel()) ** 0.5)
            nn.init.zeros_(module.bias)
    # The stem's part must not drown in the positions that are added to it, whose size is 0.7.
    stem = model.audio_encoder.stem_proj
    nn.init.normal_(stem.weight, std=stem.in_features**-0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)


def main(arguments: list[str] | None = None) -> int:
    options = _read_options(arguments)
    try:
        train_demo(options)
    except AuricleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train_demo(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    config = write_demo_files(options.out / "model")
    model = MossAudio(config)
    initialise(model)
    if options.start:
        read_gguf_weights(model, options.start)
    trainee = Trainee(model, N_SOUNDS, N_PLACES, options.dropout)
    settings = Settings(
        learning_rate=options.learning_rate,
        steps=options.steps,
        minutes=options.minutes,
        validate_steps=options.validate_steps,
    )
    run = Run(trainee, settings, options.out, {"--seed": str(options.seed), "--batch": str(options.batch)})
    if options.resume:
        run.resume()
    how = {"plain": options.plain, "gently": not options.start}
    source = partial(open_source, options.out, options.fsdd, options.voices, options.seed, options.batch, **how)
    ahead = partial(load, source, n_workers=options.workers)
    run.go(ahead, open_validator(options.out, options.fsdd, options.voices))
    write_weights(options.out / "model", model)


def _read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="auricle.tools.finetune.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--fsdd", type=Path, required=True, help="recordings of the Free Spoken Digit Dataset")
    parser.add_argument("--voices", type=Path, help="synthetic voices besides (digits.voices makes them)")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curves and the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", type=float, default=0.3, help="share of clips as recorded (default 0.3)")
    parser.add_argument("--steps", type=int, help="of the optimiser, the schedule's length")
    parser.add_argument("--minutes", type=float, help="of training, if that is sooner")
    parser.add_argument("--batch", type=int, default=16, help="clips a step (default 16)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw batches (default 1)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--validate-steps", type=int, default=1000)
    parser.add_argument("--start", type=Path, help="a GGUF file of this model to go on from, for another round")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
