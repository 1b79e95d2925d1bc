"""The model in the box, as a user meets it: recordings of people, words with times, and never by accident."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from auricle.engine import load
from auricle.engine.audio import load_audio
from auricle.engine.gguf import open_gguf
from auricle.engine.prompts import TASKS
from auricle.tools.demo import FOLDER, MODEL, find_model
from auricle.tools.demo.recordings import SEQUENCES, Sequence
from auricle.tools.finetune.digits import WORDS
from support import ROOT

SPOKEN = {s.name: " ".join(WORDS[int(digit)] for digit in s.digits) for s in SEQUENCES}
SHIPPED_LIMIT = 25_000_000  # bytes
NEAR_S = 0.15  # of a time that is right
PAUSE_S = 0.1  # between words; none in the recordings is shorter


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "auricle.tools", *map(str, arguments)]
    return subprocess.run(command, text=True, timeout=120, check=False, **options)


def test_the_shipped_model_is_small() -> None:
    assert MODEL.stat().st_size <= SHIPPED_LIMIT


@pytest.mark.parametrize("name", SPOKEN)
def test_it_hears_what_people_say(name: str) -> None:
    with load(MODEL, backend="cpu") as model:
        assert model.generate("Transcribe the audio.", audio=FOLDER / f"{name}.flac").text == SPOKEN[name]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda s: s.name)
def test_words_have_times(sequence: Sequence) -> None:
    """Between the pauses, which are digital silence, within 150 ms."""
    path = FOLDER / f"{sequence.name}.flac"
    with load(MODEL, backend="cpu") as model:
        result = model.generate(TASKS["timestamps"], audio=path)
    assert " ".join(segment.text for segment in result.segments) == SPOKEN[sequence.name]
    for segment, (start, end) in zip(result.segments, find_sounds(path), strict=True):
        assert start - NEAR_S <= segment.start < segment.end <= end + NEAR_S


def find_sounds(path: Path) -> list[tuple[float, float]]:
    """Start and end in seconds of what stands between pauses of 100 ms and more."""
    samples, rate = soundfile.read(path)
    loud = np.flatnonzero(samples)
    breaks = np.flatnonzero(np.diff(loud) > PAUSE_S * rate)
    firsts, lasts = [loud[0], *loud[breaks + 1]], [*loud[breaks], loud[-1]]
    return [(first / rate, last / rate) for first, last in zip(firsts, lasts, strict=True)]


@pytest.mark.parametrize("task", ["transcribe", "timestamps"])
def test_pytorch_says_the_same(task: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers (the extra oracle)")
    pytest.importorskip("jiwer", reason="needs jiwer (the extra evaluate)")
    sys.path.append(str(ROOT / "benchmarks"))
    from agreement import compare
    from quality_asks import quantise

    from auricle.tools.demo.checkpoint import write_checkpoint
    from auricle.tools.finetune.digits.tasks import ask
    from auricle.tools.oracle.model import load_oracle

    oracle = load_oracle(write_checkpoint(tmp_path / "checkpoint"))
    with load(quantise(MODEL, tmp_path / "f32.gguf", "f32"), backend="cpu") as model:
        for name in SPOKEN:
            n, margin = compare(model, oracle, ask(task, load_audio(FOLDER / f"{name}.flac")))
            assert margin is None
            assert n >= len(SPOKEN[name].split())


def test_its_checkpoint_has_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers (the extra oracle)")
    from auricle.convert.hf import convert, plan_conversion
    from auricle.tools.demo.checkpoint import main

    assert main([str(tmp_path / "checkpoint")]) == 0
    convert(plan_conversion(tmp_path / "checkpoint", "f16"), tmp_path / "again.gguf")
    with open_gguf(MODEL) as shipped, open_gguf(tmp_path / "again.gguf") as again:
        assert again.tensors.keys() == shipped.tensors.keys()
        for name in shipped.tensors:
            assert again.data(name).tobytes() == shipped.data(name).tobytes()
    assert main([str(tmp_path / "other"), "--model", str(tmp_path / "nothing.gguf")]) == 1
    assert not (tmp_path / "other").exists()


def test_no_model_is_named_in_a_pipeline() -> None:
    done = run("transcribe", FOLDER / "george.flac", capture_output=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "add -m MODEL.gguf" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_model_is_named_at_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = run("transcribe", FOLDER / "george.flac", stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    text = os.read(ours, 4096).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert text.strip() == SPOKEN["george"]
    (line,) = [line for line in done.stderr.splitlines() if "demonstration" in line]
    assert "digits only" in line


def test_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(Path("demo")) == MODEL
    assert find_model(Path("./other.gguf")) == Path("other.gguf")
    assert find_model(None) is None
    (tmp_path / "demo").touch()
    assert find_model(Path("demo")) == Path("demo")
    (tmp_path / "demo").unlink()
    (tmp_path / "demo").mkdir()
    assert find_model(Path("demo")) == MODEL
    done = run("inspect", "demo", "--json", capture_output=True)
    assert json.loads(done.stdout)["metadata"]["general.architecture"] == "moss_audio"
