"""Training: batches against the oracle's single requests, labels, time markers, resuming, what trains and what not."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from auricle.convert.hf import plan_conversion
from auricle.engine.mel import log_mel
from auricle.engine.prompts import build_prompt
from auricle.tools.conversations import ConversationError, Turn
from auricle.tools.finetune.batches import IGNORED, Row, collate, count_audio_tokens
from auricle.tools.finetune.conversations import Conversations, ConversationSource, lay_out
from auricle.tools.finetune.curves import read_curves
from auricle.tools.finetune.folder import FolderError, read_codec, read_gguf_weights, read_model
from auricle.tools.finetune.greedy import continue_greedily, count_errors
from auricle.tools.finetune.loader import given, load
from auricle.tools.finetune.model import Trainee, to_tensors
from auricle.tools.finetune.passes import RMSNorm, Rotate
from auricle.tools.finetune.train import Run, Settings, TrainingError
from auricle.tools.finetune.tune import Task, TaskError, finetune, part_of
from auricle.tools.oracle.model import Oracle, OracleError, load_oracle
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint
from sounds import synthetic

SHAPE = SampleShape(
    enc_d_model=32, enc_n_head=2, enc_d_ff=48, enc_d_out=32, d_adapter=24, d_model=48, d_ff=64, d_head=16,
    n_window=100, n_layer=4,
)  # fmt: skip
OTHER = SampleShape(
    enc_d_model=32, enc_n_head=2, enc_d_ff=48, enc_d_out=40, d_adapter=24, d_model=48, d_ff=64, d_head=16,
    n_window=20, taps=(3, 0, 2), n_inject=2, n_kv_head=4, tied=True,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("finetune")

    @cache
    def make(shape: SampleShape) -> Path:
        return copy_checkpoint(base / str(hash(shape)), shape)

    return make


def random_mel(n_frames: int) -> np.ndarray:
    return np.random.default_rng(n_frames).normal(0, 0.45, (128, n_frames)).astype(np.float32)


def question_row(codec, mel: np.ndarray, pairs: list[tuple[str, str]]) -> Row:
    row = Row(codec)
    row.text("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    row.clip(mel)
    for question, answer in pairs:
        row.branch()
        row.text(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
        row.answer(answer)
    return row


@pytest.mark.parametrize("shape", [SHAPE, OTHER], ids=["plain", "odd"])
def test_a_batch_gives_what_each_request_gives_alone(folders, shape: SampleShape) -> None:
    """One short window, exactly one, a full one with a tail, several: every branch of every row as the oracle's."""
    folder = folders(shape)
    codec, oracle = read_codec(folder), load_oracle(folder)
    trainee = Trainee(read_model(folder)).eval()
    width = 2 * shape.n_window
    pairs = [("Transcribe the audio.", "one two"), ("What do you hear?", "three"), ("Describe this audio.", "")]
    frames = [9, width - 3, width, width + 1, 2 * width + 37]
    rows = [question_row(codec, random_mel(n), pairs[: 1 + n % 3]) for n in frames]
    batch = to_tensors(collate(rows))
    with torch.no_grad():
        encoded, taps = trainee.encode(batch)
        logits = trainee.model.lm_head(trainee.decode(batch, encoded, taps))
        wanted = (batch.labels != IGNORED).nonzero()[:, 0]
        some = trainee.model.lm_head(trainee.decode(batch, encoded, taps, wanted))
    torch.testing.assert_close(some, logits[wanted], rtol=0, atol=1e-5)
    start = 0
    for row, n in zip(rows, frames, strict=True):
        branches = np.array(row.branches)
        for at, (question, answer) in enumerate(pairs[: 1 + n % 3], 1):
            prompt = build_prompt(codec.tokenizer, codec.special, question, [count_audio_tokens(n, width)], True)
            ids = [*prompt.ids.tolist(), *codec.tokenizer.encode(answer), codec.end_id]
            mask = np.arange(len(ids)) < 0
            mask[: len(prompt.ids)] = prompt.audio_rows >= 0
            expected = oracle.run([random_mel(n)], np.array(ids), mask)["logits"]
            mine = logits[start : start + len(row.ids)][torch.from_numpy((branches == 0) | (branches == at))]
            assert [i for i, branch in zip(row.ids, row.branches, strict=True) if branch in (0, at)] == ids
            np.testing.assert_allclose(mine.numpy(), expected, rtol=0, atol=2e-5)
        start += len(row.ids)


