"""`auricle convert`, `quantize` and `verify` as a user meets them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import support
from auricle.engine.gguf import open_gguf
from auricle.engine.models.moss_audio import part_of
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint

SHAPE = SampleShape(n_layer=3, d_ff=512, n_head=2, enc_n_layer=3)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def auricle(*arguments: object) -> Done:
    return Done(*support.auricle(*arguments))


def succeed(*arguments: object) -> Done:
    done = auricle(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def fail(status: int, message: str, *arguments: object) -> Done:
    done = auricle(*arguments)
    assert done.returncode == status, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    copy_checkpoint(folder / "checkpoint", SHAPE)
    succeed("convert", folder / "checkpoint", "-o", folder / "f16.gguf", "--type", "f16")
    return folder


def sizes(text: str, what: str) -> dict[str, int]:
    """The table whose first column is headed `what`."""
    table = re.search(rf"^{what} +bytes.*?\n\n", text, re.MULTILINE | re.DOTALL)[0]
    rows = [line.split() for line in table.strip().splitlines()[1:]]
    return {row[0]: int(row[1].replace(",", "")) for row in rows}


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_dry_run_tells_the_sizes_of_the_file(folder: Path, command: str) -> None:
    """By part and type, and the whole: to the byte, as the written file has them."""
    out = folder / f"{command}.gguf"
    given = {"convert": [folder / "checkpoint", "-o", out], "quantize": [folder / "f16.gguf", out]}[command]
    options = ["--type", "q4_k", "--tensor-type", "llm.blk.0.*=q5_0", "--jobs", 2]
    dry = succeed(command, *given, *options, "--dry-run")
    assert not out.exists()
    done = succeed(command, *given, *options)
    assert f"{out}: " in done.stderr
    assert done.stdout == ""
    parts: dict[str, int] = {}
    types: dict[str, int] = {}
    with open_gguf(out) as file:
        for info in file.tensors.values():
            parts[part_of(info.name)] = parts.get(part_of(info.name), 0) + info.nbytes
            types[info.format.name] = types.get(info.format.name, 0) + info.nbytes
    assert sizes(dry.stdout, "part") == parts
    assert sizes(dry.stdout, "type") == types
    assert f"file: {out.stat().st_size:,} bytes" in dry.stdout
    assert {"Q4_K", "Q5_0", "Q6_K", "Q8_0"} <= types.keys()
    assert not list(folder.glob(f"{command}.gguf.*"))


def test_convert_makes_q4_k_by_default(folder: Path) -> None:
    dry = succeed("convert", folder / "checkpoint", "-o", folder / "x.gguf", "--dry-run").stdout
    assert re.search(r"llm\.blk\.1\.ffn\.up\.weight +512 x 256 +BF16 +Q4_K +73,728", dry)


def test_bad_options(folder: Path) -> None:
    source, out = folder / "f16.gguf", folder / "bad.gguf"
    fail(6, "there is no type 'q9'", "quantize", source, out, "--type", "q9")
    fail(6, "no tensor's name matches 'x'", "quantize", source, out, "--tensor-type", "x=q8_0")
    fail(6, "there is no type 'q4_2'", "quantize", source, out, "--tensor-type", "*=q4_2")
    fail(3, "nothing.gguf.*No such file", "quantize", folder / "nothing.gguf", out)
    fail(8, "is an input itself", "quantize", source, source)
    fail(8, "nowhere is not a folder", "quantize", source, folder / "nowhere" / "x.gguf")
    assert not list(folder.glob("bad.gguf*"))


def test_quantising_twice_must_be_allowed(folder: Path) -> None:
    succeed("quantize", folder / "f16.gguf", folder / "q8.gguf", "--type", "q8_0")
    fail(6, "--allow-requantize", "quantize", folder / "q8.gguf", folder / "twice.gguf")
    succeed("quantize", folder / "q8.gguf", folder / "twice.gguf", "--allow-requantize")


def test_verify(folder: Path) -> None:
    model, manifest = folder / "f16.gguf", folder / "f16.sums"
    printed = succeed("verify", model)
    succeed("verify", model, "--write-manifest", manifest)
    assert printed.stdout == manifest.read_text()
    assert "all" in succeed("verify", model, "--manifest", manifest).stderr
    with open_gguf(model) as file:
        names = list(file.tensors)
        at = file.tensors["llm.blk.1.attn.q.weight"].offset
    assert [line.split("  ", 1)[1] for line in printed.stdout.splitlines()] == ["(metadata)", *names]
    raw = bytearray(model.read_bytes())
    raw[at + 100] ^= 4
    (folder / "damaged.gguf").write_bytes(raw)
    done = fail(3, r"1 of \d+ checksums of .* fail", "verify", folder / "damaged.gguf", "--manifest", manifest)
    assert done.stdout == "llm.blk.1.attn.q.weight: different\n"
    fail(3, "No such file", "verify", model, "--manifest", folder / "nothing")


def test_importance_from_a_file(folder: Path) -> None:
    """Any reader of importances will do that has `read_importance`; a file that is none is one line."""
    (folder / "text").write_text("nothing")
    fail(3, "not a GGUF file", "quantize", folder / "f16.gguf", folder / "x.gguf", "--imatrix", folder / "text")


def test_an_interruption_says_how_to_go_on(folder: Path) -> None:
    """Control-C while it writes, as from a terminal; `--resume` then gives what an uninterrupted run gives."""
    big, out = folder / "big", folder / "big.gguf"
    copy_checkpoint(big, SampleShape(n_layer=3, d_model=512, d_ff=2048))
    succeed("convert", big, "-o", folder / "whole.gguf", "--type", "q4_k_all")
    code = "import auricle.convert.journal as j; j.SYNC_BYTES = 1; from auricle.tools.cli.main import run; run()"
    command = [sys.executable, "-c", code, "convert", str(big), "-o", str(out), "--type", "q4_k_all", "--jobs", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        journal = Path(f"{out}.part.journal")
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 10):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert not out.exists()
    fail(6, "a conversion was interrupted here; continue with --resume", "convert", big, "-o", out)
    succeed("convert", big, "-o", out, "--type", "q4_k_all", "--resume")
    assert out.read_bytes() == (folder / "whole.gguf").read_bytes()
    assert not journal.exists()


def test_progress_on_a_terminal(folder: Path) -> None:
    """A bar with a rate and the time left, on stderr, when that is a terminal; see `folder` for when it is not."""
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "auricle.tools", "quantize", str(folder / "f16.gguf"), str(folder / "p.gguf")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stderr=secondary, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(secondary)
        shown = b""
        with open(primary, "rb", buffering=0) as terminal:
            while chunk := _read(terminal):
                shown += chunk
    assert process.returncode == 0
    assert b"writing" in shown
    assert b"100%" in shown


def _read(terminal: Any) -> bytes:
    try:
        return terminal.read(4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


def test_json_of_inspect_agrees(folder: Path) -> None:
    succeed("quantize", folder / "f16.gguf", folder / "i.gguf", "--type", "q6_k")
    facts = json.loads(succeed("inspect", folder / "i.gguf", "--json").stdout)
    assert facts["metadata"]["general.file_type"] == 18
    assert np.sum(list(facts["bytes_by_type"].values())) == facts["tensor_bytes"]
