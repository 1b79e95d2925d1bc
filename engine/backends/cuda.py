"""The CUDA backend: Triton kernels on weights that are kept on the card as they are stored, float32 between ops.

Products round activations to half precision; the residual stream, norms and sums are float32. What has no kernel runs
in PyTorch. Tests put a stand-in for the card and Triton's interpreter in their places.
"""

from __future__ import annotations

from functools import cache, partial

from ...kernels.gpu import tune
from ...kernels.gpu.linear import Picker
from ..rewrite import (
    absorb_closings,
    absorb_norms,
    fuse_convolutions,
    fuse_gates,
    fuse_linears,
    fuse_norm_ropes,
    fuse_steps,
    fuse_stores,
    widen_linears,
)
from . import cuda_conv, cuda_rows, cuda_torch
from .backend import Backend
from .cuda_device import Card
from .cuda_linear import linear_kernels
from .cuda_memory import CardDevice
from .cuda_steps import Stepper

RULES = (
    fuse_convolutions,
    fuse_gates,
    fuse_linears,
    fuse_norm_ropes,
    fuse_stores,
    fuse_steps,
    widen_linears,
    absorb_norms,
    absorb_closings,
)


def make_backend(card: Card, pick: Picker | None = None) -> Backend:
    """`pick`: how products are cut; None as `kernels/gpu/tune.py` says for that card."""
    cut = pick or partial(tune.pick, device_name=card.name, capability=card.capability)
    kernels = cuda_torch.KERNELS | cuda_conv.KERNELS | cuda_rows.KERNELS | linear_kernels(cut)
    sizes = {"kv_type": "f16", "window_batch": 8, "prefill_chunk": 512}
    return Backend("cuda", kernels, RULES, **sizes, device=CardDevice(card), bind_steps=Stepper)


@cache
def first_card() -> Backend:
    """The backend on the first GPU. Raises BackendError, one line, where it cannot run."""
    return make_backend(Card())
