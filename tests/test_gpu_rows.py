"""The GPU kernels between the matrices, without a GPU: interpreted, in a process of their own.

Triton decides when it is imported whether kernels are compiled or interpreted, so the cases cannot run in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="GPU kernels are written in Triton, which is there for Linux on x86-64 only")
HERE = Path(__file__).parent


@pytest.mark.parametrize("cases", ["gpu_cases_rows", "gpu_cases_sampling", "gpu_cases_conv"])
def test_interpreted(cases: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", f"{HERE / cases}.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