def test_several_clips_and_turns_as_the_oracle_has_them(folders, tmp_path: Path) -> None:
    folder = folders(SHAPE)
    codec, oracle = read_codec(folder), load_oracle(folder)
    path = write_conversations(tmp_path, [[("user", "a.wav"), ("user", "b.wav"), ("user", "What do you hear?"),
                                           ("assistant", "one"), ("user", "Describe this audio."),
                                           ("assistant", "two three")]])  # fmt: skip
    row = Conversations(path, codec, 8192).row(0)
    batch = to_tensors(collate([row]))
    trainee = Trainee(read_model(folder)).eval()
    with torch.no_grad():
        logits = trainee.model.lm_head(trainee.decode(batch, *trainee.encode(batch)))
    mels = [log_mel(soundfile.read(tmp_path / name, dtype="float32")[0]) for name in ("a.wav", "b.wav")]
    expected = oracle.run(mels, np.array(row.ids), np.array(row.audio) >= 0)["logits"]
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=2e-5)


def test_derivatives_that_are_written_out() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((3, 2, 8), (8,)))
    cos, sin = torch.randn(3, 1, 4, dtype=torch.double), torch.randn(3, 1, 4, dtype=torch.double)
    assert torch.autograd.gradcheck(RMSNorm.apply, (x, weight, 1e-6))
    assert torch.autograd.gradcheck(Rotate.apply, (x, cos, sin))


