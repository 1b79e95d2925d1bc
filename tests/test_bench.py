"""`auricle bench`: what it prints, that a round is a whole request, and that bad input gets one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from auricle.engine import load
from auricle.engine.prompts import TASKS
from auricle.tools.bench import N_NEW, decode_steps, make_speech, run_bench, run_round
from auricle.tools.cli.bench import figure_table
from auricle.tools.cli.main import run
from auricle.tools.machine import describe_machine
from auricle.tools.synth import plan_synth, write_synth
from sounds import JFK

NUMBERS = {
    "imports_s", "load_s", "first_op_s", "mel_s", "encoder_s", "prefill_s", "first_token_s", "prefill_tokens_per_s",
    "decode_tokens_per_s", "real_time_factor", "peak_rss_bytes", "file_bytes", "clip_s", "prompt_tokens", "new_tokens",
    "rounds", "decode_bytes_per_token",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    write_synth(plan_synth("tiny", "q4_k"), path)
    return path


def test_the_last_line_is_one_document_that_fits_together(model_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "auricle.tools",
        "bench",
        "-m",
        model_path,
        "--seconds",
        "0.1",
        "--ctx",
        "512",
        "--json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("\n") == 1
    facts = json.loads(done.stdout.splitlines()[-1])
    assert {name for name in NUMBERS if not facts[name] > 0} == set()
    assert facts["rounds"] == 1
    assert facts["clip_s"] == 11.0
    assert facts["file_bytes"] == model_path.stat().st_size
    assert facts["load_s"] < facts["first_op_s"]
    stages = facts["mel_s"] + facts["encoder_s"] + facts["prefill_s"]
    assert stages < facts["first_token_s"] < stages + 0.5
    assert facts["prefill_tokens_per_s"] == pytest.approx(facts["prompt_tokens"] / facts["prefill_s"])
    decoding = (N_NEW - 1) / facts["decode_tokens_per_s"]
    assert facts["real_time_factor"] == pytest.approx((facts["first_token_s"] + decoding) / 11.0)
    assert 100e6 < facts["peak_rss_bytes"] < 1.5e9
    machine = facts["machine"]
    assert machine["cpu"]
    assert 1 <= machine["threads"] <= 4 * machine["cores"]
    assert 1e8 < machine["read_bytes_per_s"] < 1e13
    assert machine["versions"]["auricle"] == "0.1.0"
    assert machine["versions"]["python"] == sys.version.split()[0]
    assert "warming up" in done.stderr


def test_the_table_names_every_figure(
    model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["auricle", "bench", "-m", str(model_path), "--audio", str(JFK), "--seconds", "0.1", "--ctx", "512"]
    arguments += ["--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        run()
    page = capsys.readouterr().out
    assert ended.value.code in (0, None)
    for words in (
        "first run", "median of 1", "open to first op", "mel of 11.0 s", "encoder", "prefill of 181 tokens",
        "time to first token", "decode after 181 tokens", "real-time factor with 32 tokens", "peak memory", "GB/s",
        "1 used of",
    ):  # fmt: skip
        assert words in page, words


def test_medians_leave_the_first_run_out(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First tokens after 50 s, then 3, 1 and 2, until the clock says that the time is over."""
    from auricle.tools import bench

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock, lengths = Clock(), iter([50.0, 3.0, 1.0, 2.0, 50.0])

    def pretend(*_: object) -> bench.Round:
        length = next(lengths)
        clock.now += 2 * length
        return bench.Round(0.1, 0.2, 0.3, length, (length,), 10.0, 30)

    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "run_round", pretend)
    said: list[str] = []
    facts = run_bench(lambda: load(model_path, n_ctx=512), "cpu", None, 113.0, said.append)
    assert facts["rounds"] == 3
    assert facts["first_token_s"] == 2.0
    assert facts["real_time_factor"] == 0.4
    assert facts["first_run"]["first_token_s"] == 50.0
    assert len(said) == 4
    (header, rows) = figure_table(facts)
    assert header[2] == "median of 3"
    assert ("time to first token", "50.00 s", "2.00 s") in rows


def test_a_first_run_that_takes_long_is_the_only_one(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from auricle.tools import bench

    found = bench.Round(0.1, 0.2, 0.3, 90.0, (20.0, 20.0), 10.0, 30)
    monkeypatch.setattr(bench, "run_round", lambda *_: found)
    facts = run_bench(lambda: load(model_path, n_ctx=512), "cpu", None, 1.0, lambda _: None)
    assert facts["rounds"] == 1
    assert facts["decode_tokens_per_s"] == facts["first_run"]["decode_tokens_per_s"] == 0.05
    assert facts["real_time_factor"] == 13.0


def test_a_round_is_a_whole_request_and_no_token_ends_it(model_path: Path) -> None:
    with load(model_path, n_ctx=512) as model:
        model.stop_ids = frozenset()
        want = model.generate(audio=JFK, max_new_tokens=N_NEW)
        heard = model.listen(JFK)
        prompt = model.build_prompt(TASKS["transcribe"], heard)
        logits = model.runtime.prefill(prompt, model.runtime.encode(heard.mels))
        ids, _, steps = decode_steps(model, logits, len(prompt.ids), N_NEW)
        assert ids == list(want.token_ids)
        assert len(steps) == N_NEW - 1
        model.stop_ids = frozenset(range(model.tokenizer.n_tokens))
        found = run_round(model, JFK)
    assert len(found.steps_s) == N_NEW - 1
    assert found.prompt_tokens == want.prompt_tokens
    assert found.clip_s == 11.0


def test_made_speech_is_the_same_every_time_and_like_a_recording() -> None:
    sound = make_speech(3.0)
    assert sound.dtype == np.float32
    assert sound.shape == (48_000,)
    assert np.array_equal(sound, make_speech(3.0))
    assert 0.2 < np.abs(sound).max() < 1
    power = np.abs(np.fft.rfft(sound)) ** 2
    hz = np.fft.rfftfreq(len(sound), 1 / 16_000)
    assert power[(hz > 80) & (hz < 4_000)].sum() > 0.9 * power.sum()


def test_a_machine_is_told_in_plain_data() -> None:
    facts = describe_machine()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["-m", "MODEL", "--audio", "nothing.wav"], 4, "no such file"),
        (["-m", "MODEL", "--audio", "MODEL"], 4, "is a GGUF file, not audio"),
        (["-m", "nothing.gguf"], 3, "cannot open"),
        (["-m", str(JFK)], 3, "not a GGUF file"),
        (["-m", "MODEL", "--seconds", "0"], 2, "--seconds is 0"),
        (["-m", "MODEL", "--seconds", "nan"], 2, "--seconds is nan"),
        (["-m", "MODEL", "--threads", "0"], 2, "--threads is 0"),
        (["-m", "MODEL", "--backend", "tpu"], 2, "there are: auto, cpu, cuda, reference"),
        (["-m", "MODEL", "--kv-type", "q2"], 2, "f32, f16, q8_0"),
        (["-m", "MODEL", "--ctx", "200"], 5, "213 tokens and the context holds 200"),
    ],
)
def test_bad_input_gets_one_line(
    model_path: Path,
    arguments: list[str],
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = [str(model_path) if word == "MODEL" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["auricle", "bench", *chosen])
    with pytest.raises(SystemExit) as ended:
        run()
    out, said = capsys.readouterr()
    assert ended.value.code == status, said
    assert said.count("\n") == 1, said
    assert line in said
    assert out == ""
