"""Synthetic model files: their sizes, their vocabulary, the spread of their weights, and that they run."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from auricle.convert.hf import plan_conversion
from auricle.convert.source import ConversionError
from auricle.convert.vocabulary import Vocabulary
from auricle.engine import load
from auricle.engine.gguf import open_gguf
from auricle.engine.outputs import OutputError
from auricle.engine.tokenizer import Tokenizer
from auricle.kernels.formats import BF16, BY_ID, F16, F32, FORMATS, Q2_K, Q6_K, Format
from auricle.tools.sample import write_checkpoint
from auricle.tools.stages import trace_stages
from auricle.tools.synth import SHAPES, RandomWeights, SynthError, plan_synth, write_synth
from auricle.tools.synth_vocabulary import invent_vocabulary
from sounds import synthetic
from support import SHARED, needs_shared

RECIPES = ("q4_k", "q4_k_all", "q4_k_f16enc", "q3_k", "q5_k", "q6_k", "q8_0", "f16", "bf16", "f32")
N_VOCAB = 151_936


def synthesise(path: Path, type_name: str = "q4_k", seed: int = 0) -> Path:
    write_synth(plan_synth("tiny", type_name, seed), path)
    return path


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return invent_vocabulary(N_VOCAB)


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    return Tokenizer.from_metadata({key: typed.value for key, typed in vocabulary.metadata().items()})


def test_a_full_shape_has_the_published_size() -> None:
    """Known figures: an all-Q4_K file with the real vocabulary, the tensors of a checkpoint, its stored parameters."""
    for name, billions in (("moss-audio-4b", 5.22), ("moss-audio-8b", 9.05)):
        layout = plan_synth(name, "q4_k_all").layout
        assert len(layout.tensors) == 901 + 2
        n_weights = sum(math.prod(info.shape) for info in layout.tensors.values())
        assert n_weights / 1e9 == pytest.approx(billions, abs=0.005)
        if name == "moss-audio-4b":
            assert abs(layout.total_bytes / 2_951_562_240 - 1) < 0.001


@needs_shared
def test_the_vocabulary_takes_as_many_bytes_as_the_real_one(vocabulary: Vocabulary) -> None:
    with open_gguf(SHARED / "data/tokenizer/ggml-vocab-qwen2.gguf") as file:
        real = file.metadata
    for key, texts in (("tokens", vocabulary.tokens), ("merges", vocabulary.merges)):
        theirs = real[f"tokenizer.ggml.{key}"]
        assert len(texts) == len(theirs)
        n_bytes, expected = (sum(len(text.encode()) for text in some) for some in (texts, theirs))
        assert abs(n_bytes / expected - 1) < 0.02
    assert vocabulary.tokens[:256] == real["tokenizer.ggml.tokens"][:256]


def test_the_vocabulary_has_qwens_positions(vocabulary: Vocabulary) -> None:
    specials = {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|AUDIO|>": 151654,
        "<think>": 151667, "</think>": 151668, "<|audio_bos|>": 151669, "<|audio_eos|>": 151670,
    }  # fmt: skip
    for text, i in specials.items():
        assert vocabulary.tokens[i] == text
        assert vocabulary.types[i] == (4 if "think" in text else 3)
    assert vocabulary.tokens[15:25] == list("0123456789")
    assert vocabulary.tokens[-1] == "[PAD151935]"
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == N_VOCAB
    made = [left + right for left, right in (merge.split(" ") for merge in vocabulary.merges)]
    assert vocabulary.tokens[256:151643] == made
    place = {token: i for i, token in enumerate(vocabulary.tokens)}
    for merge in vocabulary.merges:
        left, right = merge.split(" ")
        assert max(place[left], place[right]) < place[left + right]


def test_every_token_is_what_its_text_is_encoded_to(tokenizer: Tokenizer) -> None:
    whole = 0
    for i in [*range(256, 6000), *range(6000, 151643, 41)]:
        try:
            text = tokenizer.token_bytes(i).decode()
        except UnicodeDecodeError:
            continue  # the first two bytes of a character
        whole += 1
        assert tokenizer.encode(text) == [i]
    assert whole > 9000


def test_text_survives_and_english_is_short(tokenizer: Tokenizer) -> None:
    prompt = "<|im_start|>user\nTranscribe the audio.<|im_end|>\n"
    strange = "请转写这段音频。 ½ naïve\x00\n\U0001f600  ## x=1"
    for text in (prompt, strange):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    speech = "And so, my fellow Americans: ask not what your country can do for you, ask what you can do for it."
    assert len(tokenizer.encode("Transcribe the audio.")) == 4
    assert len(tokenizer.encode(speech)) < 2 * len(speech.split())
    assert tokenizer.encode("128") == [16, 17, 23]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("std", [1.0, 0.02, 0.3 / math.sqrt(12288)])
def test_blocks_decode_to_the_spread_asked_for(fmt: Format, std: float) -> None:
    """By the `gguf` package's decoders. A run's mean is as near to 0 as that of independent weights, within 40 %."""
    n_blocks = (1 << 19) // fmt.length
    data = np.concatenate(list(RandomWeights(1).draw_blocks(fmt, n_blocks, std)))
    weights = gguf.quants.dequantize(data.reshape(n_blocks, -1), gguf.GGMLQuantizationType(fmt.id)).reshape(-1, 256)
    assert np.isfinite(weights).all()
    assert weights.std() == pytest.approx(std, rel=0.02)
    assert abs(weights.mean()) < 0.01 * std
    assert weights.mean(axis=1).std() * 16 == pytest.approx(std, rel=0.4)
    assert np.abs(weights).max() < 6 * std


@pytest.mark.parametrize("fmt", [F16, BF16, F32, Q2_K, Q6_K], ids=str)
def test_no_two_rows_are_alike(fmt: Format) -> None:
    """Across slabs and several turns of the pool, and from one tensor to the next."""
    stream, n_cols = RandomWeights(0), 256
    n_blocks = 20_000 * n_cols // fmt.length
    data = np.concatenate([slab for _ in range(2) for slab in stream.draw_blocks(fmt, n_blocks, 0.1)])
    rows = data.reshape(-1, fmt.row_bytes(n_cols))
    assert len({row.tobytes() for row in rows}) == len(rows) == 40_000


@pytest.mark.parametrize("type_name", RECIPES)
def test_the_file_holds_what_was_planned(tmp_path: Path, type_name: str) -> None:
    """As the `gguf` package reads it: shapes, types, and the spread of every tensor."""
    plan = plan_synth("tiny", type_name)
    write_synth(plan, tmp_path / "f.gguf")
    assert (tmp_path / "f.gguf").stat().st_size == plan.layout.total_bytes
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "f.gguf").tensors}
    assert tensors.keys() == plan.layout.tensors.keys()
    for name, info in plan.layout.tensors.items():
        tensor = tensors[name]
        assert tuple(tensor.shape[::-1]) == info.shape
        assert BY_ID[tensor.tensor_type] is info.format
        if name.startswith("audio."):
            continue
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(info.shape) == 1:
            assert abs(weights.mean() - (0 if name.endswith(".bias") else 1)) < 0.1
            assert weights.std() == pytest.approx(0.1, rel=0.5)
            continue
        branch = name.endswith((".attn.o.weight", "ffn.down.weight", ".fc2.weight"))
        std = 1 if name == "llm.embed.weight" else (0.3 if branch else 1) / math.sqrt(math.prod(info.shape[1:]))
        assert weights.std() == pytest.approx(std, rel=0.05 if weights.size > 2000 else 0.2)


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    one, same, other = (synthesise(tmp_path / str(n), seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert one.read_bytes() == same.read_bytes()
    with open_gguf(one) as a, open_gguf(other) as b:
        differing = {
            key for key in a.metadata if a.types[key].type.name != "ARRAY" and a.metadata[key] != b.metadata.get(key)
        }
        assert differing == {"general.name"}
        assert a.metadata["tokenizer.ggml.tokens"] == b.metadata["tokenizer.ggml.tokens"]
        for name in a.tensors:
            assert np.array_equal(a.data(name), b.data(name)) == name.startswith("audio.")


def test_the_metadata_is_as_complete_as_a_converted_files(tmp_path: Path) -> None:
    converted = plan_conversion(write_checkpoint(tmp_path / "checkpoint"), "q8_0").metadata
    ours = plan_synth("tiny", "q8_0").metadata
    wanted = {key for key in converted if not key.startswith("general.source.")}
    assert wanted == ours.keys()
    assert {key: converted[key].type for key in wanted} == {key: ours[key].type for key in wanted}
    assert "random weights" in ours["general.name"].value


@pytest.mark.parametrize("type_name", ["q4_k", "bf16"])
def test_a_file_runs_and_activations_stay_near_one(tmp_path: Path, type_name: str) -> None:
    sound = synthetic(5, 16_000)
    with load(synthesise(tmp_path / "f.gguf", type_name), n_ctx=512) as model:
        heard = model.listen(sound, 16_000)
        encoder = [*(f"enc.blk.{n}" for n in range(4)), "adapter", *(f"deepstack.{k}" for k in range(3))]
        decoder = [*(f"llm.blk.{n}" for n in range(4)), "llm.final_norm", "logits"]
        stages = trace_stages(model, heard, model.build_prompt("Transcribe the audio.", heard), encoder + decoder)
        result = model.generate("Transcribe the audio.", sound, sample_rate=16_000, max_new_tokens=4)
    assert stages.keys() == {*encoder, *decoder}
    for name, values in stages.items():
        assert np.isfinite(values).all(), name
        assert 0.2 < math.sqrt(np.square(values, dtype=np.float64).mean()) < 2, name
    assert len(result.token_ids) >= 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("moss-audio-5b", "q4_k"), SynthError, f"'moss-audio-5b': choose one of {', '.join(SHAPES)}"),
        (("tiny", "q4_k", -1), SynthError, "the seed is -1: it must be 0 or more"),
        (("tiny", "q9"), ConversionError, "there is no type 'q9': choose one of .*q4_k_all"),
    ],
)
def test_wrong_requests_are_told_in_a_line(arguments: tuple, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        plan_synth(*arguments)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match=r"f\.gguf: the disk is full: .* bytes needed, 1,000 free") as caught:
        synthesise(tmp_path / "f.gguf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_total_and_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_synth("tiny", "q4_k")
    seen: list[tuple[int, int]] = []
    write_synth(plan, tmp_path / "f.gguf", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][0]} == {sum(plan.bytes_by_part().values())}
    (tmp_path / "f.gguf").unlink()

    with pytest.raises(KeyboardInterrupt):
        write_synth(plan, tmp_path / "f.gguf", interrupt_after(20))
    assert list(tmp_path.iterdir()) == []


def interrupt_after(n_calls: int) -> Callable[[int, int], None]:
    calls = iter(range(n_calls))

    def progress(_done: int, _total: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


def auricle(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "auricle.tools", "synth", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    planned = auricle("--shape", "tiny", "--type", "q5_k", "-o", path, "--seed", 7, "--dry-run")
    assert not path.exists()
    done = auricle("--shape", "tiny", "--type", "q5_k", "-o", path, "--seed", 7)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"{path.stat().st_size:,} bytes" in done.stderr
    assert f"file: {path.stat().st_size:,} bytes" in planned.stdout
    assert path.read_bytes() == synthesise(tmp_path / "same.gguf", "q5_k", 7).read_bytes()
    for arguments, status in (
        (("--shape", "huge"), 2),
        (("--shape", "tiny", "--seed", -1), 2),
        (("--shape", "tiny", "--type", "q9"), 6),
    ):
        failed = auricle(*arguments, "-o", tmp_path / "no.gguf")
        assert (failed.returncode, failed.stdout) == (status, "")
        assert failed.stderr.startswith("auricle: ")
        assert failed.stderr.count("\n") == 1
