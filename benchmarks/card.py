"""Is this engine right and fast on my card? One command, on any machine with an NVIDIA GPU, proves and measures it.

    python benchmarks/card.py --out DIR                       # about 8 minutes; --minutes says how long at most
    python benchmarks/card.py --out DIR --stages kernels      # some stages only; --skip leaves some out
    python benchmarks/card.py --pack DIR                      # recordings as arrays, for a machine that reads no sound
    python benchmarks/card.py --out DIR --rehearse            # without a card: every stage, tiny, interpreted

Needs neither network nor installation beyond torch, triton, numpy, safetensors and tokenizers (transformers for the
stage that measures beside it, matplotlib for the plot). Stages run in processes of their own, the most valuable first;
one that crashes, hangs or runs out of time loses what it was at, and nothing else. DIR gets `card.json` (all figures),
`card.txt` (one page: each goal beside its figure), `roofline.png`, `logs.tar.gz`, the tuned table and `cache.tar.gz`
(compiled kernels); document, page and logs are written anew after each stage. Ends with status 1 where a case is not
green.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from card_report import count_cases, goals, make_page, plot_roofline, summary_line, why
from card_worker import Worker, run_workers, stop_all, wait_for
from checkout import ROOT

HERE = Path(__file__).parent
GOLDEN = ROOT / ".card" / "golden_a"
RECIPES = ("q4_k_all", "q4_k")
MOST_FILES = 8
STAGE_S = {  # seconds of each stage at most, of a run of FULL_MINUTES; shorter runs give each its share
    "facts": 45,
    "cases": 170,
    "kernels": 90,
    "requests": 120,
    "peer": 100,
    "profile": 50,
    "cold": 90,
    "tune": 3600,
}
FULL_MINUTES = 8.0
CACHES = Path(tempfile.gettempdir()) / "auricle-card-cache"  # of compiled kernels, which know the place they lie in
KEPT_SUFFIXES = (".cubin", ".json", ".so", ".py")  # of them, in the archive that another run may begin with
REQUEST_SHARES = (0.5, 0.85)  # of that time, when the requests of each recipe must have ended
MOST_TOLD = 12  # failures after a stage; the page has more
LEAST_S = 12  # a stage that would have less is not begun
REPORT_S = 10  # kept for the plot and the archive
SPARE_CORES = 3  # while cases run, for what is prepared beside them
AMPLE_BYTES = 40 << 30  # free memory of a card on which others may prepare while cases run
CASE_BYTES = 3 << 29  # of a card, for each process that checks cases


class NoCard(Exception):
    """There is no card that answers, in one line."""


@dataclass
class Run:
    """What has been asked for, and what is known so far."""

    out: Path
    work: Path
    minutes: float
    stages: tuple[str, ...]
    golden: Path | None
    rehearse: bool
    start: float = field(default_factory=time.monotonic)
    document: dict[str, Any] = field(default_factory=dict)
    beside: list[Worker] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.document |= {"benchmark": "card", "minutes": self.minutes, "rehearsal": self.rehearse, "stages": {}}
        self.caches = CACHES

    def left(self) -> float:
        """Seconds until the report must be written."""
        return 60 * self.minutes - REPORT_S - (time.monotonic() - self.start)

    def worker(self, name: str, stage: str, step_s: float = 120, **more: Any) -> Worker:
        """A process of a stage; `more` are its options, and `cache` another place for compiled kernels."""
        cache = more.pop("cache", self.caches)
        claims = self.work / "claims" / more.pop("claims", name)
        command = [sys.executable, HERE / "card_stage.py", stage, "--work", self.work, "--claims", claims]
        for key, value in more.items():
            command += [f"--{key}", value]
        command += ["--golden", self.golden] if self.golden else []
        if self.rehearse:
            command, step_s = [*command, "--rehearse"], 10 * step_s
        environment = {
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.caches / "inductor"),
            "AURICLE_CACHE": str(self.caches / "auricle"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1" if stage in ("cases", "pytest", "tune-check") else "4",
        }
        self.workers.append(Worker(name, command, self.work / "logs", step_s, environment))
        return self.workers[-1]

    def model(self, recipe: str) -> Path:
        return self.work / f"{recipe}.gguf"

    def note(self, name: str, workers: Sequence[Worker], seconds: float, note: str = "") -> None:
        """Keeps what came of a stage, says so, and writes all anew."""
        notes = [note, *(w.note for w in workers)]
        stage = {"seconds": round(seconds, 1), "note": "\n".join(filter(None, notes))}
        self.document["stages"][name] = stage | {"steps": [row for w in workers for row in w.finished()]}
        print(
            f"[{time.monotonic() - self.start:5.0f} s] {summary_line(name, self.document['stages'][name])}", flush=True
        )
        for row in [row for row in self.document["stages"][name]["steps"] if not row.get("ok")][:MOST_TOLD]:
            print(f"    {row['step']}: {why(row)}", flush=True)
        self.write()

    def write(self) -> None:
        """Document, page and logs; each whole or as it was."""
        replace_text(self.out / "card.json", json.dumps(self.document, indent=1) + "\n")
        replace_text(self.out / "card.txt", make_page(self.document))
        archive(self.work / "logs", self.out / "logs.tar.gz")


def replace_text(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def archive(folder: Path, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """All files of a folder, or those with some suffixes."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w:gz", compresslevel=4) as file:
        for item in sorted(folder.rglob("*")):
            if item.is_file() and (not suffixes or item.suffix in suffixes or not item.suffix):
                file.add(item, item.relative_to(folder.parent))
    part.replace(path)


