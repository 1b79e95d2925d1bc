"""What a kernel becomes on a card, told without one: it is compiled for a processor and the machine code is read.

Kernels are listed as cases: a jitted function with the types of its arguments and its constants. The numbers come from
the tools in Triton's own package. Knows no kernel, and says nothing about speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..errors import AuricleError

ARCHS = (80, 89, 90, 120)  # compute capabilities, times ten: A100, RTX 40, H100 and H200, RTX 50
ALIGNED = ":16"  # after the type of an integer: it is a multiple of 16, as Triton finds out by itself at a launch
DIVISIBLE_BY_16 = [["tt.divisibility", 16]]
TENSOR_CORE = re.compile(r"\b(?:H|B|I|Q|O|HG|IG|QG)MMA\b")  # the last three: of a warp group


class StaticError(AuricleError):
    """A kernel that cannot be looked at: a tool or a processor is missing."""


@dataclass(frozen=True)
class Case:
    """A kernel in one configuration.

    `type`: name of the type of the weights, or of the cache. `config`: plain data that tells configurations apart, for
    tables. `signature`: type of each argument that is not a constant, by name, such as `*u8`, `*fp16` or `i32`;
    pointers are 16-byte aligned, and integers whose type ends in `:16` are multiples of 16. `constexprs`: the other
    arguments, functions among them. `weights`: names of the pointers whose loads matter; by default all.
    `activations`: those of what meets the weights. `n_weights`: that a thread multiplies in all, with `dots`
    instructions that multiply four bytes each; 0 where it does not do that.
    """

    kernel: str
    type: str
    config: Mapping[str, Any]
    fn: Callable[..., Any]
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    weights: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    n_weights: float = 0
    dots: int = 0


@dataclass(frozen=True)
class Row:
    """What became of a case. `config` names its warps and stages, too. `registers`: of a thread; `stack` and `local`:
    bytes of a thread, 0 where nothing is put aside, which loops do `spills` times; `shared`: bytes of a block;
    `load_bits`: width of the widest load of weights from global memory, 0 when there is none; `tensor_core`: whether
    matrix instructions are used; `moves`: how often a loop lays an accumulator out anew, which takes it through shared
    memory; `activation_bits`: width of the narrowest load of activations, `instructions`: that a thread executes for a
    weight, both 0 where a case does not say."""

    kernel: str
    type: str
    arch: int
    config: Mapping[str, Any]
    registers: int
    stack: int
    local: int
    shared: int
    load_bits: int
    tensor_core: bool
    spills: int
    moves: int
    activation_bits: int
    instructions: float


def compile_case(case: Case, arch: int) -> Row:
    """Compiles a case for the processor `arch` (one of ARCHS) and reads the result; no GPU is needed.

    Raises StaticError when Triton interprets kernels in this process, or a tool is not where Triton keeps it.
    """
    if not hasattr(case.fn, "cache_key"):
        raise StaticError("kernels are interpreted here and nothing is compiled: unset TRITON_INTERPRET and start anew")
    names = [name for name in case.fn.arg_names if name not in case.constexprs]
    assert set(names) == set(case.signature), f"{case.kernel}: {names} {sorted(case.signature)}"
    compiled = triton.compile(
        make_source(case),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True},
    )
    usage, code = read_cubin(compiled.asm["cubin"])
    weights = {names.index(name) for name in case.weights or names}
    activations = {names.index(name) for name in case.activations}
    loads = find_loads(compiled.asm["ptx"])
    return Row(
        kernel=case.kernel,
        type=case.type,
        arch=arch,
        config={**case.config, "warps": case.num_warps, "stages": case.num_stages},
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        load_bits=max((bits for n, bits in loads if n in weights), default=0),
        tensor_core=bool(TENSOR_CORE.search(code)),
        spills=count_spills(code),
        moves=count_moves(compiled.asm["ttgir"]),
        activation_bits=min((bits for n, bits in loads if n in activations), default=0),
        instructions=round(count_instructions(code, case.dots) / case.n_weights, 2) if case.dots else 0.0,
    )


def make_source(case: Case) -> ASTSource:
    """The case as Triton's compiler takes it: every argument in order, constants marked as such."""
    nested = [name for name, value in case.constexprs.items() if isinstance(value, tuple) and any(map(callable, value))]
    assert not nested, f"{case.kernel}: {nested} hide functions in tuples, where Triton's cache does not see a change"
    signature, attributes = {}, {}
    for n, name in enumerate(case.fn.arg_names):
        kind = case.signature.get(name, "constexpr")
        if kind.startswith("*") or kind.endswith(ALIGNED):
            attributes[(n,)] = DIVISIBLE_BY_16
        signature[name] = kind.removesuffix(ALIGNED)
    return ASTSource(fn=case.fn, signature=signature, constexprs=dict(case.constexprs), attrs=attributes)


# Machine code.


