"""The CPU backend: compiled kernels on the mapped weights where there are any, PyTorch for the rest.

Precisions: `auto` rounds activations to int8 wherever a weight is quantised; `exact` computes everything in float32
from the stored weights; `bf16` decodes weights to bfloat16, for machines whose matrix units multiply that. Plain ops
without a kernel here run as the reference defines them. Without numba, `auto` is `exact`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch

from ..graph import Node, Value
from ..rewrite import fuse_add_norms, fuse_gates, fuse_linears, fuse_norm_ropes
from . import cpu_float, reference
from .backend import Backend, Bound, Kernel
from .cpu_attention import bind_block_attention, block_bytes, block_scratch

log = logging.getLogger("auricle.backends")

PRECISIONS = ("auto", "exact", "bf16")


def bind_add(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Callable[[], None]:
    a, b = inputs
    return lambda: torch.add(a, b, out=outputs[0])


def bind_gelu(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Callable[[], None]:
    return lambda: torch.ops.aten.gelu.out(inputs[0], approximate="none", out=outputs[0])


def bind_permute(node: Node, inputs: Bound, outputs: Bound, scratch: Any) -> Callable[[], None]:
    return lambda: outputs[0].copy_(inputs[0].permute(node.attrs["dims"]))


def own_bytes(values: tuple[Value, ...]) -> int:
    return sum(v.nbytes for v in values)


def conv_bytes(node: Node) -> int:
    """The library's result and its reordered copies of the input and the weight."""
    return own_bytes(node.outputs) + sum(v.nbytes for v in node.operands)


def torch_kernels(dtype: torch.dtype) -> dict[str, Kernel]:
    """Everything in PyTorch; linear maps in `dtype`."""
    transient = partial(cpu_float.transient_bytes, dtype=dtype)
    return reference.KERNELS | {
        "linear": Kernel(partial(cpu_float.bind_linear, dtype=dtype), cpu_float.scratch_bytes, transient),
        "gated_linear": Kernel(partial(cpu_float.bind_gated_linear, dtype=dtype), cpu_float.scratch_bytes, transient),
        "add": Kernel(bind_add),
        "gelu": Kernel(bind_gelu),
        "permute": Kernel(bind_permute),
        "conv2d": Kernel(reference.bind_definition, transient=conv_bytes),
        "kv_attention": Kernel(bind_block_attention, block_scratch, block_bytes),
    }


def compiled_kernels() -> Mapping[str, Kernel]:
    """Kernels that numba compiles, over those of PyTorch."""
    from ...kernels.cpu.jit import prepare
    from . import cpu_int8, cpu_rows

    prepare()
    return torch_kernels(torch.float32) | {
        "linear": Kernel(cpu_int8.bind_linear, cpu_int8.scratch_bytes),
        "linears": Kernel(cpu_int8.bind_linears, cpu_int8.scratch_bytes),
        "gated_linear": Kernel(cpu_int8.bind_gated_linear, cpu_int8.scratch_bytes),
        "rms_norm": Kernel(cpu_rows.bind_rms_norm),
        "add_rms_norm": Kernel(cpu_rows.bind_add_rms_norm),
        "norm_rope": Kernel(cpu_rows.bind_norm_rope),
        "kv_store": Kernel(cpu_rows.bind_kv_store, transient=reference.transient_bytes),
        "kv_attention": Kernel(cpu_rows.bind_kv_attention, cpu_rows.kv_attention_scratch, block_bytes),
    }


def has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def make_backend(precision: str) -> Backend:
    """The backend for one of `PRECISIONS`."""
    if precision == "auto" and not has_numba():
        log.warning("numba is not installed: everything runs in PyTorch, which is slower; pip install numba")
        precision = "exact"
    sizes = {"kv_type": "f16", "window_batch": 4, "prefill_chunk": 512}
    if precision == "auto":
        rules = (fuse_gates, fuse_linears, fuse_add_norms, fuse_norm_ropes)
        from ...kernels.cpu.jit import one_at_a_time
        from ...kernels.cpu.tiles import TILES

        rounded = frozenset(fmt.name for fmt in TILES)
        return Backend("cpu", compiled_kernels(), rules, **sizes, rounds=rounded, alone=one_at_a_time)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Backend("cpu", torch_kernels(dtype), (fuse_gates,), **sizes)
