"""A small vector vocabulary for compiled kernels: sixteen lanes of 32 bits, and what is done with them.

Arrays of bytes are addressed in bytes, arrays of floats in elements. Nothing is bounds-checked. The functions can be
called from compiled code only; `emit.py` says what vectors are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import overload

from .emit import ANY, F32, FLOAT, I32, INT, LANES, Code, Value, Vector, define, multiply_bytes, widen_half

# Loading and storing.


@define(I32, ANY, ANY)
def load_bytes(code: Code, array: Value, at: Value) -> Value:
    """64 bytes from `at` on."""
    return code.read(array, at, I32.ir)


@define(I32, ANY, ANY, ANY)
def load_halves(code: Code, array: Value, low: Value, high: Value) -> Value:
    """32 bytes from `low` on, then 32 bytes from `high` on."""
    half = ir.VectorType(INT[32], 8)
    return code.join([code.read(array, low, half), code.read(array, high, half)])


@define(F32, ANY, ANY)
def load(code: Code, array: Value, index: Value) -> Value:
    """Sixteen float32."""
    return code.read(array, index, F32.ir)


@define(types.void, ANY, ANY, F32)
def store(code: Code, array: Value, index: Value, vector: Value) -> None:
    """Sixteen float32."""
    code.builder.store(vector, code.pointer(array, index, F32.ir), align=4)


@define(types.void, ANY, ANY, I32)
def store_bytes(code: Code, array: Value, at: Value, vector: Value) -> None:
    """64 bytes."""
    code.builder.store(vector, code.pointer(array, at, I32.ir), align=1)


@define(types.void, ANY, ANY, I32)
def store_narrow(code: Code, array: Value, at: Value, vector: Value) -> None:
    """Sixteen bytes: the lowest of each lane."""
    narrow = ir.VectorType(INT[8], LANES)
    code.builder.store(code.builder.trunc(vector, narrow), code.pointer(array, at, narrow), align=1)


@define(types.void, ANY, ANY, F32)
def store_half(code: Code, array: Value, at: Value, vector: Value) -> None:
    """Sixteen F16, rounded to nearest, from byte `at` on. Not for level `generic`."""
    narrow = ir.VectorType(ir.HalfType(), LANES)
    code.builder.store(code.builder.fptrunc(vector, narrow), code.pointer(array, at, narrow), align=1)


@define(F32, ANY, ANY)
def load_bf16(code: Code, array: Value, at: Value) -> Value:
    """Sixteen BF16, from byte `at` on: the upper halves of float32."""
    b = code.builder
    wide = b.zext(code.read(array, at, ir.VectorType(INT[16], LANES)), I32.ir)
    return b.bitcast(b.shl(wide, code.constant(I32.ir, 16)), F32.ir)


@define(F32, ANY, ANY)
def load_half(code: Code, array: Value, at: Value) -> Value:
    """Sixteen F16 from byte `at` on, as float32."""
    return widen_half(code, code.builder.zext(code.read(array, at, ir.VectorType(INT[16], LANES)), I32.ir))


@define(I32, ANY, ANY)
def load_signed(code: Code, array: Value, at: Value) -> Value:
    """Sixteen int8 from byte `at` on, each in its lane."""
    return code.builder.sext(code.read(array, at, ir.VectorType(INT[8], LANES)), I32.ir)


@define(types.uint32, ANY, ANY)
def load_u32(code: Code, array: Value, at: Value) -> Value:
    """Four bytes from `at` on as one number."""
    return code.read(array, at, INT[32])


@define(types.uint32, ANY, ANY)
def load_u16(code: Code, array: Value, at: Value) -> Value:
    return code.builder.zext(code.read(array, at, INT[16]), INT[32])


@define(I32, ANY, ANY)
def repeat_word(code: Code, array: Value, at: Value) -> Value:
    """The four bytes from `at` on in every lane."""
    return code.fill(code.read(array, at, INT[32]), I32.ir)


@define(F32, ANY, ANY)
def repeat_float(code: Code, array: Value, index: Value) -> Value:
    """One float32 of an array in every lane."""
    return code.fill(code.read(array, index, FLOAT), F32.ir)


@define(types.void, ANY, ANY)
def prefetch(code: Code, array: Value, at: Value) -> None:
    """Asks for the cache line of byte `at`, which may lie outside the array."""
    b = code.builder
    p = b.bitcast(code.pointer(array, at, INT[8]), INT[8].as_pointer())
    read, keep, data = (INT[32](x) for x in (0, 3, 1))
    kind = ir.FunctionType(ir.VoidType(), [p.type] + [INT[32]] * 3)
    b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0"), [p, read, keep, data])


# Making vectors of numbers.


@define(I32, ANY)
def lanes(code: Code, number: Value) -> Value:
    """An integer in every lane, cut to 32 bits."""
    b = code.builder
    wide = number.type.width > 32
    return code.fill(b.trunc(number, INT[32]) if wide else b.zext(number, INT[32]), I32.ir)


@define(F32, ANY)
def lanes_float(code: Code, number: Value) -> Value:
    """A float in every lane, rounded to float32."""
    return code.fill(number if number.type == FLOAT else code.builder.fptrunc(number, FLOAT), F32.ir)


@define(I32, ANY, ANY)
def spread_bytes(code: Code, low: Value, high: Value) -> Value:
    """The lower four bytes of two integers, each byte in two lanes: b0 b0 b1 b1 … b7 b7."""
    b = code.builder
    four = ir.VectorType(INT[8], 4)
    low, high = (b.trunc(x, INT[32]) if x.type.width > 32 else x for x in (low, high))
    both = code.shuffle(b.bitcast(low, four), b.bitcast(high, four), [i // 2 for i in range(LANES)])
    return b.zext(both, I32.ir)


@define(I32, ANY, ANY, ANY)
def pairs_of_halfwords(code: Code, array: Value, at: Value, stride: Value) -> Value:
    """Eight uint16, `stride` bytes apart from byte `at` on, each in two lanes."""
    b = code.builder
    words = ir.Constant(ir.VectorType(INT[16], 8), ir.Undefined)
    for k in range(8):
        place = b.add(at, b.mul(stride, stride.type(k)))
        words = b.insert_element(words, code.read(array, place, INT[16]), INT[32](k))
    return b.zext(code.shuffle(words, words, [i // 2 for i in range(LANES)]), I32.ir)


@define(F32, I32)
def to_float(code: Code, x: Value) -> Value:
    return code.builder.sitofp(x, F32.ir)


@define(I32, F32)
def round_to_int(code: Code, x: Value) -> Value:
    """To the nearest whole number, halves to the even one."""
    return code.builder.fptosi(code.call("llvm.rint.v16f32", F32.ir, x), I32.ir)


@define(F32, I32)
def half_to_float(code: Code, bits: Value) -> Value:
    """Float32 of the half in the lower 16 bits of each lane; see `widen_half`."""
    return widen_half(code, bits)


@define(types.float32, types.uint32)
def half_number(code: Code, bits: Value) -> Value:
    """Float32 of one half; see `widen_half`."""
    one = ir.VectorType(INT[32], 1)
    vector = code.builder.insert_element(ir.Constant(one, ir.Undefined), bits, INT[32](0))
    return code.builder.extract_element(widen_half(code, vector), INT[32](0))


# Moving lanes.


@define(I32, I32, I32)
def low_halves(code: Code, a: Value, b: Value) -> Value:
    """The lower 32 bytes of a, then those of b."""
    return code.shuffle(a, b, [*range(8), *range(LANES, LANES + 8)])


@define(I32, I32, I32)
def high_halves(code: Code, a: Value, b: Value) -> Value:
    """The upper 32 bytes of a, then those of b."""
    return code.shuffle(a, b, [*range(8, LANES), *range(LANES + 8, 2 * LANES)])


def _spreading(first: int) -> Any:
    @define(F32, F32)
    def spread(code: Code, x: Value) -> Value:
        picks = (first, first + 1, first + 4, first + 5)
        return code.shuffle(x, x, [picks[lane // 4] for lane in range(LANES)])

    return spread


# Lanes k, k + 1, k + 4 and k + 5, each four times: for the scales of a tile's vectors of codes (`tiles.py`).
spread_0, spread_2, spread_8, spread_10 = (_spreading(k) for k in (0, 2, 8, 10))


@define(types.void, ANY, ANY, ANY, ANY, ANY)
def transpose(code: Code, source: Value, at: Value, stride: Value, target: Value, to: Value) -> None:
    """A square of sixteen rows of 64 bytes, `stride` bytes apart from byte `at` of `source` on, to 1024 bytes from byte
    `to` of `target` on: lane i of row k becomes lane k of row i. In four steps squares of 8, 4, 2 and 1 lanes change
    places across the diagonal."""
    b = code.builder
    starts = [b.add(at, b.mul(stride, stride.type(k))) for k in range(LANES)]
    rows = [code.read(source, start, I32.ir) for start in starts]
    for step in (8, 4, 2, 1):
        low = [(lane & ~step) + (LANES if lane & step else 0) for lane in range(LANES)]
        high = [lane + step for lane in low]
        for k in (k for k in range(LANES) if not k & step):
            upper, lower = rows[k], rows[k + step]
            rows[k], rows[k + step] = code.shuffle(upper, lower, low), code.shuffle(upper, lower, high)
    for k, row in enumerate(rows):
        place = code.pointer(target, b.add(to, to.type(4 * LANES * k)), I32.ir, argument=3)
        b.store(row, place, align=1)


# Arithmetic.


@define(F32, F32, F32, F32)
def fma(code: Code, a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once."""
    return code.fma(a, b, c)


