"""No command writes over what it reads, under whatever name, nor leaves half of a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from auricle.convert.importance import ColumnSums, ImportanceMatrix, write_matrix
from auricle.engine.gguf import open_gguf
from auricle.tools.demo import FOLDER, MODEL
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint
from support import auricle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind of file that commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model.gguf").write_bytes(MODEL.read_bytes())
    (folder / "clip.flac").write_bytes((FOLDER / "yweweler.flac").read_bytes())
    with open_gguf(MODEL) as file:
        name, info = next((n, t) for n, t in file.tensors.items() if n.endswith("ffn.down.weight"))
    sums = {name: ColumnSums(np.ones(info.shape[-1]), 3)}
    write_matrix(folder / "matrix.gguf", ImportanceMatrix(sums, ("clip",)))
    copy_checkpoint(folder / "checkpoint", SampleShape(n_layer=3, d_ff=512, n_head=2, enc_n_layer=3))
    assert auricle("verify", folder / "model.gguf", "--write-manifest", folder / "sums")[0] == 0
    (folder / "hard").hardlink_to(folder / "model.gguf")
    (folder / "soft").symlink_to("checkpoint/config.json")
    (folder / "model.gguf.part").write_bytes(MODEL.read_bytes())
    (folder / "data.jsonl").write_text("{}\n")
    return folder


Make = Callable[[Path], list[object]]
OVER: dict[str, Make] = {
    "a manifest over its model": lambda f: ["verify", f / "model.gguf", "--write-manifest", f / "model.gguf"],
    "a manifest over the model's other name": lambda f: ["verify", f / "model.gguf", "--write-manifest", f / "hard"],
    "a manifest over the manifest": lambda f: [
        "verify", f / "model.gguf", "--manifest", f / "sums", "--write-manifest", f / "sums"
    ],
    "quantize over its model": lambda f: ["quantize", f / "model.gguf", f / "hard", "--type", "q8_0"],
    "quantize over the matrix": lambda f: [
        "quantize", f / "model.gguf", f / "matrix.gguf", "--imatrix", f / "matrix.gguf", "--type", "q8_0"
    ],
    "quantize whose part is its model": lambda f: ["quantize", f / "model.gguf.part", f / "model.gguf"],
    "convert over a file of the checkpoint": lambda f: [
        "convert", f / "checkpoint", "-o", f / "checkpoint" / "config.json"
    ],
    "convert over a link to one": lambda f: ["convert", f / "checkpoint", "-o", f / "soft"],
    "a matrix over its clip": lambda f: ["imatrix", f / "clip.flac", "-m", f / "model.gguf", "-o", f / "clip.flac"],
    "a page over the model": lambda f: [
        "diff", f / "model.gguf", f / "clip.flac", "--against", MODEL, "--html", f / "hard"
    ],
    "a page over the checkpoint": lambda f: [
        "diff", f / "model.gguf", f / "clip.flac", "--checkpoint", f / "checkpoint", "--html", f / "soft"
    ],
    "a report over the clip": lambda f: [
        "diff", f / "model.gguf", f / "clip.flac", "--against", MODEL, "--sensitivity", f / "clip.flac"
    ],
    "a page and a report in one file": lambda f: [
        "diff", f / "model.gguf", f / "clip.flac", "--against", MODEL, "--sensitivity", f / "x", "--html", f / "." / "x"
    ],
    "a model in a folder that is not there": lambda f: ["synth", "--shape", "tiny", "-o", f / "no" / "x.gguf"],
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", OVER)
def test_nothing_that_is_read_is_written_over(folder: Path, case: str) -> None:
    before = contents(folder)
    status, out, errors = auricle(*OVER[case](folder))
    assert (status, out) == (8, ""), errors
    assert errors.splitlines()[-1].startswith("auricle: ")
    assert "write to another path" in errors or "give each output its own" in errors or "make it first" in errors
    assert contents(folder) == before


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "sums").write_text("before")
    monkeypatch.setattr(os, "write", fail)
    status, _, errors = auricle("verify", folder / "model.gguf", "--write-manifest", tmp_path / "sums")
    assert status == 8
    assert errors == f"auricle: cannot write {tmp_path}/sums: No space left on device; make room or write elsewhere\n"
    assert contents(tmp_path) == {"sums": b"before"}


def test_a_manifest_on_stdout(folder: Path) -> None:
    printed = auricle("verify", folder / "model.gguf")
    assert printed[0] == 0
    assert auricle("verify", folder / "model.gguf", "--write-manifest", "-") == printed
    assert not Path("-").exists()
    status, _, errors = auricle("synth", "--shape", "tiny", "-o", "-")
    assert (status, "- is stdout" in errors) == (8, True)


def test_a_link_to_write_through(folder: Path, tmp_path: Path) -> None:
    """What a link points to is made, with its work beside it, and the link stays."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out.gguf").symlink_to("real/model.gguf")
    status, _, errors = auricle("quantize", folder / "model.gguf", tmp_path / "out.gguf", "--type", "q8_0")
    assert status == 0, errors
    assert (tmp_path / "out.gguf").is_symlink()
    assert os.listdir(tmp_path / "real") == ["model.gguf"]


def test_training_keeps_its_hands_off(folder: Path, tmp_path: Path) -> None:
    """An output folder whose files are other names of the inputs."""
    pytest.importorskip("peft")
    (tmp_path / "curves.csv").hardlink_to(folder / "data.jsonl")
    inputs = ("--model-dir", folder / "checkpoint", "--data-path", folder / "data.jsonl")
    status, _, errors = auricle("finetune", *inputs, "--output-dir", tmp_path)
    assert (status, errors.count("\n")) == (8, 1), errors
    assert "curves.csv is the input" in errors
    assert (folder / "data.jsonl").read_text() == "{}\n"
