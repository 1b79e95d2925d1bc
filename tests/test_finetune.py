"""What is learnt from: batches against the oracle's single requests, labels, time markers, what is cut."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from auricle.convert.hf import plan_conversion
from auricle.convert.source import ConversionError
from auricle.engine.audio import AudioError
from auricle.engine.mel import log_mel
from auricle.engine.prompts import build_prompt
from auricle.tools.conversations import ConversationError, Turn
from auricle.tools.finetune import model as model_module
from auricle.tools.finetune.batches import IGNORED, Row, collate, count_audio_tokens
from auricle.tools.finetune.conversations import Conversations, ConversationSource, lay_out
from auricle.tools.finetune.folder import FolderError, read_codec, read_gguf_weights, read_model
from auricle.tools.finetune.greedy import count_errors
from auricle.tools.finetune.loader import given, load
from auricle.tools.finetune.model import Inside, Trainee, to_tensors
from auricle.tools.finetune.passes import RMSNorm, Rotate
from auricle.tools.oracle.model import load_oracle
from auricle.tools.sample import SampleShape
from checkpoints import change_json
from talks import OTHER, SHAPE, digits_data, write_conversations

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_what_is_told_of_audio_tokens_is_learnt_where_it_is_known(folders) -> None:
    folder = folders(SHAPE)
    codec = read_codec(folder)
    torch.manual_seed(0)
    trainee = Trainee(read_model(folder), n_sounds=5, n_places=(3, 4)).eval()
    known, unknown = (question_row(codec, random_mel(n), [("What?", "one")]) for n in (40, 90))
    known.sounds, known.places = [0, 1, 2, 3, 4], [(0, 3), (1, 2), (2, 1), (0, 0), (1, 3)]
    alone = trainee(to_tensors(collate([known])))
    together = trainee(to_tensors(collate([unknown, known])))
    torch.testing.assert_close(together[1:], alone[1:])
    assert float(alone.sounds.detach()) > 0.5
    assert float(alone.places.detach()) > 0.5
    nothing = trainee(to_tensors(collate([unknown])))
    assert (float(nothing.sounds), float(nothing.places)) == (0, 0)
    layers = trainee.model.language_model.layers
    first, *_, last = torch.autograd.grad(
        together.places, [layer.mlp.up_proj.weight for layer in layers], allow_unused=True
    )
    assert first is not None
    assert last is None


def test_where_answers_look_is_measured(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two branches of a row and another row, against the attention of that layer worked out token by token."""
    folder = folders(SHAPE)
    codec, trainee = read_codec(folder), Trainee(read_model(folder)).eval()
    rows = [Row(codec), Row(codec)]
    for row, n_frames, answers in ((rows[0], 40, ("one", "two")), (rows[1], 90, ("one",))):
        row.clip(random_mel(n_frames))
        for at, answer in enumerate(answers):
            row.branch()
            row.text("What?")
            n_tokens = len(codec.tokenizer.encode(answer))
            row.answer(answer, aims=[1 + at, IGNORED, 3, 4][:n_tokens])
    batch = to_tensors(collate(rows))
    seen, inside = [], Inside()
    attend = model_module.attend
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, blocks: seen.append((q, k)) or attend(q, k, v, blocks))
    with torch.no_grad():
        trainee.decode(batch, *trainee.encode(batch), inside=inside)
    q, k = seen[-len(trainee.model.language_model.layers) :][len(trainee.model.language_model.layers) // 2]
    expected = []
    for at in (batch.aims != IGNORED).nonzero()[:, 0].tolist():
        before = (batch.rows[: at + 1] == batch.rows[at]) & (
            (batch.branches[: at + 1] == 0) | (batch.branches[: at + 1] == batch.branches[at])
        )
        scores = (k[: at + 1, 0] @ q[at, 0] * q.shape[-1] ** -0.5).masked_fill(~before, -torch.inf)
        expected.append(scores.log_softmax(0)[batch.audio_rows[: at + 1] == batch.aims[at]])
    assert len(expected) >= 3
    torch.testing.assert_close(inside.looks, torch.cat(expected))


def test_derivatives_that_are_written_out() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((3, 2, 8), (8,)))
    cos, sin = torch.randn(3, 1, 4, dtype=torch.double), torch.randn(3, 1, 4, dtype=torch.double)
    assert torch.autograd.gradcheck(RMSNorm.apply, (x, weight, 1e-6))
    assert torch.autograd.gradcheck(Rotate.apply, (x, cos, sin))


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


