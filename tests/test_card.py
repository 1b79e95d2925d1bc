"""`benchmarks/card.py` where there is no card: what is kept of processes that crash, hang or are cut short, the page,
and the way to the package in a checkout that is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import card
import card_report
import card_worker
import roofline
from card_steps import Journal, run_steps
from card_worker import Worker, run_workers

BENCHMARKS = ROOT / "benchmarks"
SCRIPT = """
import argparse, os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from card_steps import Journal, run_steps

parser = argparse.ArgumentParser()
for name in ("--results", "--claims", "--started"):
    parser.add_argument(name)
a = parser.parse_args()


def hang():
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path({marks!r}, "child").write_text(str(child.pid))
    time.sleep(600)


def wrong():
    assert 1 == 2, "one is not two"


def crash():
    os.abort()


def fail():
    raise RuntimeError("an illegal memory access was encountered")


steps = dict(first=lambda: dict(value=1), wrong=wrong, fail=fail, crash=crash, hang=hang, last=lambda: None)
run_steps({{name: steps[name] for name in {names!r}.split()}}, Journal(Path(a.results), Path(a.claims)))
"""


def worker(tmp_path: Path, names: str, step_s: float = 60.0, name: str = "w") -> Worker:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS), marks=str(tmp_path), names=names))
    return Worker(name, [sys.executable, path, "--claims", tmp_path / "claims"], tmp_path / "logs", step_s)


def soon(seconds: float = 120.0) -> float:
    return time.monotonic() + seconds


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked about yet counts."""
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(") ")[2][0] == "Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


# Workers.


def test_what_ends_a_process_is_a_result_and_the_rest_is_done(tmp_path: Path) -> None:
    w = worker(tmp_path, "first wrong fail crash last")
    assert run_workers([w], soon())
    rows = {row["step"]: row for row in w.finished()}
    assert {name: row["ok"] for name, row in rows.items()} == {
        "first": True, "wrong": False, "fail": False, "crash": False, "last": True,
    }  # fmt: skip
    assert rows["first"]["value"] == 1
    assert "one is not two" in rows["wrong"]["failure"]
    assert "illegal memory access" in rows["fail"]["failure"]
    assert "SIGABRT" in rows["crash"]["failure"]
    assert w.starts == 3  # a wrong result ends no process


@needs_proc
def test_a_step_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    w = worker(tmp_path, "first hang last", step_s=3.0)
    assert run_workers([w], soon())
    rows = {row["step"]: row for row in w.finished()}
    assert "longer than 3 s" in rows["hang"]["failure"]
    assert rows["last"]["ok"]
    assert gone(int((tmp_path / "child").read_text()))


@needs_proc
def test_a_stage_is_cut_short_and_keeps_what_it_has(tmp_path: Path) -> None:
    w = worker(tmp_path, "first hang last")
    w.start()
    end = soon()
    while not (tmp_path / "child").exists() and time.monotonic() < end:
        w.poll()
        time.sleep(0.05)
    pid = w.process.pid
    w.stop("cut off by the time limit of the stage")
    assert [(row["step"], row["ok"]) for row in w.finished()] == [("first", True), ("hang", False)]
    assert "time limit" in w.finished()[-1]["failure"]
    assert gone(pid)


