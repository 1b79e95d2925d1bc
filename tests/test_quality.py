"""`benchmarks/quality.py`: what it asks, the files it makes, and its table, with a model that knows nothing."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("jiwer", reason="needs jiwer (the extra evaluate)")

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.engine.gguf import open_gguf
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint
from sounds import synthetic
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import quality
import quality_asks

SHAPE = SampleShape(n_layer=3, enc_n_layer=3)


class Here:
    """A pool of processes that is none."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future:
        done: Future = Future()
        done.set_result(work(*arguments))
        return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random F16 model, and recordings of five digits: heard and not heard in training, and for training."""
    folder = tmp_path_factory.mktemp("quality")
    checkpoint = copy_checkpoint(folder / "checkpoint", SHAPE)
    convert(plan_conversion(checkpoint, "f16"), folder / "f16.gguf")
    (folder / "fsdd").mkdir()
    for speaker, indices in (("george", (0, 4, 12)), ("yweweler", (3, 30))):
        for digit in range(5):
            for index in indices:
                samples = synthetic(0.3, 8_000, seed=10 * index + digit)
                soundfile.write(folder / "fsdd" / f"{digit}_{speaker}_{index}.wav", samples, 8_000)
    return folder


def test_from_files_to_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All of it on two types and two sequences; the README keeps what is outside of the marks."""
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(quality_asks, "LIMITS", {"transcribe": 6, "timestamps": 8, "count": 2})
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n")
    arguments = [folder / "f16.gguf", folder / "fsdd", "--types", "f16", "q4_k", "--sequences", 2, "--imatrix-clips", 1]
    arguments += ["--ablate", "--out", tmp_path, "--readme", readme]
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, arguments)])
    quality.main()
    facts = json.loads((tmp_path / "quality.json").read_text())
    names = [(row["kind"], row["name"], row["imatrix"]) for row in facts["rows"]]
    assert names[:3] == [("type", "f16", False), ("type", "q4_k", False), ("type", "q4_k", True)]
    assert [name for kind, name, _ in names[3:] if kind == "ablation"] == [
        "no time markers", "DeepStack inputs shuffled", "DeepStack inputs dropped",
    ]  # fmt: skip
    for row in facts["rows"]:
        for speakers in ("heard", "unheard"):
            scores = row[speakers]
            assert scores["words"]["n_words"] == scores["times"]["n_boundaries"] / 2 >= 10
            assert scores["words"]["wer"] > 0
            assert 0 <= scores["count"] <= 1
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    table = lines[2:-2]
    assert len(table) == 2 + 3
    assert all(line.count("|") == 2 + 1 + len(quality.COLUMNS) for line in table)
    assert table[4].startswith("| q4_k + importance | ")
    assert "| no time markers |  | " in capsys.readouterr().out


def test_what_is_taken_away(folder: Path, tmp_path: Path) -> None:
    """Nothing else of the file changes, and the logits show each change."""
    model = folder / "f16.gguf"
    files = quality_asks.take_away(model, tmp_path)
    assert files.pop("no time markers") == (model, {"time_markers": False})
    (shuffled, _), (dropped, _) = files.values()
    with open_gguf(model) as base, open_gguf(shuffled) as turned, open_gguf(dropped) as silent:
        assert base.tensors == turned.tensors == silent.tensors
        for name in base.tensors:
            data = base.data(name)
            assert np.array_equal(turned.data(name), data)
            assert np.array_equal(silent.data(name), data) != (name.startswith("deepstack.") and ".down." in name)
        taps = {f"moss_audio.deepstack.tap.{k}": (k + 1) % 3 for k in range(3)}
        for key, value in base.metadata.items():
            assert np.array_equal(turned.metadata[key], taps.get(key, value)), key
            assert np.array_equal(silent.metadata[key], value), key
    rows = []
    for path in (model, shuffled, dropped):
        with load(path, backend="reference", n_ctx=256) as opened:
            rows.append([r.numpy() for r in opened.runtime.encode(opened.listen(synthetic(1, 16_000), 16_000).mels)])
    base, turned, silent = rows
    for k in range(4):
        assert np.array_equal(turned[k], base[k]) == (k == 0)
        assert np.array_equal(silent[k], base[k] if k == 0 else 0 * base[k])


def test_a_file_of_blocks_is_not_silenced(folder: Path, tmp_path: Path) -> None:
    quantised = quality_asks.quantise(folder / "f16.gguf", tmp_path / "q8_0.gguf", "q8_0")
    with pytest.raises(AssertionError, match=r"deepstack\.0"):
        quality_asks.change(quantised, tmp_path / "out.gguf", {}, ["deepstack.0.down.weight"])
    assert not (tmp_path / "out.gguf").exists()


def test_importance_is_of_the_training_recordings(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_asks, "LIMITS", {"transcribe": 2, "timestamps": 2})
    found = quality_asks.collect(folder / "f16.gguf", folder / "fsdd", tmp_path, 2, 0)
    with open_gguf(folder / "f16.gguf") as file:
        assert all(values.shape == file.tensors[name].shape[-1:] for name, values in found.items())
    assert "llm.lm_head.weight" in found
    assert "deepstack.2.down.weight" in found
    assert len(list(tmp_path.glob("train-*.wav"))) == 2