@define(types.float32, F32)
def sum_lanes(code: Code, x: Value) -> Value:
    total = code.call("llvm.vector.reduce.fadd.v16f32", FLOAT, FLOAT(0.0), x)
    total.fastmath.add("reassoc")  # a tree of sums in place of a chain
    return total


@define(F32, F32, F32, F32, F32)
def sum_four(code: Code, a: Value, b: Value, c: Value, d: Value) -> Value:
    """The sums over the lanes of four vectors, in lanes 0 .. 3 of one: with fewer steps than four times `sum_lanes`."""
    parts = [a, b, c, d]
    for width in (1, 2):  # neighbours are added, and two vectors interleaved
        low = [lane if not lane & width else LANES + (lane - width) for lane in range(LANES)]
        high = [pick + width for pick in low]
        parts = [
            code.builder.fadd(code.shuffle(x, y, low), code.shuffle(x, y, high))
            for x, y in zip(parts[::2], parts[1::2], strict=True)
        ]
    (total,) = parts
    for distance in (8, 4):
        total = code.builder.fadd(total, code.shuffle(total, total, [(i + distance) % LANES for i in range(LANES)]))
    return total


@define(types.float32, F32, ANY)
def lane(code: Code, x: Value, index: Value) -> Value:
    """One lane of a vector."""
    return code.builder.extract_element(x, index)