def write_conversations(folder: Path, conversations: list[list[tuple[str, str]]]) -> Path:
    """Contents that end in .wav are recordings, written too, each with its own length."""
    lines = []
    for messages in conversations:
        turns = []
        for role, content in messages:
            kind = "audio" if content.endswith(".wav") else "text"
            if kind == "audio" and not (folder / content).exists():
                seconds = 0.4 + 0.37 * (ord(content[0]) - ord("a"))
                soundfile.write(folder / content, synthetic(seconds, 16_000, seed=ord(content[0])), 16_000)
            turns.append({"role": role, "message_type": kind, "content": content})
        lines.append(json.dumps({"conversation": turns}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_layout_of_turns() -> None:
    def turn(role: str, content: str) -> Turn:
        return Turn(role, "audio" if content.endswith("wav") else "text", content)

    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    ask = "<|im_end|>\n<|im_start|>assistant\n"
    simple = [turn("user", "a.wav"), turn("user", "What?"), turn("assistant", "one")]
    assert lay_out(simple) == [("text", head), ("clip", "a.wav"), ("text", f"\nWhat?{ask}"), ("answer", "one")]
    mute = [turn("user", "a.wav"), turn("assistant", "one")]
    assert lay_out(mute, "Say.") == [("text", head), ("clip", "a.wav"), ("text", f"\nSay.{ask}"), ("answer", "one")]
    again = [turn("system", "Be brief."), *simple, turn("user", "And?"), turn("assistant", "two")]
    parts = lay_out(again)
    assert parts[0] == ("text", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert parts[3:] == [("answer", "one"), ("text", f"\n<|im_start|>user\nAnd?{ask}"), ("answer", "two")]


def test_labels_are_the_assistants_tokens_alone(folders, tmp_path: Path) -> None:
    codec = read_codec(folders(SHAPE))
    path = write_conversations(tmp_path, [[("user", "a.wav"), ("user", "one two"), ("assistant", "three"),
                                           ("user", "three"), ("assistant", "two")]])  # fmt: skip
    row = Conversations(path, codec, 8192).row(0)
    learnt = [label for label in row.labels if label != IGNORED]
    encode = codec.tokenizer.encode
    assert learnt == [*encode("three"), codec.end_id, *encode("two"), codec.end_id]
    for at, label in enumerate(row.labels):
        assert label == IGNORED or row.ids[at + 1] == label
    assert [weight > 0 for weight in row.weights] == [label != IGNORED for label in row.labels]


def test_time_markers_as_at_inference(folders) -> None:
    codec = read_codec(folders(SHAPE))
    mel = random_mel(1110)  # 11.1 s: markers 2 to 10, the last of two digits
    row = question_row(codec, mel, [("Transcribe the audio.", "one")])
    n_tokens = count_audio_tokens(1110, codec.window)
    prompt = build_prompt(codec.tokenizer, codec.special, "Transcribe the audio.", [n_tokens], True)
    assert row.ids[: len(prompt.ids)] == prompt.ids.tolist()
    assert row.audio[: len(prompt.ids)] == prompt.audio_rows.tolist()
    assert sum(row.ids.count(digit) for digit in codec.digits) == 6
    without = read_codec(folders(SHAPE), time_markers=False)
    assert len(question_row(without, mel, [("Transcribe the audio.", "one")]).ids) == len(row.ids) - 6


def test_what_is_cut_is_said_and_clips_stay_whole(folders, tmp_path: Path) -> None:
    codec = read_codec(folders(SHAPE))
    first = [("user", "a.wav"), ("user", "one"), ("assistant", "two")]
    long = [*first, ("user", "d.wav"), ("user", "?"), ("assistant", "one")]
    late = [("user", "one two three " * 20), ("assistant", "one")]
    path = write_conversations(tmp_path, [long, late, first])
    whole = Conversations(path, codec, 8192)
    assert whole.report is None
    (_, first_end), (second, second_end) = whole.row(0).spans
    limit = second + 3  # within the second clip
    cut = Conversations(path, codec, limit)
    assert len(cut) == 2
    assert "of 3 conversations 1 are cut" in cut.report
    assert "1 (line 2) left out" in cut.report
    row = cut.row(0)
    assert len(row.ids) == second
    assert len(row.mels) == 1
    assert row.labels[-1] == IGNORED
    assert [label for label in row.labels if label != IGNORED] == [*codec.tokenizer.encode("two"), codec.end_id]
    assert first_end < limit < second_end
    with pytest.raises(ConversationError, match="raise --max-len"):
        Conversations(path, codec, 10)


def test_errors_name_the_line(folders, tmp_path: Path) -> None:
    codec = read_codec(folders(SHAPE))
    path = write_conversations(
        tmp_path, [[("user", "a.wav"), ("assistant", "one")], [("user", "b.wav"), ("assistant", "")]]
    )
    (tmp_path / "b.wav").unlink()
    with pytest.raises(Exception, match="line 2") as caught:
        Conversations(path, codec, 8192)
    assert "\n" not in str(caught.value)


def test_an_epoch_has_every_conversation_once_and_like_lengths_together(folders, tmp_path: Path) -> None:
    codec = read_codec(folders(SHAPE))
    texts = ["one " * n for n in range(1, 24)]
    path = write_conversations(tmp_path, [[("user", text), ("assistant", "two")] for text in texts])
    source = ConversationSource(Conversations(path, codec, 8192), 4, seed=3)
    assert source.n_batches == 6
    epochs = [[source(epoch * 6 + at) for at in range(6)] for epoch in range(2)]
    lengths = [sorted(n for batch in epoch for n in np.bincount(batch.rows).tolist()) for epoch in epochs]
    assert lengths[0] == lengths[1] == sorted(source.conversations.lengths)
    spread = max(np.ptp(np.bincount(batch.rows)) for batch in epochs[0])
    assert spread <= 4 * (len(codec.tokenizer.encode("one one")) - len(codec.tokenizer.encode("one")))
    assert [batch.ids.tolist() for batch in epochs[0]] != [batch.ids.tolist() for batch in epochs[1]]
    again = ConversationSource(source.conversations, 4, seed=3)
    np.testing.assert_array_equal(again(8).ids, epochs[1][2].ids)


def digits_data(folder: Path) -> Path:
    words = ["one", "two", "three", "one two", "two two"]
    clips = [f"{letter}.wav" for letter in "abcde"]
    return write_conversations(
        folder,
        [[("user", clip), ("user", "Say."), ("assistant", word)] for clip, word in zip(clips, words, strict=True)],
    )


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in read_curves(folder / "curves.csv") if row["loss"]]


def test_batches_made_ahead_are_the_same(folders, tmp_path: Path) -> None:
    source = ConversationSource(Conversations(digits_data(tmp_path), read_codec(folders(SHAPE)), 8192), 2, seed=0)
    ahead = load(partial(given, source), 1, n_workers=2)
    for number in range(1, 4):
        batch, expected = next(ahead), source(number)
        np.testing.assert_array_equal(batch.windows, expected.windows)
        np.testing.assert_array_equal(batch.ids, expected.ids)
    ahead.close()


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(folders, tmp_path: Path) -> None:
    data = digits_data(tmp_path)
    source = ConversationSource(Conversations(data, read_codec(folders(SHAPE)), 8192), 2, seed=0)
    settings = Settings(steps=6, warmup_steps=2, log_steps=1, accumulate=2, ctc_weight=0)

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
        Run(Trainee(read_model(folders(SHAPE)), n_words=10), Settings(steps=3), tmp_path).resume()
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


def test_checkpointing_and_accumulation_change_nothing(folders, tmp_path: Path) -> None:
    """Two batches of half the rows make the same step when both have as many learnt tokens."""
    source = ConversationSource(Conversations(digits_data(tmp_path), read_codec(folders(SHAPE)), 8192), 2, seed=0)
    found = []
    for checkpointing in (False, True):
        trainee = Trainee(read_model(folders(SHAPE))).train()
        trainee.checkpointing = checkpointing
        trainee(to_tensors(source(0))).answer.backward()
        found.append({name: value.grad for name, value in trainee.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


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
    with pytest.raises(TaskError, match="--freeze ears"):
        finetune(task(folders, tmp_path, output_dir=tmp_path / "b", freeze=("ears",)))
    with pytest.raises(OracleError, match="can't read"):
        finetune(task(folders, tmp_path, output_dir=tmp_path / "c", model_dir=tmp_path / "nothing"))


def test_weights_from_a_gguf_file(folders, tmp_path: Path) -> None:
    from auricle.convert.hf import convert

    convert(plan_conversion(folders(SHAPE), "f32"), tmp_path / "model.gguf")
    model = read_model(folders(SHAPE))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    read_gguf_weights(model, tmp_path / "model.gguf")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    other = read_model(folders(OTHER))
    with pytest.raises(FolderError, match="of another model"):
        read_gguf_weights(other, tmp_path / "model.gguf")


def test_errors_are_counted_as_levenshtein_does() -> None:
    assert count_errors([], []) == 0
    assert count_errors(["a", "b", "c"], ["a", "c"]) == 1
    assert count_errors(["a"], ["b", "c", "d"]) == 3
    assert count_errors(["k", "i", "t", "t", "e", "n"], ["s", "i", "t", "t", "i", "n", "g"]) == 3


def test_the_oracle_is_in_the_loop(folders) -> None:
    """The trainee's own module is the oracle's: what is trained is what the oracle runs."""
    trainee = Trainee(read_model(folders(SHAPE)))
    assert isinstance(Oracle(trainee.model).model, type(load_oracle(folders(SHAPE)).model))
