"""The vector vocabulary at every level of instructions, against numpy; what cannot run here is read as assembly."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from auricle.kernels.cpu import isa
from auricle.kernels.cpu.isa import SimdError, find_level, levels_of
from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import Q4_K, Q8_0
from auricle.kernels.quantize import quantize
from auricle.tools.demo import FOLDER
from auricle.tools.demo.recordings import SEQUENCES
from auricle.tools.finetune.digits import WORDS

HERE = Path(__file__).parent
POSSIBLE = levels_of(*isa.processor())
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# What a Haswell has, and with the last, what an Alder Lake has for us.
HASWELL = (
    "+64bit,+avx,+avx2,+bmi,+bmi2,+cmov,+crc32,+cx16,+cx8,+f16c,+fma,+fsgsbase,+fxsr,+invpcid,+lzcnt,+mmx,+movbe,"
    "+pclmul,+popcnt,+rdrnd,+sahf,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,+xsave,+xsaveopt"
)
NARROWED = {
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": HASWELL},
    "avxvnni": {"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": f"{HASWELL},+avxvnni"},
    "generic": {"NUMBA_CPU_NAME": "generic"},  # no vector instructions but the first that there were
}


def make_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    n = 64
    a, b = rng.integers(-(2**31), 2**31, (2, n, 16), dtype=np.int64).astype(np.int32)
    codes = rng.integers(0, 256, (n, 64), dtype=np.int64).astype(np.uint8)
    signed = rng.integers(-127, 128, (n, 64), dtype=np.int64).astype(np.int8)
    codes[:4], signed[:4] = [[255], [255], [127], [0]], [[127], [-127], [-127], [-127]]
    x, y = rng.standard_normal((2, n, 16)).astype(np.float32) * [[[3]], [[200]]]
    z = rng.uniform(-87, 88, (n, 16))
    x[0] = [0, -0.0, 1e-30, -1e30, np.inf, -np.inf, 2, -1.5, np.nan, 1e-40, 3e38, 1, -2, 5, -7, np.nan]
    y[1] = np.arange(16) - 7.5
    z[0] = [-1000, -np.inf, -87.3, -87.4, np.nan, np.inf, 88.7, 88.8, 1000, 0, -0.0, 1e-30, -1e-30, 1, -1, 0.5]
    weight = rng.standard_normal((19, 512)).astype(np.float32)
    return {
        "a": a,
        "b": b,
        "codes": codes,
        "signed": signed,
        **{name: values.astype(np.float32) for name, values in (("x", x), ("y", y), ("z", z))},
        "activations": rng.standard_normal((5, 512)).astype(np.float32),
        "Q4_K": quantize(weight, Q4_K),
        "Q8_0": quantize(weight, Q8_0),
    }


GIVEN = make_inputs()


def environment_of(level: str, cache: Path) -> dict[str, str]:
    """For a process that takes this processor for one of that level. `cache`: where it keeps compiled kernels."""
    settings = {"AURICLE_SIMD": level, "AURICLE_CACHE": str(cache / "cache"), "NUMBA_NUM_THREADS": "1"}
    return {**os.environ, **settings, **(NARROWED.get(level, {}) if IS_X86 else {})}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """What the probe makes of the inputs at each level that can run here, two at a time."""
    folder = tmp_path_factory.mktemp("simd")
    np.savez(folder / "inputs.npz", **GIVEN)

    def run(level: str) -> dict[str, np.ndarray]:
        out = folder / f"{level}.npz"
        command = [sys.executable, HERE / "simd_probe.py", folder / "inputs.npz", out]
        done = subprocess.run(command, env=environment_of(level, folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return dict(np.load(out))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(POSSIBLE, pool.map(run, POSSIBLE), strict=True))


@pytest.fixture(params=POSSIBLE)
def made(request: pytest.FixtureRequest, results: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    assert results[request.param]["level"] == request.param
    return results[request.param]


def expected_integers() -> np.ndarray:
    a, b = GIVEN["a"], GIVEN["b"]
    unsigned, raw, n = a.view(np.uint32), a.view(np.uint8).reshape(-1), len(a)
    products = GIVEN["codes"].astype(np.int32) * GIVEN["signed"].astype(np.int32)
    narrow = (GIVEN["codes"] & 127).astype(np.int32) * GIVEN["signed"].astype(np.int32)
    both = np.concatenate([a[:, :1], b[:, :1]], axis=1).view(np.uint8)
    starts = (np.arange(n) * 64) % (len(raw) - 8 * 34)
    gathered = raw[starts[:, None, None] + 34 * np.arange(8)[:, None] + np.arange(2)].view(np.uint16)[..., 0]
    last = np.concatenate([a[:, 8:], a[:, :8]], axis=1)
    last.view(np.uint8)[:, 48:] = a.astype(np.uint8)
    shifts = np.repeat(np.array([1, 3], np.uint32), 8)
    totals = a.sum(axis=1, dtype=np.int32) + (unsigned[:, 0] >> 16).astype(np.int32)
    made = [
        a + b, a - b, a * b, a & b, a | b, a ^ b, unsigned >> 5, unsigned << 7, unsigned >> shifts,
        np.concatenate([a[:, :8], b[:, :8]], axis=1), np.concatenate([a[:, 8:], b[:, 8:]], axis=1),
        a + narrow.reshape(n, 16, 4).sum(axis=2, dtype=np.int32),
        a + products.reshape(n, 16, 4).sum(axis=2, dtype=np.int32),
        raw.view(np.int8).reshape(n, 64)[:, :16], np.repeat(a[:, 1:2], 16, axis=1), np.repeat(both, 2, axis=1),
        np.repeat(gathered, 2, axis=1), np.repeat(totals[:, None], 16, axis=1), last,
    ]  # fmt: skip
    return np.stack([values.astype(np.int32) for values in made], axis=1)


def test_integers(made: dict[str, np.ndarray]) -> None:
    with np.errstate(over="ignore"):
        expected = expected_integers()
    for k in range(expected.shape[1]):
        np.testing.assert_array_equal(made["ints"][:, k], expected[:, k], err_msg=f"result {k} of `integers`")


def test_transpose(made: dict[str, np.ndarray]) -> None:
    squares = GIVEN["a"][:32].reshape(16, 2, 16).transpose(1, 2, 0)
    np.testing.assert_array_equal(made["turned"], squares)


def test_every_half(made: dict[str, np.ndarray]) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    halves = bits.view(np.float16).astype(np.float32)
    finite = np.isfinite(halves)
    for way in range(3):
        np.testing.assert_array_equal(made["halves"][way][finite], halves[finite])
        np.testing.assert_array_equal(np.signbit(made["halves"][way][finite]), np.signbit(halves[finite]))
    np.testing.assert_array_equal(made["halves"][3].view(np.uint32), bits.astype(np.uint32) << 16)


def test_floats(made: dict[str, np.ndarray]) -> None:
    x, y, z = (GIVEN[name] for name in "xyz")
    wide = [v.astype(np.float64) for v in (x, y, z)]
    with np.errstate(all="ignore"):
        clamped = np.where(x < -1.5, np.float32(-1.5), np.where(x > 2, np.float32(2), x))
        spreads = [np.repeat(x[:, [k, k + 1, k + 4, k + 5]], 4, axis=1) for k in (0, 2, 8, 10)]
        exact = {
            0: x + y, 1: x - y, 2: x * y, 5: np.abs(x), 6: np.fmax(x, z), 7: clamped,
            **dict(enumerate(spreads, 8)),
            13: np.repeat(x[:, 3:4], 16, axis=1), 14: np.rint(y), 15: GIVEN["a"].view(np.float32),
        }  # fmt: skip
        close = {3: wide[0] * wide[1] + wide[2], 4: wide[0] / wide[1]}
        close = {k: values.astype(np.float32) for k, values in close.items()}
    for k, values in exact.items():
        np.testing.assert_array_equal(made["reals"][:, k], values, err_msg=f"result {k} of `floats`")
    for k, values in close.items():
        np.testing.assert_allclose(made["reals"][:, k], values, rtol=2.5e-7, atol=1e-37, err_msg=f"result {k}")


def test_sums(made: dict[str, np.ndarray]) -> None:
    x, y, z = (GIVEN[name] for name in "xyz")
    fours, numbers = made["reals"][1:, 12, :4], made["numbers"]
    with np.errstate(all="ignore"):
        for k, values in enumerate((x, y, z, x + y)):
            bound = 1e-6 * np.abs(values[1:]).sum(axis=1)
            assert (np.abs(fours[:, k] - values[1:].sum(axis=1, dtype=np.float64)) <= bound).all()
        for k, values in ((0, x), (3, y), (5, np.abs(z))):
            assert np.isnan(numbers[0, k]) == np.isnan(values[0].sum())
            bound = 1e-6 * np.abs(values[1:]).sum(axis=1)
            assert (np.abs(numbers[1:, k] - values[1:].sum(axis=1, dtype=np.float64)) <= bound).all()
    for k, values in ((1, np.fmax.reduce(x, axis=1)), (2, y[:, 7]), (4, np.fmax.reduce(z, axis=1))):
        np.testing.assert_array_equal(numbers[:, k], values)


def test_exponential_and_silu(made: dict[str, np.ndarray]) -> None:
    y, z = GIVEN["y"].astype(np.float64), GIVEN["z"].astype(np.float64)
    exponential, silu = made["reals"][:, 16], made["reals"][:, 17]
    assert np.isnan(exponential[0, 4])
    assert (np.abs(exponential[1:] / np.exp(z[1:]) - 1) <= 2e-7).all()
    assert (exponential[0, [0, 1, 2, 3]] <= 1.3e-38).all()
    assert ((exponential[0, 5:9] >= 2e38) & np.isfinite(exponential[0, 5:9])).all()
    assert (exponential[0, [9, 10]] == 1).all()
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(silu, y / (1 + np.exp(-y)), rtol=6e-7, atol=1e-35)


def test_products(made: dict[str, np.ndarray]) -> None:
    """Quantised activations are those that numpy makes, and both kernels multiply just these."""
    x = GIVEN["activations"]
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    coarse, fine = np.abs(x.reshape(5, 16, 32)).max(axis=-1), np.abs(x.reshape(5, 32, 16)).max(axis=-1)
    np.testing.assert_allclose(made["scales"], fine / np.float32(127), rtol=2e-7)
    codes = made["codes"].view(np.int8).reshape(5, 2, 8, 32)[:, :, order].reshape(5, 512)
    taken = codes * np.repeat(made["scales"].astype(np.float64), 16, axis=1)
    assert (np.abs(taken - x) <= 0.5001 * np.repeat(made["scales"], 16, axis=1)).all()
    expected = dequantize(GIVEN["Q8_0"], Q8_0).astype(np.float64) @ taken[0]
    assert np.linalg.norm(made["matvec"] - expected) <= 2e-6 * np.linalg.norm(expected)

    scales = np.repeat(coarse.astype(np.float64) / 127, 32, axis=1)
    expected = (np.rint(x / scales) * scales) @ dequantize(GIVEN["Q4_K"], Q4_K).astype(np.float64).T
    assert np.linalg.norm(made["matmul"] - expected) <= 2e-6 * np.linalg.norm(expected)
    expected = taken @ dequantize(GIVEN["Q8_0"], Q8_0).astype(np.float64).T
    assert np.linalg.norm(made["matmul_wide"] - expected) <= 2e-6 * np.linalg.norm(expected)


def test_each_level_uses_its_instructions(made: dict[str, np.ndarray]) -> None:
    if not IS_X86:
        pytest.skip("names of x86 instructions")
    level = str(made["level"])
    used = set(made["asm_matmul"]) | set(made["asm_integers"])
    assert "ret" in "".join(used), "no assembly was read"
    assert ("zmm" in used) == (level == "vnni")
    assert ("vpdpbusd" in used) == (level in ("vnni", "avxvnni"))
    assert ("vpmaddubsw" in used) == (level == "avx2")
    if level == "generic":
        assert "xmm" in used
        assert "ymm" not in used


def test_a_model_at_another_level(tmp_path: Path) -> None:
    """The best level that this processor has besides its own hears the same words."""
    if len(POSSIBLE) == 1:
        pytest.skip("this processor has one level only")
    command = [sys.executable, "-m", "auricle.tools", "transcribe", FOLDER / "george.flac", "-m", "demo"]
    environment = environment_of(POSSIBLE[1], tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    spoken = next(s.digits for s in SEQUENCES if s.name == "george")
    assert done.stdout.split() == [WORDS[int(digit)] for digit in spoken], done.stderr


def test_each_level_has_a_cache_of_its_own(results: dict[str, dict[str, np.ndarray]]) -> None:
    assert len({str(r["fingerprint"]) for r in results.values()}) == len(results)


# For each target: a pattern that its assembly must have, and one that it must not.
TARGETS = {
    ("avxvnni", "x86_64-unknown-linux-gnu", "alderlake"): (r"\{vex\}\s+vpdpbusd\s.*%ymm", r"zmm"),
    ("avx2", "x86_64-unknown-linux-gnu", "haswell"): (r"vpmaddubsw\s.*%ymm", r"zmm|vpdpbusd"),
    ("vnni", "x86_64-unknown-linux-gnu", "cascadelake"): (r"(?<!\} )vpdpbusd\s.*%zmm", r"\{vex\}"),
    ("neon", "arm64-apple-macosx", "apple-m1"): (r"sdot(\.4s)?\s", r"fmla\.8h"),
    ("neon", "aarch64-unknown-linux-gnu", "neoverse-n1"): (r"sdot\s+v\d+\.4s", r"fmla\s+v\d+\.8h"),
}


# What runs here is looked at when it runs.
@pytest.mark.parametrize("target", [t for t in TARGETS if t[0] not in POSSIBLE], ids="-".join)
def test_assembly_for_other_processors(target: tuple[str, str, str]) -> None:
    command = [sys.executable, HERE / "simd_assembly.py", *target]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed, wrong = TARGETS[target]
    assert re.search(needed, text)
    assert not re.search(wrong, text)
    calls = re.findall(r"^\s+(?:bl|b|callq?|jmp)\s+([A-Za-z_]\S*)", text, re.M)
    assert not [name for name in calls if not re.match(r"\.?LBB", name)], "functions that may not exist there"


def test_level_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels_of("haswell", HASWELL) == ["avx2", "generic"]
    assert levels_of("haswell", "") == ["avx2", "generic"]
    assert levels_of("alderlake", f"{HASWELL},+avxvnni")[0] == "avxvnni"
    assert levels_of("znver4", f"{HASWELL},+avx512vnni,+avx512bw,+avx512vl")[0] == "vnni"
    assert levels_of("znver4", f"{HASWELL},+avx512vnni,+avx512bw,-avx512vl")[0] == "avx2"
    assert levels_of("any", "+avx2,+fma") == ["generic"], "halves need an instruction, too"
    assert levels_of("any", "+neon,+dotprod") == ["neon", "generic"]
    assert levels_of("any", "+neon,-dotprod") == levels_of("any", "") == ["generic"]
    monkeypatch.delenv("AURICLE_SIMD", raising=False)
    assert find_level() == POSSIBLE[0]
    monkeypatch.setenv("AURICLE_SIMD", "generic")
    assert find_level() == "generic"
    for wrong in ("mmx", "neon" if IS_X86 else "vnni"):
        monkeypatch.setenv("AURICLE_SIMD", wrong)
        with pytest.raises(SimdError, match=wrong):
            find_level()