@define(F32, I32)
def as_float(code: Code, bits: Value) -> Value:
    """The same bits, read as float32."""
    return code.builder.bitcast(bits, F32.ir)


@define(types.int32, I32)
def sum_ints(code: Code, x: Value) -> Value:
    return code.call("llvm.vector.reduce.add.v16i32", INT[32], x)


@define(F32, F32)
def absolute(code: Code, x: Value) -> Value:
    return code.call("llvm.fabs.v16f32", F32.ir, x)


@define(F32, F32, F32)
def maximum(code: Code, a: Value, b: Value) -> Value:
    """The larger of each lane; of a number and NaN, the number."""
    return code.call("llvm.maxnum.v16f32", F32.ir, a, b)


@define(F32, F32, F32)
def divide(code: Code, a: Value, b: Value) -> Value:
    return code.builder.fdiv(a, b)


@define(F32, F32, F32, F32)
def clamp(code: Code, x: Value, least: Value, most: Value) -> Value:
    """x, or the bound that it lies beyond; NaN stays NaN."""
    b = code.builder
    x = b.select(b.fcmp_ordered("<", x, least), least, x)
    return b.select(b.fcmp_ordered(">", x, most), most, x)


@define(types.float32, F32)
def max_lanes(code: Code, x: Value) -> Value:
    return code.call("llvm.vector.reduce.fmax.v16f32", FLOAT, x)


@define(I32, I32, I32, I32)
def dot4(code: Code, total: Value, codes: Value, signed: Value) -> Value:
    """total + the sum of four products of bytes in each lane. `codes` are bytes 0 .. 127, `signed` -127 .. 127."""
    return multiply_bytes(code, total, codes, signed, wide=False)


@define(I32, I32, I32, I32)
def dot4_wide(code: Code, total: Value, codes: Value, signed: Value) -> Value:
    """As `dot4`, for codes 0 .. 255."""
    return multiply_bytes(code, total, codes, signed, wide=True)


@define(I32, I32, ANY, ANY)
def shift_halves(code: Code, x: Value, low: Value, high: Value) -> Value:
    """The lower eight lanes shifted right by `low` bits, the upper eight by `high`."""
    b = code.builder
    amounts = [code.fill(b.trunc(n, INT[32]), ir.VectorType(INT[32], 8)) for n in (low, high)]
    return b.lshr(x, code.join(amounts))


def _operator(function: Callable[..., Any], vector: Vector, method: str) -> None:
    """`a + b` and the like for two vectors."""

    @define(vector, vector, vector)
    def emit(code: Code, a: Value, b: Value) -> Value:
        return getattr(code.builder, method)(a, b)

    @overload(function, inline="never")
    def choose(a, b):  # numba compares these names, and annotations, with those of the result
        return (lambda a, b: emit(a, b)) if a == b == vector else None


for _function, _method in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.xor, "xor"),
    (operator.mul, "mul"),
):
    _operator(_function, I32, _method)
for _function, _method in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _operator(_function, F32, _method)


def _shift(function: Callable[..., Any], method: str) -> None:
    """`x >> bits` and `x << bits`: every lane alike, zeros move in."""

    @define(I32, I32, ANY)
    def emit(code: Code, x: Value, bits: Value) -> Value:
        return getattr(code.builder, method)(x, code.fill(code.builder.trunc(bits, INT[32]), I32.ir))

    @overload(function, inline="never")
    def choose(x, bits):
        return (lambda x, bits: emit(x, bits)) if x == I32 else None


_shift(operator.rshift, "lshr")
_shift(operator.lshift, "shl")
