"""What a measurement was made on: processor, cores, memory, how fast it is read, and versions.

Asks the system's own files (Linux), `sysctl` (macOS) and the `platform` module; what cannot be told is None. Knows
nothing of models.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What a kernel may be written for, by the names of /proc/cpuinfo; the rest of the flags say nothing here.
INSTRUCTIONS = (
    "sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
PACKAGES = ("auricle", "torch", "numba", "numpy")
BUFFER_MIN, BUFFER_MAX = 256 << 20, 1 << 30
READS = 8  # the fastest counts: others had the memory to share


def describe_machine() -> dict[str, Any]:
    """Plain data. `threads` is what the arithmetic uses now; `read_bytes_per_s` is measured, which takes a second."""
    import torch

    facts = read_cpuinfo()
    return {
        "cpu": facts["cpu"],
        "instructions": facts["instructions"],
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": memory_bytes(),
        "read_bytes_per_s": measure_bandwidth(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
    }


def read_cpuinfo() -> dict[str, Any]:
    """Name and instruction sets of the processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {"cpu": _ask_sysctl("machdep.cpu.brand_string") or platform.processor(), "instructions": None}
    fields = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", path.read_text(), re.MULTILINE))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name") or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _ask_sysctl(key: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)


def memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_bandwidth() -> float:
    """Bytes a second that all threads together read from memory: the sum of a buffer four times the largest cache."""
    import torch

    size = min(max(4 * (last_level_cache() or 0), BUFFER_MIN), BUFFER_MAX)
    buffer = torch.ones(size // 4, dtype=torch.float32)
    times = []
    for _ in range(READS):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return size / min(times)


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
