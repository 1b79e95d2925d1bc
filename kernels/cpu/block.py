"""The innermost step of the mat-mat, unrolled: 32 weights of some strips of rows, times some tokens, in registers.

A strip is sixteen rows side by side, one a lane. Knows where `matmul.py` puts things; knows of a type only the length
of its groups and the range of its codes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .emit import ANY, F32, FLOAT, I32, INT, LANES, LEVEL, Code, Value, define, multiply_bytes
from .tiles import Tile

# The shape of a block: as many sums as the registers of the machine hold.
STRIPS, TOKENS = (4, 4) if LEVEL == "vnni" else (1, 4)

CODES, SCALES, SUMS = 5, 7, 8  # the arrays among the arguments of `add`; the work space is argument 0


def make_block(tile: Tile, strip_bytes: int, minima_at: int) -> Any:
    """The step for a type. `strip_bytes`: from one strip to the next in the work space; `minima_at`: from scales to
    minima there.

    Where one code means 0 everywhere, the sums begin at what that code would add for each weight, below zero: then
    no minima are needed.
    """
    group = tile.group
    strips, tokens = range(STRIPS), range(TOKENS)

    @define(types.void, *[ANY] * 11)
    def add(
        code: Code,
        work: Value,
        words: Value,
        factors: Value,
        totals: Value,
        totals_step: Value,
        codes: Value,
        at: Value,
        scales: Value,
        sums: Value,
        i: Value,
        half_step: Value,
    ) -> None:
        """Adds to `totals` the products of 32 weights. Of the first strip: `words`, `factors` and `totals` are the
        bytes of `work` where its codes, its scales and its sums are; those of the next strip are `totals_step` bytes
        further. Token t has its codes at byte `at` + 32 t, its scale and its sum (of codes, int32, where there are no
        minima) at i + t; those of the second half of 16 are `half_step` further."""
        b = code.builder

        def place(first: Value, *offsets: int) -> Value:
            return b.add(first, first.type(sum(offsets)))

        def repeat(array: Value, index: Value, lane: ir.Type, argument: int, vector: ir.VectorType) -> Value:
            return code.fill(code.read(array, index, lane, argument), vector)

        for half in range(32 // group):
            first = b.add(i, b.mul(half_step, half_step.type(half)))
            x_scales = [repeat(scales, place(first, t), FLOAT, SCALES, F32.ir) for t in tokens]
            kind = (INT[32], I32.ir) if tile.zero else (FLOAT, F32.ir)
            x_sums = [repeat(sums, place(first, t), kind[0], SUMS, kind[1]) for t in tokens]
            starts = [code.constant(I32.ir, 0)] * TOKENS
            if tile.zero:
                starts = [b.sub(starts[0], b.shl(x, code.constant(I32.ir, tile.zero.bit_length() - 1))) for x in x_sums]
            picked = range(half * group // 4, (half + 1) * group // 4)
            products = _multiply(code, work, words, codes, at, strip_bytes, picked, starts, tile.wide)
            for s in strips:
                factor = code.read(work, place(factors, s * strip_bytes, 64 * half), F32.ir)
                minimum = code.read(work, place(factors, s * strip_bytes, 64 * half, minima_at), F32.ir)
                row = b.add(totals, b.mul(totals_step, totals_step.type(s)))
                for t in tokens:
                    target = code.pointer(work, place(row, 4 * LANES * t), F32.ir)
                    total = b.load(target, align=4)
                    if not tile.zero:
                        total = code.fma(minimum, x_sums[t], total)
                    scaled = b.fmul(b.sitofp(products[s, t], F32.ir), factor)
                    b.store(code.fma(scaled, x_scales[t], total), target, align=4)

    return add


def _multiply(
    code: Code,
    work: Value,
    words: Value,
    codes: Value,
    at: Value,
    strip_bytes: int,
    picked: range,
    starts: list[Value],
    wide: bool,
) -> dict[tuple[int, int], Value]:
    """Sums of products of bytes over the `picked` words (of four weights each), for each strip and token; those of
    token t begin at `starts[t]`."""
    b = code.builder
    products = {(s, t): starts[t] for s in range(STRIPS) for t in range(TOKENS)}
    for word in picked:
        weights = [
            code.read(work, b.add(words, words.type(s * strip_bytes + 64 * word)), I32.ir) for s in range(STRIPS)
        ]
        for t in range(TOKENS):
            x = code.fill(code.read(codes, b.add(at, at.type(32 * t + 4 * word)), INT[32], CODES), I32.ir)
            for s in range(STRIPS):
                products[s, t] = multiply_bytes(code, products[s, t], weights[s], x, wide=wide)
    return products
