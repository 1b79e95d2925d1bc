"""Runs every function of the vector vocabulary on given lanes, and some products of quantised weights, at the level of
vector instructions that the environment chooses. `test_cpu_simd.py` starts it once a level and looks at the results.

    python simd_probe.py INPUTS.npz RESULTS.npz
"""

from __future__ import annotations

import re
import sys

import numpy as np

from auricle.kernels.cpu import activations, matmul, matvec
from auricle.kernels.cpu.emit import LEVEL
from auricle.kernels.cpu.functions import exponential, silu
from auricle.kernels.cpu.jit import fingerprint, inline, kernel
from auricle.kernels.cpu.simd import (
    absolute,
    as_float,
    clamp,
    divide,
    dot4,
    dot4_wide,
    fma,
    half_number,
    half_to_float,
    high_halves,
    lane,
    lanes,
    lanes_float,
    load,
    load_bf16,
    load_bytes,
    load_half,
    load_halves,
    load_signed,
    load_u16,
    load_u32,
    low_halves,
    max_lanes,
    maximum,
    pairs_of_halfwords,
    prefetch,
    repeat_float,
    repeat_word,
    round_to_int,
    shift_halves,
    spread_0,
    spread_2,
    spread_8,
    spread_10,
    spread_bytes,
    store,
    store_bytes,
    store_narrow,
    sum_four,
    sum_ints,
    sum_lanes,
    to_float,
    transpose,
)
from auricle.kernels.formats import Q4_K, Q8_0

N_INTS, N_FLOATS, N_NUMBERS = 19, 18, 6  # results of a row
STRIDE = 34  # bytes between the halfwords that are gathered


@inline
def _put(out, at, k, vector):
    store_bytes(out, at + 64 * k, vector)


