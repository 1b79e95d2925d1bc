"""GPU kernels without a GPU: the table of what they become on four processors, and a few compiled here and now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from typing import Any

import pytest

from auricle.kernels.gpu.static import ARCHS, Row, count_instructions, count_moves, count_spills, find_loads
from auricle.kernels.gpu.tiles import TILES
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import kernel_static

LIVE = r"^(matvec Q4_K|matmul Q6_K|kv_attention_split Q8_0|norm_rope_store F16)$"
AGAIN = "run benchmarks/kernels.py --static --save"


TABLES = {path: json.loads(path.read_text()) for path in sorted(kernel_static.RESULTS.glob("kernels-static-*.json"))}


@pytest.fixture(scope="module", params=TABLES, ids=lambda path: path.stem)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The table of the Triton that is here. Another one can only be made, and compared, where that Triton is."""
    document, here = TABLES[request.param], version("triton")
    if kernel_static.table_path(here) != request.param:
        pytest.skip(f"made with Triton {document['triton']}; here is {here}")
    return document


def run_without_interpreter(*command: object) -> subprocess.CompletedProcess[str]:
    """In a process that compiles, whatever the tests beside it do."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )


# The committed tables.


def test_there_is_a_table_of_each_triton_that_is_supported() -> None:
    assert {path.stem for path in TABLES} == {"kernels-static-3.6", "kernels-static-3.9"}
    for path, document in TABLES.items():
        assert kernel_static.table_path(document["triton"]) == path
        assert document["faults"] == []


def test_the_table_is_of_these_sources(document: dict[str, Any]) -> None:
    now = kernel_static.hash_sources()
    changed = sorted(
        name for name in now.keys() | document["sources"].keys() if now.get(name) != document["sources"].get(name)
    )
    assert not changed, AGAIN


def test_the_table_is_whole(document: dict[str, Any]) -> None:
    code = (
        f"import sys, json; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import kernel_static\n"
        "tasks = kernel_static.list_tasks('', None)\n"
        "print(json.dumps([kernel_static.list_cases(name, arch)[n].kernel for name, n, arch in tasks]))"
    )
    listed = json.loads(run_without_interpreter("-c", code).stdout.splitlines()[-1])
    assert Counter(row["kernel"] for row in document["rows"]) == Counter(listed), AGAIN
    assert {row["arch"] for row in document["rows"]} == set(ARCHS)
    for kernel in ("matvec", "matmul"):
        assert {row["type"] for row in document["rows"] if row["kernel"] == kernel} >= {fmt.name for fmt in TILES}


def test_nothing_is_wrong_with_any_kernel(document: dict[str, Any]) -> None:
    """No spills; registers and shared memory fit; wide loads in the mat-vec, tensor cores in the mat-mat."""
    assert kernel_static.find_faults(document["rows"]) == document["faults"] == []


@pytest.mark.parametrize("kernel", ["matvec", "matvec_gated", "matvec_three", "matvec_best"])
def test_products_of_bytes_are_counted(document: dict[str, Any], kernel: str) -> None:
    """At one token and at eight, so that `find_faults` can say what a weight costs."""
    rows = [row for row in document["rows"] if row["kernel"] == kernel]
    counted = {(row["type"], row["config"]["tokens"]) for row in rows if row["instructions"]}
    types = {"matvec_three": ["Q4_K+Q4_K+Q6_K"], "matvec_best": ["Q4_K", "Q6_K"]}
    few = (1,) if kernel == "matvec_best" else (1, 8)
    assert counted >= {(name, n) for name in types.get(kernel, ["Q4_K", "Q5_K", "Q6_K", "Q8_0"]) for n in few}


def test_rows_have_what_a_reader_of_json_expects(document: dict[str, Any]) -> None:
    assert all(tuple(row) == kernel_static.KEYS == tuple(Row.__dataclass_fields__) for row in document["rows"])


# Compiled now.


def test_kernels_compile_for_the_target_card() -> None:
    script = ROOT / "benchmarks/kernels.py"
    done = run_without_interpreter(script, "--static", "--json", "--archs", 89, "--only", LIVE)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} == {"matvec", "matmul", "kv_attention_split", "norm_rope_store"}
    assert all(row["arch"] == 89 for row in rows)


def test_no_gpu_is_said_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/kernels.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no GPU here" in done.stderr


# What is found wrong.

CONFIG = {"tokens": 1, "in_flight": 64, "warps": 4, "stages": 2}
GOOD = {"kernel": "matvec", "type": "Q4_K", "arch": 89, "config": CONFIG, "registers": 96}
GOOD |= {"stack": 0, "local": 0, "shared": 1024, "load_bits": 128, "tensor_core": False, "spills": 0, "moves": 0}
GOOD |= {"activation_bits": 128, "instructions": 2.5}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8, "spills": 4}, None),
        ({"stack": 8, "spills": 5}, "spills: 8 bytes of stack and local memory, 5 times in loops"),
        ({"stack": 40}, "spills: 40 bytes"),
        ({"stack": 8, "local": 40}, "spills: 48 bytes"),
        ({"shared": 100 << 10}, "a block may have 101376"),
        ({"shared": 100 << 10, "arch": 90, "kernel": "attention"}, None),
        ({"registers": 255, "config": {"warps": 16}, "kernel": "attention"}, "not one block fits"),
        ({"load_bits": 32}, "weights are loaded 32 bits at a time"),
        ({"activation_bits": 32}, "activations are loaded 32 bits at a time"),
        ({"instructions": 2.51}, "2.51 instructions a weight, at most 2.5"),
        ({"instructions": 6.0, "config": CONFIG | {"tokens": 8}}, None),
        ({"instructions": 6.01, "config": CONFIG | {"tokens": 8}}, "6.01 instructions a weight, at most 6.0"),
        ({"registers": 255}, "16384 bytes on their way from 8 warps"),
        ({"registers": 255, "config": CONFIG | {"in_flight": 180}}, None),
        ({"kernel": "matmul"}, "no tensor core"),
        ({"kernel": "matmul", "tensor_core": True, "moves": 2}, "an accumulator out anew 2 times"),
        ({"kernel": "matmul", "tensor_core": True, "registers": 255}, None),
    ],
)
def test_faults(change: dict[str, Any], fault: str | None) -> None:
    found = kernel_static.find_faults([GOOD | change])
    assert len(found) == (fault is not None), found
    assert fault is None or fault in found[0]


PTX = """
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_2];
    mul.wide.s32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    @%p1 add.s64 %rd5, %rd2, %rd3;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 16 ];
    ld.global.L1::evict_first.b16 { %rs1 }, [ %rd4 + 0 ];
    ld.global.v2.b64 {%rd8, %rd9}, [%rd5];
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd5 + 64 ], 0x10, %r8;
    cp.async.ca.shared.global [ %r9 + 0 ], [ %rd5 + 64 ], 8;
    st.global.v4.b32 [ %rd4 + 0 ], { %r2, %r3, %r4, %r5 };
