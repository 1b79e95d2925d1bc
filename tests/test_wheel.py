"""A built wheel holds all that the main job needs: unpacked in another folder it converts and transcribes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from auricle.tools.cli.app import CUT_OFF
from sounds import JFK
from support import ROOT


def copy_sources(target: Path) -> Path:
    """What a wheel is built from; building in place would leave files behind, and find older ones."""
    for folder in ("kernels", "engine", "convert", "tools"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def test_the_wheel_runs_the_main_job_elsewhere(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(list(map(str, build)), check=True, capture_output=True)
    (wheel,) = tmp_path.glob("auricle-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # `-S` leaves the installed project out, then the site-packages with its dependencies come behind the wheel.
    packages = [p for p in sys.path if p.endswith("site-packages")]
    paths = os.pathsep.join([str(site), *packages])

    def run(code: str, status: int = 0) -> str:
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, check=False
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    where = run("import auricle.engine, auricle.tools.cli.main; print(auricle.engine.__file__)")
    assert where.startswith(str(site)), "the wheel was not what ran"
    main = "import sys; from auricle.tools.cli.main import run; sys.argv = {!r}; run()"
    run("from auricle.tools.sample import main; main(['checkpoint'])")
    run(main.format(["auricle", "convert", "checkpoint", "-o", "model.gguf", "--type", "q8_0"]))
    arguments = ["auricle", "transcribe", str(JFK), "-m", "model.gguf", "--max-new-tokens", "3", "--json"]
    assert '"audio_seconds": 11.0' in run(main.format(arguments), CUT_OFF)
