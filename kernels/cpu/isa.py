"""Which vector instructions the compiler may use: those of the processor it has been told to compile for.

Knows LLVM's names of processors and features. Does not know what is done with them.
"""

from __future__ import annotations

import os

from ..errors import AuricleError

# Each way to multiply bytes, best first, and the features that it needs. Those of x86 come with the machine's own
# conversion of halves and fused product and sum, for which LLVM would else call functions that do not exist.
X86 = ("avx2", "fma", "f16c")
LEVELS = {
    "vnni": (*X86, "avx512vnni", "avx512bw", "avx512vl"),
    "avxvnni": (*X86, "avxvnni"),
    "avx2": X86,
    "neon": ("dotprod",),
    "generic": (),
}

# What a processor has whose name is given without a list of features, as far as it matters here.
NAMED = {
    "haswell": "avx2",
    "broadwell": "avx2",
    "skylake": "avx2",
    "znver1": "avx2",
    "znver2": "avx2",
    "znver3": "avx2",
    "x86-64-v3": "avx2",
    "alderlake": "avxvnni",
    "cascadelake": "vnni",
    "icelake-server": "vnni",
    "sapphirerapids": "vnni",
    "znver4": "vnni",
    "znver5": "vnni",
    "neoverse-n1": "neon",
    "apple-m1": "neon",
    "apple-m2": "neon",
    "apple-m3": "neon",
    "apple-m4": "neon",
}

VARIABLE = "AURICLE_SIMD"


class SimdError(AuricleError):
    """A level of vector instructions that does not exist."""


def find_level() -> str:
    """The best level for the processor that numba compiles for: the host, or what NUMBA_CPU_NAME and
    NUMBA_CPU_FEATURES say. AURICLE_SIMD chooses a lower one. Raises SimdError for one that does not exist or needs
    more than the processor has."""
    possible = levels_of(*processor())
    chosen = os.environ.get(VARIABLE) or possible[0]
    if chosen not in possible:
        raise SimdError(f"{VARIABLE} is {chosen!r}; here it can be one of: {', '.join(possible)}")
    return chosen


def processor() -> tuple[str, str]:
    """Its name and its features as LLVM writes them (`+avx2,-sse4a`); empty where LLVM cannot tell."""
    from llvmlite import binding
    from numba import config
    from numba.core.codegen import get_host_cpu_features

    name = binding.get_host_cpu_name() if config.CPU_NAME is None else config.CPU_NAME
    return name, get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES


def levels_of(name: str, features: str) -> list[str]:
    """The levels that a processor can run, best first; the last is always `generic`."""
    has = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    if not features:
        has = set(LEVELS[NAMED.get(name, "generic")])
    return [level for level, needed in LEVELS.items() if has.issuperset(needed)]
