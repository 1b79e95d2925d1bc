"""Compiled kernels on disk: found again, never stale, and no harm done by a bad file or a folder that is closed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from numba import prange  # noqa: E402
from numba.core.caching import FunctionCache  # noqa: E402

from auricle.kernels.cpu import jit  # noqa: E402

SOURCES = Path(jit.__file__).parent


def doubled(x, out):
    for i in prange(x.shape[0]):
        out[i] = 2 * x[i]


def halved(x, out):
    for i in range(x.shape[0]):
        out[i] = x[i] / 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("AURICLE_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "auricle.kernels")
    return tmp_path / "cache"


@pytest.fixture
def _forgetful() -> Iterator[None]:
    jit.complain.cache_clear(), jit.fingerprint.cache_clear()
    yield
    jit.complain.cache_clear(), jit.fingerprint.cache_clear()


def run(function: Callable[..., None], *, parallel: bool = True) -> np.ndarray:
    """As another process would: all that is known of the kernel is on disk."""
    x, out = np.arange(5, dtype=np.float32), np.full(5, np.nan, np.float32)
    jit.kernel(parallel)(function)(x, out)
    return out


def compiled(caplog: pytest.LogCaptureFixture) -> int:
    """How many times a compilation was announced since the last call."""
    n = sum("compiling" in record.getMessage() for record in caplog.records)
    caplog.clear()
    return n


def test_a_kernel_is_compiled_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for expected in (1, 0, 0):
        np.testing.assert_array_equal(run(doubled), [0, 2, 4, 6, 8])
        assert compiled(caplog) == expected
    assert sorted(path.suffix for path in (folder / jit.fingerprint()).iterdir()) == [".nbc", ".nbi"]


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "other"])
def test_a_bad_file_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture, suffix: str, damage: str) -> None:
    run(doubled)
    (path,) = folder.rglob(f"*{suffix}")
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    path.write_bytes({"empty": b"", "short": good[:-1], "flipped": flipped, "other": b"\x80\x04\x95 not ours"}[damage])
    compiled(caplog)
    for expected in (1, 0):
        np.testing.assert_array_equal(run(doubled), [0, 2, 4, 6, 8])
        assert compiled(caplog) == expected


@pytest.mark.usefixtures("_forgetful")
def test_a_folder_that_cannot_be_written_is_reported_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file, where a folder is wanted")
    for function, expected in ((doubled, 2), (halved, 0.5), (doubled, 2)):
        np.testing.assert_array_equal(run(function, parallel=False), expected * np.arange(5))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(folder) in warnings[0]
    assert "AURICLE_CACHE" in warnings[0]
    assert compiled(caplog) == 3


@pytest.mark.usefixtures("_forgetful", "folder")
def test_a_full_disk_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(cache: FunctionCache, *_: object) -> None:
        raise OSError(28, "No space left on device", f"{id(cache)}.tmp")

    monkeypatch.setattr(FunctionCache, "save_overload", fail)
    kernels = [run(function, parallel=False) for function in (doubled, halved)]
    assert kernels[1][4] == 2
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1


def test_stamp_changes_with_sources_and_level(tmp_path: Path) -> None:
    here = copytree(SOURCES, tmp_path / "cpu", ignore=lambda *_: ["__pycache__"])
    before = jit.stamp(here.glob("*.py"), "avx2")
    assert before == jit.stamp(sorted(here.glob("*.py"), reverse=True), "avx2")
    assert before != jit.stamp(here.glob("*.py"), "vnni")
    for name in ("simd.py", "tiles.py", "matvec.py"):
        good = (here / name).read_text()
        (here / name).write_text(good.replace("2", "3", 1))
        assert jit.stamp(here.glob("*.py"), "avx2") != before, name
        (here / name).write_text(good)
    assert jit.stamp(here.glob("*.py"), "avx2") == before


@pytest.mark.usefixtures("_forgetful")
def test_fingerprint_covers_the_vocabulary_and_the_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {jit.fingerprint()}
    changed = copytree(SOURCES, tmp_path / "cpu")
    (changed / "simd.py").write_text("# other instructions")
    layouts = tmp_path / "formats.py"
    layouts.write_text("# other offsets")
    for target, path in ((jit, changed / "jit.py"), (jit.formats, layouts)):
        monkeypatch.setattr(target, "__file__", str(path))
        jit.fingerprint.cache_clear()
        seen.add(jit.fingerprint())
    monkeypatch.setattr(jit, "find_level", lambda: "another")
    jit.fingerprint.cache_clear()
    seen.add(jit.fingerprint())
    assert len(seen) == 4


def test_the_next_process_does_not_compile(folder: Path) -> None:
    """A real kernel, with threads."""
    code = (
        "import logging, numpy as np, torch; logging.basicConfig(level=logging.INFO, format='%(message)s');"
        "from auricle.kernels.cpu import plain; from auricle.kernels.formats import BF16;"
        "w, x, out = np.full((3, 64), 0x40, np.uint8), np.ones(32, np.float32), np.empty(3, np.float32);"
        "plain.KERNELS[BF16](w, x, 1, out); print(out)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stderr.count("compiling") for run in runs] == [1, 0]
    assert runs[0].stdout == runs[1].stdout == "[96. 96. 96.]\n"


def test_kernels_of_versions_that_nobody_uses_go(tmp_path: Path) -> None:
    old, recent, current, foreign = (tmp_path / name for name in ("a" * 16, "b" * 16, "c" * 16, "models"))
    for path, days in ((old, 31), (recent, 29), (current, 31), (foreign, 400)):
        path.mkdir()
        (path / "kernel.nbc").write_bytes(b"x")
        os.utime(path, (time.time() - days * 86400,) * 2)
    jit.sweep(tmp_path, current.name)
    assert {path.name for path in tmp_path.iterdir()} == {recent.name, current.name, foreign.name}
    assert time.time() - current.stat().st_mtime < 60
    jit.sweep(tmp_path / "nothing", current.name)
