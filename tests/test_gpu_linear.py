"""The linear kernels under Triton's interpreter, in a process of their own: `gpu_cases_linear.py` has the cases."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

WORKER = ROOT / "tests/gpu_cases_linear.py"
HALF_ERROR = 2e-3  # mat-mats compute in f16
FLOAT_ERROR = 2e-6  # mat-vecs in float32 of the tokens as they are or as they were rounded, in another order
FEW = 16  # tokens that the mat-vec takes


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, WORKER], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["case"]: row for row in rows}


def test_every_case_is_right(results: dict[str, dict]) -> None:
    wrong = {name: row for name, row in results.items() if not row.get("error", 1.0) <= limit(name)}
    assert not wrong


def limit(name: str) -> float:
    """What a case may be off: nothing where bits are compared, and little where no tensor core takes part."""
    if name.startswith(("decode", "alone", "unsound")):
        return 0.0
    n_tokens = next((int(word[1:]) for word in name.split() if word[0] == "n" and word[1:].isdigit()), FEW + 1)
    return FLOAT_ERROR if n_tokens <= FEW else HALF_ERROR


@pytest.mark.parametrize(
    "word",
    [
        *(f"n{n}" for n in (*range(1, 6), *range(7, 10), 16, 17, 33, 64, 257)),
        "gated",
        "best",
        "unsound",
        "large=True",
        "exact=True",
    ],
)
def test_the_cases_cover(results: dict[str, dict], word: str) -> None:
    assert any(word in name.split() for name in results)


@pytest.mark.parametrize("kind", ["decode", "linear", "alone"])
@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_the_cases_cover_all_types(results: dict[str, dict], kind: str, fmt: str) -> None:
    assert any(name.startswith(f"{kind} {fmt}") for name in results)


def test_no_float_atomics() -> None:
    """Sums whose order depends on which program comes first would give other bits each time."""
    for path in (Path(ROOT) / "kernels/gpu").glob("mat*.py"):
        calls = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {name for name in calls if name.startswith("atomic")}, path.name
