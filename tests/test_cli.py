"""The program as a user meets it: run in its own process, with good and with bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from auricle.engine import load
from auricle.engine.sampling import OptionError
from auricle.tools.cli.answer import split_question
from auricle.tools.cli.options import format_bytes, parse_duration
from auricle.tools.sample import SampleShape, write_checkpoint
from sounds import JFK, encode, synthetic
from support import ROOT

GEORGE = ROOT / "tools/demo/george.flac"
SHAPE = SampleShape(
    n_layer=2, enc_n_layer=3, taps=(0, 1), n_inject=2, enc_d_model=256, enc_d_out=256, d_adapter=256
)  # fmt: skip


def auricle(*arguments: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "auricle.tools", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and the model that the command line made of it."""
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "checkpoint", SHAPE)
    done = auricle("convert", folder / "checkpoint", "-o", folder / "model.gguf", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    assert auricle("warmup", "-m", folder / "model.gguf").returncode == 0
    return folder


def test_transcribe_prints_text_and_nothing_else_on_stdout(folder: Path) -> None:
    model = folder / "model.gguf"
    done = auricle("transcribe", JFK, "-m", model, "--max-new-tokens", 12)
    with load(model) as opened:
        want = opened.generate(audio=JFK, max_new_tokens=12)
    assert done.stdout.decode() == want.text + "\n"
    line = f"auricle: {JFK}: the answer was cut off after 12 tokens; --max-new-tokens allows more\n"
    assert (done.returncode, done.stderr.decode()) == (9, line)


def test_an_answer_that_ends_by_itself_is_all_there_is_to_say() -> None:
    done = auricle("transcribe", GEORGE, "-m", "demo")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1


def test_a_full_context_is_said(folder: Path) -> None:
    model = folder / "model.gguf"
    with load(model) as opened:
        n_ctx = len(opened.build_prompt("What?", opened.listen(JFK)).ids) + 3
    done = auricle("ask", JFK, "What?", "-m", model, "--ctx", n_ctx, "--json")
    assert done.returncode == 9
    assert json.loads(done.stdout)["finish_reason"] == "length"
    assert f"cut off after 3 tokens: the context of {n_ctx} is full" in done.stderr.decode()


def test_json_has_one_document_a_line_and_file(folder: Path) -> None:
    model, short = folder / "model.gguf", folder / "short.wav"
    soundfile.write(short, synthetic(1.5, 16_000), 16_000)
    done = auricle("transcribe", JFK, short, "-m", model, "--max-new-tokens", 4, "--json")
    documents = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [d["file"] for d in documents] == [str(JFK), str(short)]
    fields = {
        "model", "file", "text", "token_ids", "reasoning", "segments",
        "audio_seconds", "prompt_tokens", "finish_reason", "timings",
    }  # fmt: skip
    assert all(set(d) == fields for d in documents)
    assert documents[0]["audio_seconds"] == 11.0
    assert documents[1]["audio_seconds"] == 1.5
    assert documents[0]["finish_reason"] == "length"
    assert len(documents[0]["token_ids"]) == 4


def test_precisions_and_warmup(folder: Path) -> None:
    model = folder / "model.gguf"
    done = auricle("warmup", "-m", model)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.decode().splitlines()
    assert lines[-1].startswith("auricle: ready after "), lines
    with load(model, backend="reference", kv_type="f32") as reference:
        want = reference.generate(audio=JFK, max_new_tokens=8).token_ids
    asked = ("-m", model, "--max-new-tokens", 8, "--json", "--kv-type", "f32")
    done = auricle("transcribe", JFK, "--precision", "exact", *asked)
    assert tuple(json.loads(done.stdout)["token_ids"]) == want
    for precision in ("auto", "bf16"):
        assert len(json.loads(auricle("transcribe", JFK, "--precision", precision, *asked).stdout)["token_ids"]) == 8


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from auricle.tools.cli.main import run
run()
"""


def test_without_numba(folder: Path) -> None:
    """PyTorch does it all, slower, and says so once."""
    asked = ("transcribe", JFK, JFK, "-m", folder / "model.gguf", "--max-new-tokens", 8, "--kv-type", "f32")
    command = [sys.executable, "-c", WITHOUT_NUMBA, *map(str, asked)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    assert done.stderr.count(b"numba is not installed: everything runs in PyTorch") == 1
    assert done.stdout == auricle(*asked, "--precision", "exact").stdout


def test_one_bad_file_of_three_does_not_stop_the_others(folder: Path) -> None:
    short = folder / "short2.wav"
    soundfile.write(short, synthetic(0.5, 16_000), 16_000)
    arguments = (
        "transcribe",
        short,
        folder / "no.wav",
        short,
        "-m",
        folder / "model.gguf",
        "--max-new-tokens",
        2,
        "--json",
    )
    done = auricle(*arguments)
    documents = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert ["error" in d for d in documents] == [False, True, False]
    assert done.returncode == 4  # which goes before the 8 of the others, that were cut off
    lines = done.stderr.decode().splitlines()
    assert ["cut off" in line for line in lines] == [True, False, True]


def test_json_of_a_model_that_cannot_be_opened(folder: Path) -> None:
    """Each request has its line, as it has when only its audio is at fault."""
    for command, requests in ((["transcribe", JFK, "b.wav"], [str(JFK), "b.wav"]), (["ask", JFK, "What?"], [str(JFK)])):
        done = auricle(*command, "-m", folder / "no.gguf", "--json")
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 3
        assert [line["file"] for line in lines] == requests
        for line in lines:
            assert line["model"] == str(folder / "no.gguf")
            assert f"auricle: {line['error']}\n" == done.stderr.decode()


def test_stdin_and_sampling_with_a_seed(folder: Path) -> None:
    sound = encode(synthetic(2.0, 44_100, channels=2), 44_100, "flac")
    arguments = ("transcribe", "-", "-m", folder / "model.gguf", "--max-new-tokens", 6, "--temperature", 1)
    first, again = (auricle(*arguments, "--seed", 7, stdin=sound).stdout for _ in range(2))
    assert first == again != b""


def test_ask_with_and_without_audio(folder: Path) -> None:
    model = folder / "model.gguf"
    plain = auricle("ask", "-m", model, "What is a sound?", "--max-new-tokens", 3, "--json")
    assert json.loads(plain.stdout)["file"] is None
    assert json.loads(plain.stdout)["audio_seconds"] == 0
    both = auricle("ask", JFK, JFK, "What do you hear?", "-m", model, "--max-new-tokens", 3, "--json")
    assert json.loads(both.stdout)["audio_seconds"] == 22.0


def test_ask_without_a_question(folder: Path) -> None:
    done = auricle("ask", JFK, "-m", folder / "model.gguf")
    assert done.returncode == 2
    assert b"the question is missing" in done.stderr
    with pytest.raises(OptionError, match="question is missing"):
        split_question(["-"], None)
    assert split_question(["a.wav", "What?"], None) == (["a.wav"], "What?")
    assert split_question(["a.wav", "b.wav"], "What?") == (["a.wav", "b.wav"], "What?")


@pytest.fixture(scope="module")
def bad_inputs(folder: Path) -> dict[str, tuple[list[object], int, str]]:
    """Arguments, exit status, and what the line says."""
    model = folder / "model.gguf"
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound\n" * 20)
    mp3 = encode(synthetic(3.0, 44_100), 44_100, "mp3")
    (folder / "cut.mp3").write_bytes(mp3[: len(mp3) // 2])
    soundfile.write(folder / "blip.wav", synthetic(0.01, 16_000), 16_000)
    with_nan = synthetic(1.0, 16_000)
    with_nan[8_000] = np.nan
    soundfile.write(folder / "nan.wav", with_nan, 16_000, subtype="FLOAT")
    (folder / "cut.gguf").write_bytes(model.read_bytes()[:5_000])
    (folder / "other.gguf").write_bytes(model.read_bytes().replace(b"moss_audio", b"boss_audio"))

    def transcribe(name: str, *more: object) -> list[object]:
        return ["transcribe", folder / name, "-m", model, *more]

    return {
        "no such file": (transcribe("nothing.wav"), 4, "no such file"),
        "a directory": (transcribe("."), 4, "is a directory"),
        "an empty file": (transcribe("empty.wav"), 4, "is empty"),
        "text": (transcribe("text.wav"), 4, "is text, not audio"),
        "a truncated mp3": (transcribe("cut.mp3"), 4, "cut off"),
        "10 ms": (transcribe("blip.wav"), 4, "too short"),
        "NaN": (transcribe("nan.wav"), 4, "at 0.5000 s is NaN or infinite"),
        "a long prompt": (["transcribe", JFK, "-m", model, "--ctx", 64], 5, "the context holds 64"),
        "no model": (["transcribe", JFK, "-m", folder / "no.gguf"], 3, "cannot open"),
        "a cut model": (["transcribe", JFK, "-m", folder / "cut.gguf"], 3, "cut.gguf"),
        "another architecture": (["transcribe", JFK, "-m", folder / "other.gguf"], 3, "'boss_audio'"),
        "a model that is audio": (["transcribe", JFK, "-m", JFK], 3, "not a GGUF file"),
        "a temperature": (transcribe("blip.wav", "--temperature", "-1"), 2, "--temperature"),
        "a context": (transcribe("blip.wav", "--ctx", "99999999"), 2, "--ctx is 99999999"),
        "two prompts": (transcribe("blip.wav", "--timestamps", "--prompt", "What?"), 2, "leave out one"),
        "a cache type": (transcribe("blip.wav", "--kv-type", "q2"), 2, "f32, f16, q8_0"),
        "a backend": (transcribe("blip.wav", "--backend", "tpu"), 2, "there are: auto, cpu, cuda, reference"),
        "threads": (transcribe("blip.wav", "--threads", "0"), 2, "--threads is 0"),
        "no checkpoint": (["convert", folder / "nothing", "-o", folder / "x.gguf"], 6, "nothing"),
        "a weight type": (["convert", folder / "checkpoint", "-o", folder / "x.gguf", "--type", "q9"], 6, "q9"),
        "a duration": (["plan", "-m", model, "--audio", "long"], 2, "is no duration"),
        "a plan too long": (["plan", "-m", model, "--audio", "2h"], 5, "use shorter audio"),
        "a file to inspect": (["inspect", folder / "text.wav"], 3, "not a GGUF file"),
    }


BAD = [
    "no such file", "a directory", "an empty file", "text", "a truncated mp3", "10 ms", "NaN", "a long prompt",
    "no model", "a cut model", "another architecture", "a model that is audio", "a temperature", "a context",
    "two prompts", "a cache type", "a backend", "threads", "no checkpoint", "a weight type", "a duration",
    "a plan too long", "a file to inspect",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_a_status(bad_inputs, folder: Path, name: str) -> None:
    arguments, status, line = bad_inputs[name]
    done = auricle(*arguments)
    said = done.stderr.decode()
    assert done.returncode == status, said
    assert line in said
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    assert done.stdout == b""
    assert not list(folder.glob("x.gguf*"))


def test_all_bad_inputs_are_tried(bad_inputs) -> None:
    assert sorted(BAD) == sorted(bad_inputs)


def test_dry_run_names_every_tensor_and_the_exact_size(folder: Path) -> None:
    done = auricle("convert", folder / "checkpoint", "-o", folder / "dry.gguf", "--type", "q8_0", "--dry-run")
    assert not (folder / "dry.gguf").exists()
    size = (folder / "model.gguf").stat().st_size
    assert f"file: {size:,} bytes" in done.stdout.decode()
    with load(folder / "model.gguf") as model:
        names = list(model.file.tensors)
    assert all(f"{name} " in done.stdout.decode() for name in names)


def test_inspect(folder: Path) -> None:
    facts = json.loads(auricle("inspect", folder / "model.gguf", "--json").stdout)
    assert facts["metadata"]["general.architecture"] == "moss_audio"
    assert facts["tensor_bytes"] == sum(facts["bytes_by_part"].values()) == sum(t["bytes"] for t in facts["tensors"])
    page = auricle("inspect", folder / "model.gguf").stdout.decode()
    assert "llm.blk.1.ffn.down.weight" in page
    assert "tokenizer.ggml.tokens" in page


def test_version_and_help() -> None:
    assert auricle("--version").stdout.startswith(b"auricle 0.")
    assert all(
        word in auricle("--help").stdout.decode()
        for word in ("transcribe", "ask", "convert", "quantize", "inspect", "plan", "verify", "imatrix", "synth")
    )


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m auricle.tools inspect {folder / 'model.gguf'} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, check=False)
    assert done.stderr == b""


def test_durations_and_sizes() -> None:
    assert [parse_duration(t) for t in ("90", "90s", "10m", "1h", "1:30", "2.5 min")] == [90, 90, 600, 3600, 90, 150]
    with pytest.raises(OptionError):
        parse_duration("0s")
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(3 << 30) == "3.00 GiB"


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_an_interrupt_ends_with_130(folder: Path) -> None:
    import signal
    import time

    command = [sys.executable, "-m", "auricle.tools", "transcribe", *[JFK] * 50, "-m", folder / "model.gguf"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"Traceback" not in said


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":  # long before there is a command
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from auricle.tools.cli.main import run
run()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_an_interrupt_while_libraries_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
