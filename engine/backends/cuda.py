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
    fuse_convolutions,
    fuse_gates,
    fuse_linears,
    fuse_norm_ropes,
    fuse_steps,
    fuse_stores,
    widen_linears,
)
from . import CARD_PRECISIONS, cuda_conv, cuda_rows, cuda_torch
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


# What work is cut into, by the card. A tile of a product is 128 rows and tokens; the narrowest products of published
# models have 1280 rows in the encoder and 2560 in the decoder. Bytes are of the arena and of what libraries take.
TILE = 128
WAVES = 2  # tiles for each multiprocessor, at least, so that the last few do not leave most of them idle
ENCODER_TILES, DECODER_TILES = 10, 20  # of rows
WINDOW_TOKENS, WINDOW_BYTES = 50, 82 << 20
MOST_WINDOWS = 64
CHUNKS = (512, 2048)  # tokens: the fewest and the most


def batch_sizes(total: int, free: int, processors: int) -> dict[str, int]:
    """`window_batch` and `prefill_chunk` for a card of `total` bytes, of which `free` are, and so many multiprocessors:
    enough to keep all of them busy, but a batch of windows takes no more than a sixteenth of the memory, or an eighth
    of what is free. Powers of two."""
    tokens = TILE * WAVES * processors
    windows = min(tokens // (ENCODER_TILES * WINDOW_TOKENS), total // 16 // WINDOW_BYTES, free // 8 // WINDOW_BYTES)
    chunk = min(max(tokens // DECODER_TILES, CHUNKS[0]), CHUNKS[1])
    return {"window_batch": power_below(min(windows, MOST_WINDOWS)), "prefill_chunk": power_below(chunk)}


def power_below(n: int) -> int:
    """The largest power of two up to n, at least 1."""
    return 1 << max(n, 1).bit_length() - 1


def make_backend(card: Card, precision: str = "auto", pick: Picker | None = None) -> Backend:
    """`precision`: one of `CARD_PRECISIONS`. `pick`: how products are cut; None as `kernels/gpu/tune.py` says for that
    card."""
    assert precision in CARD_PRECISIONS, f"{precision=}"
    exact = precision == "exact"
    cut = pick or partial(tune.pick, device_name=card.name, capability=card.capability)
    kernels = cuda_torch.KERNELS | cuda_conv.KERNELS | cuda_rows.KERNELS | linear_kernels(exact, cut)
    sizes = batch_sizes(card.total_bytes(), card.free_bytes(), card.processors)
    sizes |= {"kv_type": "f16", "prefill_step": 64}
    rounds = frozenset() if exact else frozenset(fmt.name for fmt, kind in UNITS.items() if kind.unit.coded)
    return Backend("cuda", kernels, RULES, **sizes, rounds=rounds, device=CardDevice(card), bind_steps=Stepper)


@cache
def first_card(precision: str = "auto") -> Backend:
    """The backend on the first GPU. Raises BackendError, one line, where it cannot run."""
    return make_backend(Card(), precision)