"""


def test_loads_are_told_apart_by_argument() -> None:
    assert sorted(find_loads(PTX)) == [(0, 16), (0, 128), (2, 64), (2, 128), (2, 128)]


TTGIR = """
    %sums = scf.for %i = %a to %b step %c iter_args(%arg8 = %cst) -> (tensor<64x128xf32, #mma>)  : i32 {
      %0 = ttg.convert_layout %mask : tensor<64xi1, #ttg.slice<{dim = 1, parent = #mma}>> -> tensor<64xi1, #blocked>
      %1 = ttg.local_alloc %w : (tensor<64x32xf16, #blocked6>) -> !ttg.memdesc<64x32xf16, #shared2, #smem>
      %2 = ttg.convert_layout %arg8 : tensor<64x128xf32, #mma> -> tensor<64x128xf32, #mma1>
      %3 = ttng.warp_group_dot %1, %x, %2 : tensor<64x32xf16> * !ttg.memdesc<32x128xf16> -> tensor<64x128xf32, #mma1>
      %4 = ttg.convert_layout %3 : tensor<64x128xf32, #mma1> -> tensor<64x128xf32, #mma>
      %5 = ttg.convert_layout %4 : tensor<64x128xf32, #mma> -> tensor<64x128xf32, #ttg.dot_op<{opIdx = 0}>>
      %6 = ttg.convert_layout %k : tensor<64x128xf32, #blocked> -> tensor<64x128xf32, #linear>
      scf.yield %4 : tensor<64x128xf32, #mma>
    } loc(#loc280)
    %7 = ttg.convert_layout %sums : tensor<64x128xf32, #mma> -> tensor<64x128xf32, #blocked2> loc(#loc144)
"""


def test_moves_of_accumulators_are_counted_inside_loops() -> None:
    assert count_moves(TTGIR) == 2
    assert count_moves(TTGIR.replace("#mma", "#blocked")) == 0  # sums of threads, not of tensor cores
    assert count_moves(TTGIR.replace("-> (tensor<64x128xf32", "-> (tensor<64x256xf32")) == 0  # nothing is summed


CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 IDP.4A.U8.S8 R8, R4, R5, RZ ;
        /*0030*/                   IDP.4A.U8.S8 R8, R6, R7, R8 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   IDP.4A.U8.S8 R8, R6, R7, R8 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
        /*0080*/                   NOP;
"""


@pytest.mark.parametrize(("dots", "instructions"), [(3, 8), (7, 16), (21, 44)])
def test_loops_are_counted_as_often_as_their_products_say(dots: int, instructions: int) -> None:
    assert count_instructions(CODE, dots) == instructions


def test_spills_count_in_loops() -> None:
    inside = CODE.replace("LDG.E.128 R4, [R2.64]", "LDL R4, [R1]").replace("S2R R0, SR_TID.X", "STL [R1], R0")
    assert (count_spills(CODE), count_spills(inside)) == (0, 1)


def test_products_that_no_number_of_rounds_makes_are_a_defect() -> None:
    with pytest.raises(AssertionError, match="dots=4"):
        count_instructions(CODE, 4)