def test_batches_made_ahead_are_the_same(folders, tmp_path: Path) -> None:
    source = ConversationSource(Conversations(digits_data(tmp_path), read_codec(folders(SHAPE)), 8192), 2, seed=0)
    ahead = load(partial(given, source), 1, n_workers=2)
    for number in range(1, 4):
        batch, expected = next(ahead), source(number)
        np.testing.assert_array_equal(batch.windows, expected.windows)
        np.testing.assert_array_equal(batch.ids, expected.ids)
    ahead.close()


def test_a_bad_recording_is_named_through_a_worker(folders, tmp_path: Path) -> None:
    data = digits_data(tmp_path)
    source = ConversationSource(Conversations(data, read_codec(folders(SHAPE)), 8192), 2, seed=0)
    for clip in tmp_path.glob("*.wav"):
        clip.write_bytes(clip.read_bytes()[:200])
    with pytest.raises(AudioError, match=r"line \d+: .*\.wav"):
        next(load(partial(given, source), 0, n_workers=1))


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


STRANGE = {
    "vocabulary": ("config.json", "language_config.vocab_size", [512], "vocab_size = .512.: it must be a whole number"),
    "a large vocabulary": ("config.json", "language_config.vocab_size", 1 << 40, "vocab_size = .*: it must be 1 to"),
    "window": ("config.json", "audio_config.n_window", "200", "n_window = '200': it must be a whole number"),
    "audio id": ("processor_config.json", "audio_token_id", ["x"], "audio_token_id = .*: it must be a whole number"),
    "a far audio id": (
        "processor_config.json",
        "audio_token_id",
        10**50,
        "= a number of 167 bits is no row",
    ),
    "markers": ("processor_config.json", "enable_time_marker", "no", "enable_time_marker = 'no': it must be true or"),
    "a token": ("added_tokens.json", "<|im_end|>", [3], r"lists added token '<.im_end.>' with id \[3\]"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_folder_whose_values_are_of_another_kind(folders, tmp_path: Path, case: str) -> None:
    name, key, value, complaint = STRANGE[case]
    folder = Path(shutil.copytree(folders(SHAPE), tmp_path / "a"))
    change_json(folder / name, {key: value})
    with pytest.raises(ConversionError, match=complaint) as caught:
        read_codec(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_as_the_converter_reads_it(folders, tmp_path: Path) -> None:
    """Sizes are compared with the weights before a model is made, and weights with their files."""
    folder = Path(shutil.copytree(folders(SHAPE), tmp_path / "a"))
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ConversionError, match="is truncated"):
        read_model(folder)
    shutil.copy(folders(SHAPE) / shard.name, shard)
    for key, value, complaint in (
        ("language_config.intermediate_size", 1 << 30, "config.json asks for"),
        ("language_config.num_hidden_layers", 1 << 30, "has only .* tensors in all"),
        ("audio_config.d_model", {}, "d_model = {}: it must be a whole number"),
    ):
        before = (folder / "config.json").read_bytes()
        change_json(folder / "config.json", {key: value})
        with pytest.raises(ConversionError, match=complaint):
            read_model(folder)
        (folder / "config.json").write_bytes(before)
    read_model(folder)


def test_errors_are_counted_as_levenshtein_does() -> None:
    assert count_errors([], []) == 0
    assert count_errors(["a", "b", "c"], ["a", "c"]) == 1
    assert count_errors(["a"], ["b", "c", "d"]) == 3
    assert count_errors(["k", "i", "t", "t", "e", "n"], ["s", "i", "t", "t", "i", "n", "g"]) == 3
