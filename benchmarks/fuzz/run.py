"""Runs fuzzers: mutated inputs to one reader after another, each in a process of its own, until the time is used up.

Usage: python benchmarks/fuzz/run.py GROUP[.TARGET] … --minutes 10; a group is a file targets_GROUP.py beside this one.
A finding ends its process; the bytes are kept and the target goes on with what is left of its time.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SLOWEST, MOST_MEMORY = 5, 500  # seconds and MB an input


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="audio, or audio.wav")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "fuzz", help="corpus and findings")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options, libfuzzer = parser.parse_known_args()
    if options.worker:
        return _work(options.names[0], libfuzzer)
    targets = [target for name in options.names for target in _expand(name)]
    findings = [finding for target in targets for finding in _fuzz(target, options.minutes * 60, options.output)]
    return 1 if findings else 0


def _load(group: str) -> dict:
    sys.path.append(str(HERE.parent.parent / "tests"))
    return importlib.import_module(f"targets_{group}").TARGETS


def _expand(name: str) -> list[str]:
    group, _, target = name.partition(".")
    return [name] if target else [f"{group}.{target}" for target in _load(group)]


def _fuzz(target: str, seconds: float, output: Path) -> list[str]:
    """Fuzzes one target for its time; gives a line for each different finding."""
    corpus, kept = output / target / "corpus", output / target / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    kept.mkdir(exist_ok=True)
    for at, seed in enumerate(_seeds(target)):
        (corpus / f"seed-{at:03}").write_bytes(seed)
    n_runs, findings, end = 0, set(), time.monotonic() + seconds
    while (left := int(end - time.monotonic())) > 0:
        limits = [f"-max_total_time={left}", f"-timeout={SLOWEST}", f"-artifact_prefix={kept}/"]
        command = [sys.executable, __file__, "--worker", target, str(corpus), *limits, "-print_final_stats=1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        n_runs += sum(int(n) for n in re.findall(r"number_of_executed_units: *(\d+)", done.stdout))
        if done.returncode == 0:
            break
        findings.add(_reason(done.stdout))
    print(f"{target}: {n_runs} inputs, {len(findings)} findings", *sorted(findings), sep="\n    ", flush=True)
    return sorted(findings)


def _seeds(target: str) -> list[bytes]:
    group, _, name = target.partition(".")
    return list(_load(group)[name][0]())


def _reason(report: str) -> str:
    """The exception with the last line of ours that it passed, or what libFuzzer says."""
    lines = report.splitlines()
    raised = [at for at, line in enumerate(lines) if "Uncaught Python exception" in line]
    if raised:
        places = re.findall(r'File "([^"]+)", line (\d+)', report)
        return f"{lines[raised[0] + 1]} at {':'.join(places[-1]) if places else '?'}"
    said = (re.sub(r"^==\d+== |\(.*", "", line) for line in lines if "ERROR:" in line)
    return next(said, f"died: {lines[-1] if lines else 'without a word'}")


def _work(target: str, libfuzzer: list[str]) -> int:
    """The fuzzing process of one target; ends with libFuzzer's own status."""
    import atheris

    group, _, name = target.partition(".")
    with atheris.instrument_imports(include=["auricle", f"targets_{group}"]):
        seeds, check = _load(group)[name]
        for seed in seeds():
            check(seed)  # everything is loaded and compiled before time and memory count
    limit = _resident_mb() + MOST_MEMORY
    atheris.Setup([sys.argv[0], *libfuzzer, f"-rss_limit_mb={limit}"], check)
    atheris.Fuzz()
    return 0


def _resident_mb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) // 1024


if __name__ == "__main__":
    sys.exit(main())
