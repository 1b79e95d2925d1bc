"""Emits every function of the vector vocabulary, and the inner step of the mat-mat, as assembly for a processor that
may not be this one. `test_cpu_simd.py` starts it once a target and reads what comes out.

    python simd_assembly.py LEVEL TRIPLE PROCESSOR
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core.registry import cpu_target

from auricle.kernels.cpu import isa

LEVEL, TRIPLE, PROCESSOR = sys.argv[1:]
isa.find_level = lambda: LEVEL  # before the vocabulary asks

from auricle.kernels.cpu import block, simd  # noqa: E402
from auricle.kernels.cpu.emit import F32, I32  # noqa: E402
from auricle.kernels.cpu.tiles import TILES  # noqa: E402

BYTES, REALS = types.Array(types.uint8, 1, "C"), types.Array(types.float32, 1, "C")
AT, WORD, REAL = types.int64, types.uint32, types.float32

ARGUMENTS: dict[str, Sequence[types.Type]] = {
    "load_bytes": (BYTES, AT),
    "load_halves": (BYTES, AT, AT),
    "load": (REALS, AT),
    "store": (REALS, AT, F32),
    "store_bytes": (BYTES, AT, I32),
    "store_narrow": (BYTES, AT, I32),
    "load_bf16": (BYTES, AT),
    "load_half": (BYTES, AT),
    "load_signed": (BYTES, AT),
    "load_u32": (BYTES, AT),
    "load_u16": (BYTES, AT),
    "repeat_word": (BYTES, AT),
    "repeat_float": (REALS, AT),
    "prefetch": (BYTES, AT),
    "lanes": (AT,),
    "lanes_float": (types.float64,),
    "spread_bytes": (WORD, WORD),
    "pairs_of_halfwords": (BYTES, AT, AT),
    "to_float": (I32,),
    "round_to_int": (F32,),
    "half_to_float": (I32,),
    "half_number": (WORD,),
    "low_halves": (I32, I32),
    "high_halves": (I32, I32),
    "spread_0": (F32,),
    "spread_2": (F32,),
    "spread_8": (F32,),
    "spread_10": (F32,),
    "transpose": (BYTES, AT, AT, BYTES, AT),
    "fma": (F32, F32, F32),
    "sum_lanes": (F32,),
    "sum_four": (F32, F32, F32, F32),
    "lane": (F32, AT),
    "as_float": (I32,),
    "sum_ints": (I32,),
    "absolute": (F32,),
    "maximum": (F32, F32),
    "divide": (F32, F32),
    "clamp": (F32, F32, F32),
    "max_lanes": (F32,),
    "dot4": (I32, I32, I32),
    "dot4_wide": (I32, I32, I32),
    "shift_halves": (I32, AT, AT),
}


def functions() -> Iterator[tuple[str, Any, Sequence[types.Type]]]:
    for name, arguments in ARGUMENTS.items():
        yield name, getattr(simd, name), arguments
    arrays = {0: BYTES, block.CODES: BYTES, block.SCALES: REALS, block.SUMS: REALS}
    for tile in TILES.values():
        step = block.make_block(tile, 1 << 16, 1 << 12)
        names = step._defn.__signature__.parameters
        yield f"block_{tile.format.name}", step, [arrays.get(i, AT) for i in range(len(names) - 1)]


def emit_module() -> ir.Module:
    context = cpu_target.target_context
    module = ir.Module()
    for name, function, arguments in functions():
        signature, generate = function._defn(None, *arguments)
        kinds = [context.get_value_type(argument) for argument in arguments]
        nothing = signature.return_type == types.void
        result = ir.VoidType() if nothing else context.get_value_type(signature.return_type)
        body = ir.Function(module, ir.FunctionType(result, kinds), name)
        builder = ir.IRBuilder(body.append_basic_block())
        value = generate(context, builder, signature, body.args)
        builder.ret_void() if nothing else builder.ret(value)
    return module


def main() -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(TRIPLE).create_target_machine(cpu=PROCESSOR, opt=3)
    module = emit_module()
    module.triple = TRIPLE
    print(machine.emit_assembly(binding.parse_assembly(str(module))))


if __name__ == "__main__":
    main()