def unpack_cache(path: Path) -> None:
    """Compiled kernels of another run to where they were."""
    CACHES.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as file:
        file.extractall(CACHES, filter="data")


# Stages.


def run_stage(run: Run, name: str) -> None:
    """One of STAGE_S, within its time; says so where there is none left."""
    limit = min(run.left(), max(LEAST_S, STAGE_S[name] * min(1.0, run.minutes / FULL_MINUTES)))
    limit = run.left() if run.rehearse else limit
    if run.left() < LEAST_S:
        run.note(name, [], 0, f"left out: {max(0, run.left()):.0f} s are left")
        return
    start = time.monotonic()
    RUNNERS[name](run, start + limit)


def timed(run: Run, name: str, workers: Sequence[Worker], deadline: float, *, at_once: bool = True) -> None:
    start = time.monotonic()
    done = run_workers(workers, deadline, run.beside, at_once)
    run.note(name, workers, time.monotonic() - start, "" if done else "cut short")


def run_facts(run: Run, deadline: float) -> None:
    timed(run, "facts", [run.worker("facts", "facts")], deadline)
    found = {row["step"]: row for row in run.document["stages"]["facts"]["steps"]}
    if "environment" not in found:
        lines = run.document["stages"]["facts"]["note"].splitlines()
        raise NoCard(lines[-1].rpartition("NoGPU: ")[2] if lines else "the card does not answer; see logs.tar.gz")
    start_compiler(run)


def start_beside(run: Run) -> None:
    """What later stages need and takes processors rather than the card: model files, and kernels for them."""
    if any(stage in run.stages for stage in ("requests", "profile", "cold", "peer")):
        run.beside += [run.worker(f"make-{r}", "make", 300, model=run.model(r), recipe=r) for r in RECIPES]
        run.beside += [run.worker("work", "work")]
    for worker in run.beside:
        worker.start()


def start_compiler(run: Run) -> None:
    """What transformers compiles takes a minute and can be done beside the cases, where the card has room for both."""
    if {"cases", "peer"} <= set(run.stages) and (free_bytes(run) > AMPLE_BYTES or run.rehearse):
        run.beside.append(run.worker("compile-peer", "compile-peer", 300, model=run.model(RECIPES[0])))
        run.beside[-1].start()


def free_bytes(run: Run) -> int:
    """Of the card, as far as facts say."""
    rows = {row["step"]: row for row in run.document["stages"].get("facts", {}).get("steps", [])}
    return rows.get("environment", {}).get("gpu_memory_bytes") or 0