def read_cubin(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resources of the one kernel in a cubin by name (REG, STACK, LOCAL …), and its instructions as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run_tool("cuobjdump", "--dump-resource-usage", path)
        code = run_tool("nvdisasm", "--print-code", path)
    line = next(line for line in usage.splitlines() if "REG:" in line)
    return {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}, code


def run_tool(name: str, *arguments: str | Path) -> str:
    """What a tool of Triton's package prints."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not tool.exists():
        raise StaticError(f"Triton {triton.__version__} has no {tool}: install the triton package of PyPI for Linux")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StaticError(f"{name} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    return done.stdout


# Loads are read from PTX, where it can still be told which argument an address comes from.

LOAD = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[a-z](\d+)\s+[^\[]*\[\s*(%\w+)")
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^\]]*\],\s*\[\s*(%\w+)[^\]]*\],\s*(0x\w+|\d+)")
DEFINITION = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(%rd\d+),\s*(.*);", re.MULTILINE)
SOURCE = re.compile(r"%rd\d+|_param_\d+(?=\])")


def find_loads(ptx: str) -> list[tuple[int, int]]:
    """Loads from global memory, into registers or shared memory: number of the pointer argument, and bits."""
    sources: dict[str, set[str]] = {}
    for register, operands in DEFINITION.findall(ptx):
        sources.setdefault(register, set()).update(SOURCE.findall(operands))
    loads = [(address, int(n or 1) * int(bits)) for n, bits, address in LOAD.findall(ptx)]
    loads += [(address, 8 * int(n, 0)) for address, n in COPY.findall(ptx)]
    return [(argument, bits) for address, bits in loads for argument in trace_arguments(address, sources)]


def trace_arguments(register: str, sources: Mapping[str, set[str]]) -> set[int]:
    """Numbers of the arguments that an address is computed from; 64-bit integers may be among them."""
    seen, found, left = {register}, set(), [register]
    while left:
        for source in sources.get(left.pop(), ()):
            if source.startswith("_param_"):
                found.add(int(source.removeprefix("_param_")))
            elif source not in seen:
                seen.add(source)
                left.append(source)
    return found


# Layouts are read from Triton's own form: in machine code a move looks like any other store and load.

LOOP = re.compile(r"^(\s*)(?:%[^=]*= )?scf\.(?:for|while)\b")
CARRIED = re.compile(r"tensor<([\dx]+xf32), #\w+>")
LOOP_END = re.compile(r"^(\s*)\}")
PRODUCT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b.*->\s*tensor<([\dx]+xf32), #mma\w*>")
MOVE = re.compile(r"\bttg\.(?:convert_layout|local_alloc|local_store)\b.*?\btensor<([\dx]+xf32), (#\w+)>(.*)")


def count_moves(ttgir: str) -> int:
    """Changes of layout, in loops, of tensors of the shape of an accumulator: a product of tensor cores, made in the
    loop or in one inside it, that the loop carries on. Operands, before and after they are laid out, do not count."""
    moves, loops = 0, []  # of each open loop: its indentation, shapes it carries, of products, and that are moved
    for line in ttgir.splitlines():
        if start := LOOP.match(line):
            loops.append((start[1], set(CARRIED.findall(line.rpartition("->")[2])), set(), []))
            continue
        if not loops:
            continue
        indent, carried, products, moved = loops[-1]
        if (end := LOOP_END.match(line)) and end[1] == indent:
            loops.pop()
            moves += sum(shape in carried & products for shape in moved)
            if loops:
                loops[-1][2].update(products)
        elif product := PRODUCT.search(line):
            products.add(product[1])
        elif (move := MOVE.search(line)) and "#mma" in move[2] + move[3] and "dot_op" not in move[3]:
            moved.append(move[1])
    return moves


# Instructions are counted in the machine code. How often a loop runs is told by the products that are made in all.

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", re.MULTILINE)
LABEL = re.compile(r"^\s*(\.L_x_\d+):", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")
DOT = re.compile(r"\bIDP\.4A\b")
SPILL = re.compile(r"\b(?:STL|LDL)\b")


def count_instructions(code: str, dots: int) -> float:
    """Instructions that a thread executes which makes `dots` products of four bytes: each once, and those of loops as
    often as makes up the number. For kernels whose loops all run equally often, none within another."""
    instructions, inside = find_looped(code)
    n_inside = sum(bool(DOT.search(instructions[i])) for i in inside)
    n_outside = sum(bool(DOT.search(text)) for text in instructions) - n_inside
    rounds = (dots - n_outside) / n_inside if n_inside else float(dots == n_outside)
    assert rounds in range(1, dots + 1), f"{dots=} {n_outside=} {n_inside=}"
    return len(instructions) - len(inside) + rounds * len(inside)


def count_spills(code: str) -> int:
    """Instructions in loops that put registers aside or fetch them. Around a loop a few cost nothing."""
    instructions, inside = find_looped(code)
    return sum(bool(SPILL.search(instructions[i])) for i in inside)


def find_looped(code: str) -> tuple[list[str], set[int]]:
    """All instructions, and the numbers of those in loops."""
    places = sorted(
        [(m.start(), "", m[1]) for m in INSTRUCTION.finditer(code)]
        + [(m.start(), m[1], "") for m in LABEL.finditer(code)]
    )
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for _, label, text in places:
        if label:
            labels[label] = len(instructions)
        elif not text.startswith("NOP"):
            instructions.append(text)
    inside: set[int] = set()
    for end, text in enumerate(instructions):
        branch = BRANCH.search(text)
        if branch and labels[branch[1]] < end:  # the last of them branches to itself, after the end
            inside.update(range(labels[branch[1]], end + 1))
    return instructions, inside
