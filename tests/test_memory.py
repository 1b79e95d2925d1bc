"""The plan is a promise: what `auricle plan` says is what a process really takes at its peak."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import AuricleError, load, memory
from auricle.engine.memory import peak_bytes
from auricle.engine.models.moss_audio import PART_NAMES, part_of
from auricle.tools.sample import SampleShape, write_checkpoint
from checkpoints import sparse_checkpoint

SECONDS = 60
LARGE = SampleShape(
    enc_d_model=512, enc_n_layer=8, enc_n_head=8, enc_d_ff=2048, enc_d_conv=128, enc_d_out=512, d_adapter=2048,
    d_model=1024, n_layer=10, n_head=16, n_kv_head=8, d_head=128, d_ff=3072, n_vocab=32_000,
)  # fmt: skip
RUN = """
import sys
from auricle.engine import load
from auricle.engine.memory import peak_bytes
with load(sys.argv[1], backend=sys.argv[2]) as model:
    model.generate(audio=sys.argv[3], max_new_tokens=4)
print(peak_bytes())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 MB of zeros in bf16: large enough that the interpreter is not most of it."""
    folder = tmp_path_factory.mktemp("large")
    convert(plan_conversion(sparse_checkpoint(folder / "checkpoint", LARGE), "bf16"), folder / "model.gguf")
    run_python("-m", "auricle.tools", "warmup", "-m", folder / "model.gguf")  # compiling takes memory of its own
    return folder / "model.gguf"


def run_python(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare_plan(model: Path, backend: str, seconds: int, within: float) -> None:
    """Plans a request, makes it in another process, and compares the peaks."""
    sound = model.parent / f"{seconds}s.wav"
    noise = np.random.default_rng(0).integers(-3_000, 3_000, seconds * 16_000, np.int16)
    soundfile.write(sound, noise, 16_000)
    options = ("--audio", f"{seconds}s", "--max-new-tokens", 4, "--backend", backend, "--json")
    planned = json.loads(run_python("-m", "auricle.tools", "plan", "-m", model, *options))
    measured = int(run_python("-c", RUN, model, backend, sound))
    assert planned["total"] == pytest.approx(measured, rel=within), json.dumps({**planned, "measured": measured})


# The reference runs definitions whose temporaries are PyTorch's own: what the C allocator keeps of them is not planned.
@pytest.mark.parametrize(
    ("backend", "seconds", "within"), [("cpu", 10, 0.05), ("cpu", SECONDS, 0.05), ("reference", SECONDS, 0.10)]
)
def test_the_measured_peak_is_the_planned_one(model: Path, backend: str, seconds: int, within: float) -> None:
    compare_plan(model, backend, seconds, within)


def test_ten_minutes_of_audio(tmp_path: Path) -> None:
    """With a small model the cache and the audio are most of what is planned."""
    write_checkpoint(tmp_path / "checkpoint")
    convert(plan_conversion(tmp_path / "checkpoint", "q8_0"), tmp_path / "model.gguf")
    compare_plan(tmp_path / "model.gguf", "cpu", 600, 0.05)


def test_parts_cover_the_file(model: Path) -> None:
    with load(model) as opened:
        assert {part_of(name) for name in opened.file.tensors} == set(PART_NAMES)
        planned = opened.plan([SECONDS])
        stored = sum(t.nbytes for t in opened.file.tensors.values())
        read_in_part = sum(t.nbytes for t in opened.file.tensors.values() if part_of(t.name) == "embedding")
    assert sum(planned.weights.values()) - planned.weights["embedding"] == stored - read_in_part
    parts = (planned.kv_cache, planned.arena, planned.libraries, planned.audio)
    assert planned.total == sum(planned.weights.values()) + sum(parts)


def test_what_libraries_free_after_encoding_is_not_counted_beside_the_decoder(model: Path) -> None:
    """The convolutions' work space is gone when the decoder's weights and the cache are there."""
    with load(model, backend="cpu") as opened:
        backend = replace(opened.backend, window_batch=8)
        request = memory.Request((100 * SECONDS,), n_prompt=900, n_distinct=20, n_new=4)
        drafts = memory.request_drafts(opened.config, backend, request)
        planned = memory.plan_request(opened.file, opened.config, backend, opened.kv_format, request)
    hearing, writing = (max(d.plan.transient_bytes for d in drafts[phase]) for phase in ("encoder", "decoder"))
    late = planned.kv_cache + sum(planned.weights[part] for part in ("decoder", "head", "embedding", "other"))
    assert memory.KEPT_BYTES < hearing < late
    assert planned.libraries == writing + memory.KEPT_BYTES


def test_nothing_runs_and_little_is_read(model: Path) -> None:
    with load(model) as opened:
        before = peak_bytes()
        opened.plan([600.0])
        assert peak_bytes() - before < 60 << 20
        with pytest.raises(AuricleError, match="use shorter audio"):
            opened.plan([3600.0])


def test_parts_grow_as_they_should(model: Path) -> None:
    with load(model) as opened:
        one, ten, none = (opened.plan(clips) for clips in ([60.0], [600.0], []))
    assert ten.kv_cache > 4 * one.kv_cache
    assert ten.audio == 10 * one.audio
    assert ten.weights["encoder"] == one.weights["encoder"] > none.weights["encoder"] == 0
    assert none.audio == 0