DEAF = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1]).write_text("")
time.sleep(600)
"""


@needs_proc
def test_those_that_do_not_listen_are_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_worker, "GRACE_S", 0.5)
    names = [f"deaf{i}" for i in range(3)]
    workers = [Worker(n, [sys.executable, "-c", DEAF, tmp_path / n], tmp_path / "logs", 60) for n in names]
    for w in workers:
        w.start()
    end = soon()
    while not all((tmp_path / n).exists() for n in names):
        assert time.monotonic() < end
        time.sleep(0.05)
    pids = [w.process.pid for w in workers]
    card_worker.stop_all(workers, "over")
    assert all(map(gone, pids))
    assert all("over" in w.note for w in workers)


def test_run_workers_says_when_it_cut_short(tmp_path: Path) -> None:
    w = worker(tmp_path, "hang")
    assert not run_workers([w], soon(0.5))
    assert w.process is None


def test_one_that_has_ended_well_is_not_told_as_ended(tmp_path: Path) -> None:
    w = worker(tmp_path, "first")
    w.start()
    w.process.wait()
    w.stop("over")
    assert (w.process, w.note, [row["ok"] for row in w.finished()]) == (None, "", [True])


def test_a_command_that_cannot_start_is_told_and_not_repeated(tmp_path: Path) -> None:
    w = Worker("w", [sys.executable, "-c", "raise SystemExit('no such card')"], tmp_path / "logs", 60)
    assert run_workers([w], soon())
    assert (w.starts, w.finished()) == (1, [])
    assert "no such card" in w.note


def test_several_processes_share_one_list(tmp_path: Path) -> None:
    done = []
    for name in "ab":
        journal = Journal(tmp_path / f"{name}.jsonl", tmp_path / "claims")
        run_steps({step: lambda: None for step in ("x y", "x/y", "z")}, journal)
        path = tmp_path / f"{name}.jsonl"
        done.append([json.loads(line)["begin"] for line in path.open() if "begin" in line] if path.exists() else [])
    assert done == [["x y", "x/y", "z"], []]


def test_a_line_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    w = worker(tmp_path, "first")
    assert run_workers([w], soon())
    with open(w.results, "a") as file:
        file.write('{"step": "ha')
    assert [row["step"] for row in w.finished()] == ["first"]


# Runs.


def make_run(tmp_path: Path, **options: object) -> card.Run:
    (tmp_path / "out").mkdir(exist_ok=True)
    wanted = {"minutes": 8.0, "stages": ("facts",), "golden": None, "rehearse": True} | options
    return card.Run(tmp_path / "out", tmp_path / "work", **wanted)


def test_a_stage_without_time_is_left_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, minutes=0.05)
    card.run_all(run)
    assert "left out" in capsys.readouterr().out
    assert "left out" in json.loads((run.out / "card.json").read_text())["stages"]["facts"]["note"]


@pytest.mark.parametrize(("minutes", "share"), [(8.0, 1.0), (4.0, 0.5), (30.0, 1.0)])
def test_stages_have_their_share_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, share: float
) -> None:
    run, given = make_run(tmp_path, minutes=minutes, rehearse=False), []
    monkeypatch.setitem(card.RUNNERS, "cases", lambda run, deadline: given.append(deadline - time.monotonic()))
    card.run_stage(run, "cases")
    assert given[0] == pytest.approx(share * card.STAGE_S["cases"], abs=2)


def test_results_are_on_disk_after_each_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.work.mkdir()
    w = worker(run.work, "first wrong")
    assert run_workers([w], soon())
    run.note("facts", [w], 1.5)
    document = json.loads((run.out / "card.json").read_text())
    assert [row["step"] for row in document["stages"]["facts"]["steps"]] == ["first", "wrong"]
    assert "facts: 2 steps, 1 not well" in (run.out / "card.txt").read_text()
    with tarfile.open(run.out / "logs.tar.gz") as file:
        assert {"logs/w.jsonl", "logs/w.log"} <= set(file.getnames())
    assert len(list(run.out.iterdir())) <= card.MOST_FILES


@needs_proc
def test_a_run_that_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r}); sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
import card
from card_worker import run_workers, Worker
from test_card import worker
def run_all(run):
    run.workers.append(worker(Path({str(tmp_path)!r}), "hang"))
    run_workers(run.workers, float("inf"))
card.run_all = run_all
card.main(["--out", {str(tmp_path / "out")!r}, "--work", {str(tmp_path / "work")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    end = soon()
    while not (tmp_path / "child").exists():
        assert time.monotonic() < end, process.stderr
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert gone(int((tmp_path / "child").read_text()))


def test_unknown_stages_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        card.parse_arguments(["--out", "x", "--stages", "facts,tests"])
    assert caught.value.code == 2
    assert "no stage 'tests'; there are: facts, cases" in capsys.readouterr().err
    assert card.parse_arguments(["--out", "x", "--skip", "tune"]).stages == tuple(card.STAGE_S)[:-1]


def test_the_cache_of_a_run_serves_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "CACHES", tmp_path / "here")
    kernel = tmp_path / "here" / "triton" / "abc"
    kernel.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "__grp__k.json", "k.ttir"):
        (kernel / name).write_text(name)
    card.archive(tmp_path / "here" / "triton", tmp_path / "cache.tar.gz", card.KEPT_SUFFIXES)
    for path in kernel.iterdir():
        path.unlink()
    card.unpack_cache(tmp_path / "cache.tar.gz")
    assert sorted(path.name for path in kernel.iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]


# The page.


def ok(step: str, **more: object) -> dict:
    return {"step": step, "ok": True, **more}


@pytest.fixture
def document() -> dict:
    """Of a card that nobody knows, with round figures."""
    product = {"type": "Q4_K", "green": True, "weight_bytes": 10, "case": "gate_up"}
    rows = [
        product | {"tokens": 1, "us": 10.0, "bytes_per_s": 7e11, "flops_per_s": 1e12},
        product | {"tokens": 8, "us": 12.0, "bytes_per_s": 6e11, "flops_per_s": 8e12},
        product | {"tokens": 512, "us": 100.0, "bytes_per_s": 1e11, "flops_per_s": 5e13},
    ]
    peers = [{"case": "gate_up", "tokens": n, "bf16_us": us} for n, us in ((1, 30.0), (512, 55.0))]
    clip = {"clip_s": 11.0, "encoder_s": 0.01, "prefill_s": 0.02, "first_token_s": 0.05, "prompt_tokens": 150}
    clip |= {"step_s": 0.002, "peak_bytes": 103, "planned_bytes": 110, "planned_without_libraries": 100}
    work = {"q4_k_all, decode at 200": {"weight_bytes": 9e8, "cache_bytes": 1e8}}
    stages = {
        "facts": [
            ok("environment", gpu="NVIDIA Unheard Of 9000", versions={"torch": "1"}),
            ok("ceilings", copy_bytes_per_s=1e12, matmul_flops_per_s=1e14),
        ],
        "work": [ok("work", **work)],
        "cases": [ok("a"), {"step": "b", "ok": False, "error": 0.5, "limit": 0.1}],
        "pytest": [ok("c", skipped=True), {"step": "d", "ok": False, "failure": "x\nAssertionError: 1 != 2"}],
        "kernels": [ok("gate_up Q4_K", rows=rows), ok("gate_up peers", rows=peers)],
        "requests-q4_k_all": [
            ok("first request", **clip),
            ok("clip", **clip),
            ok("contexts", rows=[{"context": 200, "step_s": 0.002}]),
        ],
        "peer": [ok("clip", first_token_s=0.2), ok("static at 200", step_s=0.02), ok("peak", peak_bytes=400)],
        "compiled-peer": [ok("compiled at 200", step_s=0.003)],
    }
    return {"stages": {name: {"steps": steps, "seconds": 1, "note": ""} for name, steps in stages.items()}}


def test_each_goal_stands_beside_its_figure(document: dict) -> None:
    found = {goal.name: (goal.figure, goal.verdict) for goal in card_report.goals(document)}
    assert found == {
        "cases that are not green": (2, "MISS"),
        "head (Q6_K), of copy bandwidth": (None, "not measured"),
        "head (Q4_K), of copy bandwidth": (None, "not measured"),
        "gate|up (Q4_K), of copy bandwidth": (0.7, "pass"),
        "decode step at 200, of copy bandwidth": (pytest.approx(0.5), "MISS"),
        "eight tokens over one, gate|up (Q4_K)": (1.2, "pass"),
        "decode, times transformers eager": (10.0, "pass"),
        "decode, times transformers compiled": (1.5, "MISS"),
        "mat-mat at 512 tokens, worst of bf16 matmul": (0.55, "MISS"),
        "first token of 11 s, of transformers'": (0.25, "pass"),
        "peak over plan": (1.03, "pass"),
        "peak, of transformers'": (pytest.approx(103 / 400), "pass"),
    }


def test_the_page_names_what_is_wrong_and_the_card(document: dict) -> None:
    page = card_report.make_page(document)
    assert page.startswith("# NVIDIA Unheard Of 9000\n")
    assert "- cases: b: error 5.00e-01, at most 1.0e-01" in page
    assert "- pytest: d: AssertionError: 1 != 2" in page
    assert "| gate_up | Q4_K | 512 | 100.0 | 100 | 10% | 0.55 | 55.0 |  |" in page
    assert "decode at 200: 500.0 tokens/s, 2.000 ms" in page
    assert "RTX 4090: 454 tokens/s on paper" in page


def test_a_page_of_nothing_says_that_nothing_was_measured() -> None:
    page = card_report.make_page({"stages": {}})
    assert page.startswith("# an unknown card\n")
    assert page.count("not measured") == len(card_report.goals({"stages": {}}))
    assert not card_report.plot_roofline({"stages": {}}, Path("nowhere.png"))


def test_the_plot(document: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert card_report.plot_roofline(document, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_cards_of_data_centres_are_in_the_roofline() -> None:
    rates = {c.name: c.bytes_per_s for c in roofline.CARDS}
    assert rates["H200"] > rates["H100"] > rates["A100 80GB"]


# The package in a checkout that is not installed.

ABSENT = ("soundfile", "soxr", "numba", "sentencepiece", "gguf", "matplotlib", "rich", "typer", "transformers")


def test_a_checkout_is_importable_without_being_installed(tmp_path: Path) -> None:
    """With nothing of this environment on the path but NumPy and what it needs here, and in a process started there."""
    inner = "import auricle.engine, auricle.engine.session, auricle.tools.bench; print(auricle.engine.__file__)"
    code = f"""
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__ + getattr(f, "__module__", "")]
sys.path[:] = [p for p in sys.path if "editable" not in p]
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
import checkout
checkout.link_auricle(Path({str(tmp_path)!r}))
{inner}
import subprocess
subprocess.run([sys.executable, "-S", "-c", "import auricle.kernels.errors as e; print(e.__file__)"], check=True)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line.startswith(str(tmp_path / "auricle"))
    assert len(done.stdout.splitlines()) == 2


def test_a_link_goes_before_what_is_installed(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import checkout; from pathlib import Path; "
    code += f"checkout.link_auricle(Path({str(tmp_path)!r})); import auricle.kernels.errors as e; print(e.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "auricle"))
