"""Runs of training: resuming, the schedule, what trains and what not, adapters, options that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from auricle.convert.hf import plan_conversion
from auricle.tools.finetune.batches import collate
from auricle.tools.finetune.conversations import Conversations, ConversationSource
from auricle.tools.finetune.curves import read_curves
from auricle.tools.finetune.folder import FolderError, read_codec, read_model
from auricle.tools.finetune.greedy import continue_greedily
from auricle.tools.finetune.model import Trainee, to_tensors
from auricle.tools.finetune.train import Run, Settings, TrainingError
from auricle.tools.finetune.tune import Task, TaskError, finetune, part_of
from auricle.tools.oracle.model import load_oracle
from talks import SHAPE, digits_data, write_conversations

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in read_curves(folder / "curves.csv") if row["loss"]]


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(folders, tmp_path: Path) -> None:
    data = digits_data(tmp_path)
    source = ConversationSource(Conversations(data, read_codec(folders(SHAPE)), 8192), 2, seed=0)
    settings = Settings(steps=6, warmup_steps=2, log_steps=1, accumulate=2)

    def start(folder: Path) -> Run:
        torch.manual_seed(5)
        return Run(Trainee(read_model(folders(SHAPE)), dropout=0.1), settings, folder)

    def batches(stop: int | None = None):
        def numbers(first: int):
            for number in range(first, stop or 1000):
                yield source(number)

        return numbers

    start(tmp_path / "whole").go(batches())
    stopped = start(tmp_path / "parts")
    with pytest.raises(StopIteration):
        stopped.go(batches(stop=7))  # 3 steps, and one batch of the fourth
    assert stopped.step == 3
    stopped.save()
    second = start(tmp_path / "parts")
    torch.manual_seed(99)
    second.resume()
    second.go(batches())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6


def test_resuming_refuses_other_runs(folders, tmp_path: Path) -> None:
    run = Run(Trainee(read_model(folders(SHAPE))), Settings(steps=3), tmp_path)
    with pytest.raises(TrainingError, match="can't resume"):
        run.resume()
    run.save()
    with pytest.raises(TrainingError, match="another model"):
        Run(Trainee(read_model(folders(SHAPE)), n_sounds=10), Settings(steps=3), tmp_path).resume()
    with pytest.raises(TrainingError, match="needs an end"):
        Run(run.trainee, Settings(), tmp_path)


def test_the_schedule_ends_by_steps_or_by_the_clock() -> None:
    settings = Settings(learning_rate=1.0, steps=1000, minutes=10, warmup_steps=100, decay_from=0.5)
    assert settings.progress(500, 1) == 0.5
    assert settings.progress(100, 9) == 0.9
    assert settings.rate(9, settings.progress(9, 0)) == pytest.approx(0.1)
    assert settings.rate(500, 0.5) == 1
    assert settings.rate(750, 0.75) == pytest.approx(0.5)
    assert settings.rate(1000, 1.0) == 0


def task(folders, tmp_path: Path, **changes) -> Task:
    data = digits_data(tmp_path)
    defaults = {
        "model_dir": folders(SHAPE), "data_path": data, "output_dir": tmp_path / "out", "learning_rate": 3e-3,
        "num_train_epochs": 12, "per_device_train_batch_size": 3, "logging_steps": 1, "workers": 0, "warmup_steps": 3,
    }  # fmt: skip
    return Task(**(defaults | changes))


def test_overfitting_learns_the_answers_and_the_result_converts(folders, tmp_path: Path) -> None:
    job = task(folders, tmp_path, eval_data_path=digits_data(tmp_path), eval_steps=10, eval_new_tokens=4)
    out = finetune(job)
    curve = losses(out)
    assert len(curve) == 24
    assert np.mean(curve[-3:]) < 0.5 * np.mean(curve[:3])
    measured = [row for row in read_curves(out / "curves.csv") if row["validation_loss"]]
    assert [row["step"] for row in measured] == ["10", "20", "24"]
    assert float(measured[-1]["validation_loss"]) < float(measured[0]["validation_loss"])
    plan_conversion(out, "f16")  # a closed world: it would refuse any tensor too many or too few
    codec = read_codec(out)
    data = Conversations(job.data_path, codec, 8192)
    row = data.row(0)
    wanted = row.take_last_answer()
    assert codec.tokenizer.decode(wanted) == "one"
    single = continue_greedily(Trainee(read_model(out)).eval(), [row], 3)[0]
    prompt = data.row(0)
    prompt.take_last_answer()
    stages = load_oracle(out).run(prompt.mels, np.array(prompt.ids), np.array(prompt.audio) >= 0, n_new=3)
    generated = stages["generated_ids"].tolist()
    assert single == generated[: generated.index(codec.end_id) if codec.end_id in generated else 3]


def test_frozen_parts_stay(folders, tmp_path: Path) -> None:
    before = read_model(folders(SHAPE)).state_dict()
    out = finetune(
        task(folders, tmp_path, freeze=("encoder", "decoder"), num_train_epochs=1, gradient_checkpointing=True)
    )
    after = read_model(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if part_of(name) == "adapters"}
    assert {part_of(name) for name in before} == {"encoder", "adapters", "decoder"}


def test_checkpointing_changes_nothing(folders, tmp_path: Path) -> None:
    source = ConversationSource(Conversations(digits_data(tmp_path), read_codec(folders(SHAPE)), 8192), 2, seed=0)
    found = []
    for checkpointing in (False, True):
        trainee = Trainee(read_model(folders(SHAPE))).train()
        trainee.checkpointing = checkpointing
        trainee(to_tensors(source(0))).answer.backward()
        found.append({name: value.grad for name, value in trainee.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_two_small_batches_make_the_step_of_a_large_one(folders, tmp_path: Path) -> None:
    """Answers of unlike length, so that a mean of means would be another."""
    talk = [("user", "a.wav"), ("user", "What?"), ("assistant", "one")]
    long = [("user", "b.wav"), ("user", "What?"), ("assistant", "one two three four five six")]
    rows = Conversations(write_conversations(tmp_path, [talk, long]), read_codec(folders(SHAPE)), 8192)
    found = []
    for cuts in ([[0, 1]], [[0], [1]]):
        trainee = Trainee(read_model(folders(SHAPE)))
        run = Run(trainee, Settings(steps=1, accumulate=len(cuts), clip=0, weight_decay=0), tmp_path / str(len(cuts)))
        batches = [collate([rows.row(at) for at in cut]) for cut in cuts]
        run.optimiser = torch.optim.SGD(trainee.parameters(), lr=1.0)
        losses = run._update(batches, 1.0)
        found.append((losses["loss"], {name: value.detach() for name, value in trainee.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more", [{}, {"lora_on_audio_encoder": True, "lora_on_adapters": True}], ids=["decoder", "all"]
)
def test_lora_changes_what_it_should_and_nothing_else(folders, tmp_path: Path, more: dict) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    out = finetune(task(folders, tmp_path, use_lora=True, lora_rank=4, lora_alpha=8, learning_rate=1e-2, **more))
    curve = losses(out)
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3])
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    weights = load_file(out / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in weights}
    decoder = [f"language_model.layers.{n}.{part}_proj" for n in range(4) for part in
               (*(f"self_attn.{k}" for k in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
    encoder = [f"audio_encoder.layers.{n}.self_attn.{k}_proj" for n in range(4) for k in "qkv"]
    adapters = [f"{name}.{part}_proj" for part in ("gate", "up", "down") for name in
                ("audio_adapter", *(f"deepstack_audio_merger_list.{k}" for k in range(3)))]  # fmt: skip
    assert modules == set(decoder + (encoder + adapters if more else []))
    assert {name.split(".lora_")[1] for name in weights} == {"A.weight", "B.weight"}
    assert all(value.abs().sum() > 0 for value in weights.values())
    assert not (out / "model.safetensors").exists()


def test_a_run_is_not_overwritten_and_options_are_checked(folders, tmp_path: Path) -> None:
    job = task(folders, tmp_path, num_train_epochs=1)
    finetune(job)
    with pytest.raises(TaskError, match="--resume"):
        finetune(job)
    for changes, words in (
        ({"lora_on_adapters": True}, "--lora-on-adapters goes with --use-lora"),
        ({"lora_rank": 4}, "--lora-rank goes with --use-lora"),
        ({"freeze": ("encoder", "adapters", "decoder")}, "nothing is left"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0; it must be above 0"),
        ({"max_minutes": 0.0}, "--max-minutes is 0.0"),
        ({"output_dir": job.model_dir}, "model's own folder"),
        ({"output_dir": job.data_path}, "can't write into"),
    ):
        with pytest.raises(TaskError, match=words):
            finetune(task(folders, tmp_path, **({"output_dir": tmp_path / "b"} | changes)))
    with pytest.raises(TrainingError, match="of a run with --seed 0, not 1"):
        finetune(task(folders, tmp_path, num_train_epochs=2, resume=True, seed=1))
    with pytest.raises(TaskError, match="--freeze ears"):
        finetune(task(folders, tmp_path, output_dir=tmp_path / "b", freeze=("ears",)))
    with pytest.raises(FolderError, match=r"has no config\.json"):
        finetune(task(folders, tmp_path, output_dir=tmp_path / "c", model_dir=tmp_path / "nothing"))


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from auricle.tools.cli.finetune import ExtraError
    from auricle.tools.cli.finetune import finetune as command

    monkeypatch.setitem(sys.modules, "auricle.tools.finetune.tune", None)
    with pytest.raises(ExtraError, match=r"pip install 'auricle\[finetune\]'"):
        command(tmp_path, tmp_path, tmp_path)
