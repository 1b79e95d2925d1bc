"""The CUDA backend: Triton kernels on weights that are kept on the card as they are stored, float32 between ops.

Products of more than 16 tokens round activations to half precision. Those of fewer round them to int8 where a weight is
quantised (precision `auto`), or not at all (`exact`). The residual stream, norms and sums are float32. What has no
kernel runs in PyTorch. Tests put a stand-in for the card and Triton's interpreter in their places.
"""

from __future__ import annotations

from functools import cache, partial

from ...kernels.gpu import tune
from ...kernels.gpu.linear import Picker
from ...kernels.gpu.units import UNITS
from ..rewrite import (
    absorb_closings,
    absorb_norms,
    fuse_gates,
    fuse_linears,
    fuse_norm_ropes,
    fuse_steps,
    fuse_stores,
    widen_linears,
)
from . import CARD_PRECISIONS, cuda_rows, cuda_torch
from .backend import Backend
from .cuda_device import Card
from .cuda_linear import linear_kernels
from .cuda_memory import CardDevice
from .cuda_steps import Stepper

RULES = (
    fuse_gates,
    fuse_linears,
    fuse_norm_ropes,
    fuse_stores,
    fuse_steps,
    widen_linears,
    absorb_norms,
    absorb_closings,
)


def make_backend(card: Card, precision: str = "auto", pick: Picker | None = None) -> Backend:
    """`precision`: one of `CARD_PRECISIONS`. `pick`: how products are cut; None as `kernels/gpu/tune.py` says for that
    card."""
    assert precision in CARD_PRECISIONS, f"{precision=}"
    exact = precision == "exact"
    cut = pick or partial(tune.pick, device_name=card.name, capability=card.capability)
    kernels = cuda_torch.KERNELS | cuda_rows.KERNELS | linear_kernels(exact, cut)
    sizes = {"kv_type": "f16", "window_batch": 8, "prefill_chunk": 512, "prefill_step": 64}
    rounds = frozenset() if exact else frozenset(fmt.name for fmt, kind in UNITS.items() if kind.unit.coded)
    return Backend("cuda", kernels, RULES, **sizes, rounds=rounds, device=CardDevice(card), bind_steps=Stepper)


@cache
def first_card(precision: str = "auto") -> Backend:
    """The backend on the first GPU. Raises BackendError, one line, where it cannot run."""
    return make_backend(Card(), precision)
