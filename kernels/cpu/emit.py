"""How vector code is emitted: vectors of sixteen lanes as numba types, and a builder for what is done with them.

`I32` and `F32` are sixteen int32 or float32 that live in registers: one AVX-512 register, two of AVX2 or four of NEON,
into which LLVM splits them. Everything emitted is plain vector code for any machine, but the products of bytes
(`multiply_bytes`), for which each has an instruction of its own (`isa.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .isa import find_level

LANES = 16
LEVEL = find_level()

INT = {bits: ir.IntType(bits) for bits in (8, 16, 32, 64)}
FLOAT = ir.FloatType()


class Vector(types.Type):
    """The type of sixteen numbers in registers."""

    def __init__(self, name: str, lane: ir.Type) -> None:
        self.ir = ir.VectorType(lane, LANES)
        super().__init__(name)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.ir)


I32 = Vector("i32x16", INT[32])
F32 = Vector("f32x16", FLOAT)
BYTES = ir.VectorType(INT[8], 4 * LANES)  # an I32 seen as bytes
ANY = None  # an argument of any type: an array, an index

Value = ir.Value


def define(result: types.Type, *arguments: types.Type | None) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of compiled code out of one that emits it: `emit(code, *values)`."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typing(context: Any, *given: types.Type) -> tuple[Any, Callable[..., Any]] | None:
            if len(given) != len(arguments) or any(a not in (ANY, g) for a, g in zip(arguments, given, strict=True)):
                return None

            def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
                code = Code(context, builder, signature.args)
                made = emit(code, *values)
                return context.get_dummy_value() if made is None else made

            return result(*given), generate

        names = ["context", *list(inspect.signature(emit).parameters)[1:]]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typing.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        typing.__name__, typing.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(typing)

    return decorate


class Code:
    """What the functions below emit code with: an IR builder, and the types of the arguments."""

    def __init__(self, context: Any, builder: ir.IRBuilder, arguments: Sequence[types.Type]) -> None:
        self.context, self.builder, self.arguments = context, builder, arguments

    def pointer(self, array: Value, index: Value, to: ir.Type, argument: int = 0) -> Value:
        """To element `index` of an array, which is the argument of that number, as a pointer to `to`."""
        b = self.builder
        data = self.context.make_array(self.arguments[argument])(self.context, b, array).data
        return b.bitcast(b.gep(data, [index]), to.as_pointer())

    def read(self, array: Value, index: Value, what: ir.Type, argument: int = 0) -> Value:
        return self.builder.load(self.pointer(array, index, what, argument), align=1)

    def fill(self, lane: Value, vector: ir.VectorType) -> Value:
        """A vector with `lane` everywhere."""
        b = self.builder
        first = b.insert_element(ir.Constant(vector, ir.Undefined), lane, INT[32](0))
        return self.shuffle(first, first, [0] * vector.count)

    def constant(self, vector: ir.VectorType, value: float | Sequence[float]) -> Value:
        values = list(value) if isinstance(value, Sequence) else [value] * vector.count
        return ir.Constant(vector, values)

    def shuffle(self, a: Value, b: Value, order: Sequence[int]) -> Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT[32], len(order)), list(order)))

    def call(self, name: str, result: ir.Type, *values: Value) -> Value:
        kind = ir.FunctionType(result, [v.type for v in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), values)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.call("llvm.fma.v16f32", F32.ir, a, b, c)

    def split(self, vector: Value, n: int) -> list[Value]:
        """A vector as n registers."""
        count = vector.type.count // n
        return [self.shuffle(vector, vector, range(i * count, (i + 1) * count)) for i in range(n)]

    def join(self, parts: list[Value]) -> Value:
        while len(parts) > 1:
            both = range(2 * parts[0].type.count)
            parts = [self.shuffle(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def bytes_of(self, vector: Value, n: int = 1) -> list[Value]:
        """An I32 as n registers of bytes."""
        return self.split(self.builder.bitcast(vector, BYTES), n)


def widen_half(code: Code, bits: Value) -> Value:
    """Float32 of the halves in the lower 16 bits of the lanes of `bits`. The machine's own conversion is used where
    there is one for certain; elsewhere LLVM would call a function that does not exist here."""
    b, vector = code.builder, bits.type
    floats = ir.VectorType(FLOAT, vector.count)
    if LEVEL != "generic":
        words = b.trunc(bits, ir.VectorType(INT[16], vector.count))
        return b.fpext(b.bitcast(words, ir.VectorType(ir.HalfType(), vector.count)), floats)
    return _widen_half_bits(code, bits, floats)


def _widen_half_bits(code: Code, bits: Value, floats: ir.VectorType) -> Value:
    """Integer arithmetic: exponent and fraction are shifted into place and the exponent's bias is corrected. A
    subnormal gets a leading one that is subtracted again; a product in its place would meet subnormal float32, which
    cost a hundred times as much. Infinities and NaN become finite; no weight or scale is one."""
    b, vector = code.builder, bits.type

    def exponent(bias: int) -> Value:
        return b.bitcast(b.add(magnitude, code.constant(vector, bias << 23)), floats)

    magnitude = b.shl(b.and_(bits, code.constant(vector, 0x7FFF)), code.constant(vector, 13))
    subnormal = b.icmp_unsigned("<", magnitude, code.constant(vector, 1 << 23))
    small = b.fsub(exponent(113), code.constant(floats, 2.0**-14))
    number = b.bitcast(b.select(subnormal, small, exponent(112)), vector)
    sign = b.shl(b.and_(bits, code.constant(vector, 0x8000)), code.constant(vector, 16))
    return b.bitcast(b.or_(number, sign), floats)


def multiply_bytes(code: Code, total: Value, codes: Value, signed: Value, *, wide: bool) -> Value:
    """What `dot4` and `dot4_wide` emit: the best instruction of the machine. Those of VNNI take bytes as int32, as
    LLVM 15 wants and LLVM 22, which wants bytes, still reads."""
    if LEVEL == "vnni":
        return code.call("llvm.x86.avx512.vpdpbusd.512", I32.ir, total, codes, signed)
    if LEVEL == "avxvnni":
        parts = zip(*(code.split(vector, 2) for vector in (total, codes, signed)), strict=True)
        name, eight = "llvm.x86.avx512.vpdpbusd.256", ir.VectorType(INT[32], 8)
        return code.join([code.call(name, eight, *p) for p in parts])
    if LEVEL == "avx2" and not wide:
        return code.builder.add(total, code.join(_dot_avx2(code, codes, signed)))
    if LEVEL == "neon" and not wide:  # signed by signed, which codes up to 127 are, too
        parts = zip(code.split(total, 4), code.bytes_of(codes, 4), code.bytes_of(signed, 4), strict=True)
        name, four = "llvm.aarch64.neon.sdot.v4i32.v16i8", ir.VectorType(INT[32], 4)
        return code.join([code.call(name, four, *p) for p in parts])
    return _dot_generic(code, total, codes, signed)


def _dot_avx2(code: Code, codes: Value, signed: Value) -> list[Value]:
    """Pairs of bytes to int16, which hold 2 * 127 * 127, then pairs of those to int32."""
    eight, sixteen = ir.VectorType(INT[32], 8), ir.VectorType(INT[16], 16)
    ones = code.constant(sixteen, 1)
    pairs = [
        code.call("llvm.x86.avx2.pmadd.ub.sw", sixteen, u, s)
        for u, s in zip(code.bytes_of(codes, 2), code.bytes_of(signed, 2), strict=True)
    ]
    return [code.call("llvm.x86.avx2.pmadd.wd", eight, pair, ones) for pair in pairs]


def _dot_generic(code: Code, total: Value, codes: Value, signed: Value) -> Value:
    """One byte of every lane at a time."""
    b = code.builder
    for shift in (0, 8, 16, 24):
        u = b.and_(b.lshr(codes, code.constant(I32.ir, shift)), code.constant(I32.ir, 0xFF))
        s = b.ashr(b.shl(signed, code.constant(I32.ir, 24 - shift)), code.constant(I32.ir, 24))
        total = b.add(total, b.mul(u, s))
    return total