@kernel()
def integers(a, b, codes, signed, out):
    """All uint8 [n * 64]; out uint8 [n * N_INTS * 64]. The halfwords of a row may lie in those that follow."""
    for row in range(a.shape[0] // 64):
        at, to = row * 64, row * 64 * N_INTS
        x, y = load_bytes(a, at), load_bytes(b, at)
        _put(out, to, 0, load_halves(a, at, at + 32) + y)
        _put(out, to, 1, x - y)
        _put(out, to, 2, x * y)
        _put(out, to, 3, x & y)
        _put(out, to, 4, x | y)
        _put(out, to, 5, x ^ y)
        _put(out, to, 6, x >> 5)
        _put(out, to, 7, x << 7)
        _put(out, to, 8, shift_halves(x, 1, 3))
        _put(out, to, 9, low_halves(x, y))
        _put(out, to, 10, high_halves(x, y))
        _put(out, to, 11, dot4(x, load_bytes(codes, at) & lanes(0x7F7F7F7F), load_bytes(signed, at)))
        _put(out, to, 12, dot4_wide(x, load_bytes(codes, at), load_bytes(signed, at)))
        _put(out, to, 13, load_signed(a, at))
        _put(out, to, 14, repeat_word(a, at + 4))
        _put(out, to, 15, spread_bytes(load_u32(a, at), load_u32(b, at)))
        _put(out, to, 16, pairs_of_halfwords(a, at % (a.shape[0] - 8 * STRIDE), STRIDE))
        _put(out, to, 17, lanes(sum_ints(x)) + lanes(load_u16(a, at + 2)))
        _put(out, to, 18, load_halves(a, at + 32, at))
        store_narrow(out, to + 64 * 18 + 48, x)


@kernel()
def floats(x, y, z, bits, out, numbers):
    """float32 [n * 16] and bits uint8 [n * 64]; out float32 [n * N_FLOATS * 16], numbers float32 [n * N_NUMBERS]."""
    for row in range(x.shape[0] // 16):
        at, to, n = row * 16, row * 16 * N_FLOATS, row * N_NUMBERS
        a, b, c = load(x, at), load(y, at), load(z, at)
        store(out, to, a + b)
        store(out, to + 16, a - b)
        store(out, to + 32, a * b)
        store(out, to + 48, fma(a, b, c))
        store(out, to + 64, divide(a, b))
        store(out, to + 80, absolute(a))
        store(out, to + 96, maximum(a, c))
        store(out, to + 112, clamp(a, lanes_float(-1.5), lanes_float(2.0)))
        store(out, to + 128, spread_0(a))
        store(out, to + 144, spread_2(a))
        store(out, to + 160, spread_8(a))
        store(out, to + 176, spread_10(a))
        store(out, to + 192, sum_four(a, b, c, a + b))
        store(out, to + 208, repeat_float(x, at + 3))
        store(out, to + 224, to_float(round_to_int(b)))
        store(out, to + 240, as_float(load_bytes(bits, 4 * at)))
        store(out, to + 256, exponential(c))
        store(out, to + 272, silu(b))
        numbers[n], numbers[n + 1], numbers[n + 2] = sum_lanes(a), max_lanes(a), lane(b, 7)
        numbers[n + 3], numbers[n + 4] = sum_lanes(b), max_lanes(c)
        numbers[n + 5] = sum_lanes(absolute(c))


@kernel()
def halves(bits, wide, out):
    """bits uint8 [2 n], wide uint8 [4 n]: the same as uint32; out float32 [4 n]: as halves, three ways, and BF16."""
    n = wide.shape[0] // 4
    for i in range(0, n, 16):
        prefetch(bits, 2 * i + 10**6)
        store(out, i, load_half(bits, 2 * i))
        store(out, n + i, half_to_float(load_bytes(wide, 4 * i)))
        store(out, 3 * n + i, load_bf16(bits, 2 * i))
        for k in range(i, i + 16):
            out[2 * n + k] = half_number(load_u16(bits, 2 * k))


@kernel()
def turn(source, stride, target):
    """Squares of 16 x 16 words, `stride` bytes from row to row, one behind the other in `target`."""
    for k in range(target.shape[0] // 1024):
        transpose(source, 64 * k, stride, target, 1024 * k)


def vocabulary(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    n = len(given["a"])
    ints = np.empty((n, N_INTS, 16), np.int32)
    raw = [given[name].view(np.uint8).ravel() for name in ("a", "b", "codes", "signed")]
    integers(*raw, ints.view(np.uint8).ravel())
    reals, numbers = np.empty((n, N_FLOATS, 16), np.float32), np.empty((n, N_NUMBERS), np.float32)
    xyz = [given[name].ravel() for name in ("x", "y", "z")]
    floats(*xyz, given["a"].view(np.uint8).ravel(), reals.ravel(), numbers.ravel())
    bits = np.arange(65536, dtype=np.uint16)
    wide = bits.astype(np.uint32) | np.uint32(0xABCD0000)  # what lies above the half must not matter
    half = np.empty((4, 65536), np.float32)
    halves(bits.view(np.uint8), wide.view(np.uint8), half.ravel())
    turned = np.empty((2, 16, 16), np.int32)
    turn(given["a"][:32].view(np.uint8).ravel(), 128, turned.view(np.uint8).ravel())
    return {"ints": ints, "reals": reals, "numbers": numbers, "halves": half, "turned": turned}


def products(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Both kernels, with codes below 64 and with codes up to 255."""
    x, results = given["activations"], {}
    n, k = x.shape
    codes, scales, sums = np.empty((n, k), np.uint8), *np.empty((2, n, k // 16), np.float32)
    activations.encode_rows(x, codes, scales, sums)
    results["codes"], results["scales"] = codes, scales
    weight = given["Q8_0"]
    results["matvec"] = np.empty(len(weight), np.float32)
    matvec.ONE[Q8_0](weight, codes[0], scales[0], sums[0], results["matvec"])

    padded = matmul.padded(n)
    groups = np.empty((k // 32, padded, 32), np.uint8), *np.empty((2, k // 32, padded), np.float32)
    halves = np.empty((k // 16, padded), np.float32), np.empty((k // 16, padded), np.int32)
    work = np.full((1, matmul.work_bytes(padded)), 255, np.uint8)
    for name, fmt, scaled in (("matmul", Q4_K, groups[1:]), ("matmul_wide", Q8_0, halves)):
        activations.encode_groups(x, fmt is Q8_0, *groups, *halves)
        weight, out = given[fmt.name], np.full((n, len(given[fmt.name])), np.nan, np.float32)
        flat = [part.ravel() for part in (groups[0], *scaled)]
        matmul.KERNELS[fmt](weight, n, padded, *flat, work, out.ravel(), len(weight))
        results[name] = out
    return results


def instructions(compiled: object) -> np.ndarray:
    """The names of all instructions and registers in the machine code of a kernel, without what says how an
    instruction is encoded: `{vex} vpdpbusd` is a vpdpbusd."""
    text = "\n".join(compiled.inspect_asm().values())
    names = re.findall(r"^\t(?:\{\w+\}\s+)*([a-z]\w+)", text, re.M)
    return np.array(sorted({*names, *re.findall(r"%([xyz]mm)", text)}))


def main() -> None:
    given = dict(np.load(sys.argv[1]))
    results = {**vocabulary(given), **products(given)}
    listed = {f"asm_{name}": instructions(k) for name, k in (("matmul", matmul.KERNELS[Q4_K]), ("integers", integers))}
    np.savez(sys.argv[2], level=LEVEL, fingerprint=fingerprint(), **results, **listed)


if __name__ == "__main__":
    main()
