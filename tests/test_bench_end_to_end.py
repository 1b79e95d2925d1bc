"""`benchmarks/end_to_end.py`: its jobs on a machine with few packages, the peer, and how both are compared."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from auricle.tools.synth import plan_synth, write_synth
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import end_to_end
import jobs
import peer_torch

BENCHMARKS = ROOT / "benchmarks"
# What the machines with a GPU do not have; sounds are arrays there.
ABSENT = ("soundfile", "soxr", "sentencepiece", "numba", "typer", "rich", "gguf", "hypothesis", "matplotlib")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_synth(plan_synth("tiny", "q4_k_all"), path)
    return path


def run_without(modules: tuple[str, ...], script: str, *arguments: object) -> str:
    """What a benchmark prints when importing some modules fails."""
    path = BENCHMARKS / script
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({modules!r})); sys.path.insert(0, {str(BENCHMARKS)!r}); "
        f"sys.argv = {[str(path), *map(str, arguments)]!r}; runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_jobs_need_few_packages(model: Path) -> None:
    arguments = ("--rounds", 1, "--threads", 1)
    clip = json.loads(run_without(ABSENT, "jobs.py", "clip", model, *arguments, "--sizes", 1))
    assert clip["clip_s"] == 1
    assert 0 < clip["encoder_s"] + clip["prefill_s"] < clip["first_token_s"]
    assert "peak_gpu_bytes" not in clip


def test_steps_after_each_context(model: Path) -> None:
    a = argparse.Namespace(model=model, backend="reference", threads=1, rounds=1, sizes=[10, 20])
    rows = jobs.job_contexts(a)
    assert [row["context"] for row in rows] == [10, 20]
    assert all(row["step_s"] > 0 for row in rows)


class InThisProcess:
    """A worker that is none."""

    def __init__(self, name: str, command: list[object], log: Path) -> None:
        _, _, model, threads, dtype, device = command
        self.name = name
        self.reference = peer_torch.Reference(str(model), int(threads), getattr(torch, dtype), device)

    def ask(self, task: str, **arguments: Any) -> Any:
        return getattr(self.reference, task)(**arguments)

    def close(self) -> None:
        pass


def test_the_peer_answers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--work", str(model.parent), "--clips", "1", "--contexts", "8", "--threads", "1"]
    a = end_to_end.parse_arguments(arguments)
    assert not a.peer
    monkeypatch.setattr(end_to_end, "PEER_STEPS", 2)
    monkeypatch.setattr(end_to_end, "Worker", InThisProcess)
    peer = end_to_end.measure_peer(a, model)
    (clip,), (step,) = peer["clips"], peer["contexts"]
    assert clip["clip_s"] == 1
    assert 0 < clip["encoder_s"] < clip["first_token_s"]
    assert step["context"] == 8
    assert step["step_s"] > 0
    assert peer["peak_bytes"] > 1 << 26


def test_a_gpu_brings_the_peer() -> None:
    assert end_to_end.parse_arguments(["--work", ".", "--device", "cuda"]).peer
    assert not end_to_end.parse_arguments(["--work", ".", "--device", "cuda", "--no-peer"]).peer


def test_comparison() -> None:
    ours = {"clip_s": 11, "encoder_s": 1.0, "first_token_s": 2.0, "peak_rss_bytes": 900, "peak_gpu_bytes": 300}
    theirs = {"clip_s": 11, "encoder_s": 3.0, "first_token_s": 8.0}
    configuration = {
        "clips": [ours],
        "contexts": [{"context": 200, "step_s": 0.001}],
        "peer": {"clips": [theirs], "contexts": [{"context": 200, "step_s": 0.005}], "peak_bytes": 1200},
    }
    assert end_to_end.compare_peer(configuration) == {
        "encoder_s of 11 s": 3,
        "first_token_s of 11 s": 4,
        "decode at 200": 5,
        "share of its memory": 0.25,
    }