def run_cases(run: Run, deadline: float) -> None:
    """As many processes as there are processors and memory for, over one list of cases."""
    n = max(1, min((os.cpu_count() or 1) - SPARE_CORES, free_bytes(run) // CASE_BYTES))
    n_pytest = max(1, n // 4)
    workers = [run.worker(f"cases-{i}", "cases", 110, claims="cases") for i in range(max(1, n - n_pytest))]
    tests = [run.worker(f"pytest-{i}", "pytest", 110, claims="pytest") for i in range(n_pytest)]
    start = time.monotonic()
    done = run_workers([*workers, *tests], deadline, run.beside)
    seconds = time.monotonic() - start
    run.note("cases", workers, seconds, "" if done else "cut short")
    run.note("pytest", tests, seconds)


def wait_beside(run: Run, deadline: float) -> None:
    """Times are measured when nothing else is at work."""
    start = time.monotonic()
    wait_for(run.beside, deadline)
    for worker in run.beside:
        run.note(worker.name, [worker], time.monotonic() - start)
    run.beside.clear()


def run_kernels(run: Run, deadline: float) -> None:
    timed(run, "kernels", [run.worker("kernels", "kernels", 60)], deadline)


def run_requests(run: Run, deadline: float) -> None:
    """Of each file in turn, and then a start in a new process."""
    left = deadline - time.monotonic()
    for recipe, share in zip(RECIPES, REQUEST_SHARES, strict=True):
        worker = run.worker(f"requests-{recipe}", "requests", 90, model=run.model(recipe))
        timed(run, worker.name, [worker], deadline - (1 - share) * left)
    start = run.worker("start-warm", "start", 90, model=run.model(RECIPES[0]))
    timed(run, "start-warm", [start], deadline)


def run_peer(run: Run, deadline: float) -> None:
    model = {"model": run.model(RECIPES[0])}
    middle = time.monotonic() + 0.45 * (deadline - time.monotonic())
    timed(run, "peer", [run.worker("peer", "peer", 60, **model)], middle)
    timed(run, "compiled-peer", [run.worker("compiled-peer", "compiled-peer", 200, **model)], deadline)


def run_profile(run: Run, deadline: float) -> None:
    timed(run, "profile", [run.worker("profile", "profile", 60, model=run.model(RECIPES[0]))], deadline)


def run_cold(run: Run, deadline: float) -> None:
    """With nothing compiled."""
    cold = run.worker("start-cold", "start", 200, model=run.model(RECIPES[0]), cache=run.work / "cold")
    timed(run, "start-cold", [cold], deadline)


def run_tune(run: Run, deadline: float) -> None:
    """Cuts are compiled and checked by many processes, then timed by one, which writes the table as it goes."""
    n = max(1, (os.cpu_count() or 1) - 1)
    middle = time.monotonic() + 0.5 * (deadline - time.monotonic())
    checks = [run.worker(f"tune-check-{i}", "tune-check", 60, claims="tune-check") for i in range(n)]
    timed(run, "tune-check", checks, middle)
    timed(run, "tune", [run.worker("tune", "tune", 60)], deadline)
    for table in (run.work / "tuned").glob("*.json"):
        shutil.copy(table, run.out / f"tuned-{table.name}")


RUNNERS = {
    "facts": run_facts,
    "cases": run_cases,
    "kernels": run_kernels,
    "requests": run_requests,
    "peer": run_peer,
    "profile": run_profile,
    "cold": run_cold,
    "tune": run_tune,
}
assert RUNNERS.keys() == STAGE_S.keys()


def run_all(run: Run) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    start_beside(run)
    for name in run.stages:
        if name not in ("facts", "cases") and run.beside:
            wait_beside(run, time.monotonic() + max(0.0, min(run.left(), 0.2 * 60 * run.minutes)))
        run_stage(run, name)
    if run.beside:
        wait_beside(run, time.monotonic())
    if plot_roofline(run.document, run.out / "roofline.png"):
        print(f"plot: {run.out / 'roofline.png'}", flush=True)
    if not run.rehearse and (CACHES / "triton").is_dir():
        archive(CACHES / "triton", run.out / "cache.tar.gz", KEPT_SUFFIXES)
    run.document["seconds"] = round(time.monotonic() - run.start, 1)
    run.write()
    n = len([p for p in run.out.iterdir() if p.is_file()])
    assert n <= MOST_FILES, f"{n} files in {run.out}"


# The command.


def pick_work(out: Path) -> Path:
    """A folder for model files and caches: in memory where there is enough of it."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > 16 << 30
    return Path(tempfile.mkdtemp(prefix="auricle-card-", dir=shm if roomy else None))


def find_golden(given: Path | None) -> Path | None:
    if given is not None:
        return given
    return GOLDEN if GOLDEN.is_dir() else None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES, help="that the whole may take")
    parser.add_argument("--stages", default=",".join(STAGE_S), help="by name, with commas between")
    parser.add_argument("--skip", default="", help="stages to leave out")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="recordings as --pack makes them")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for model files and caches; kept afterwards")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="the cache.tar.gz of another run, to compile less")
    parser.add_argument("--rehearse", action="store_true", help="every stage, tiny and interpreted, without a card")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="make the folder that --golden takes, and end")
    parser.add_argument("--source", type=Path, default=ROOT.parent / "shared", help="of --pack: the reference material")
    a = parser.parse_args(arguments)
    a.stages = tuple(name for name in a.stages.split(",") if name not in a.skip.split(","))
    if unknown := [name for name in (*a.stages, *filter(None, a.skip.split(","))) if name not in STAGE_S]:
        parser.error(f"no stage {unknown[0]!r}; there are: {', '.join(STAGE_S)}")
    if not a.pack and not a.out:
        parser.error("--out says where the results go")
    if a.minutes <= 0:
        parser.error(f"--minutes is {a.minutes:g}; it must be above 0")
    return a


def end_run(number: int, _: object) -> None:
    """What was started is ended on the way out, and nothing disturbs that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    a = parse_arguments(arguments)
    if a.pack:
        command = [sys.executable, HERE / "card_pack.py", a.source, a.pack]
        return subprocess.run(list(map(str, command)), check=False).returncode
    work = a.work or pick_work(a.out)
    work.mkdir(parents=True, exist_ok=True)
    run = Run(a.out, work.absolute(), a.minutes, a.stages, find_golden(a.golden), a.rehearse)
    if a.cache:
        unpack_cache(a.cache)
    signal.signal(signal.SIGTERM, end_run)
    for left_over in ("logs", "claims"):
        shutil.rmtree(work / left_over, ignore_errors=True)
    try:
        run_all(run)
    except NoCard as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        stop_all(run.workers, "the run has ended")
        if a.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print("\n" + (a.out / "card.txt").read_text()[:9000], flush=True)
    judged, red = count_cases(run.document)
    met = sum(goal.verdict == "pass" for goal in goals(run.document))
    print(f"{judged - red} of {judged} cases are green, {met} of {len(goals(run.document))} goals are met", flush=True)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
