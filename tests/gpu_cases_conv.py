"""The GPU's convolutions compared with PyTorch in float64 on the processor. As `gpu_cases_rows.py`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from auricle.kernels.gpu import conv
from gpu_device import DEVICE

HALF = 1e-3  # relative error (norm) where factors are rounded to float16, a few times over


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over that of what is wanted; NaN where anything is."""
    return ((got.cpu().double() - wanted).norm() / wanted.norm()).item()


def layers(channels: tuple[int, ...], side: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pairs = list(pairwise(channels))
    weights = [random(b, a, side, side, seed=i) / (a**0.5 * side) for i, (a, b) in enumerate(pairs)]
    return weights, [random(b, seed=i + 9) for i, (_, b) in enumerate(pairs)]


def stack(x: torch.Tensor, weights: list, biases: list, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out in the order of a matrix of frames, and what should."""
    wanted = x.cpu().double()
    for w, b in zip(weights, biases, strict=True):
        wanted = F.gelu(F.conv2d(wanted, w.cpu().double(), b.cpu().double(), stride=stride, padding=padding))
    shapes = [tuple(w.shape) for w in weights]
    n_bytes = conv.stack_scratch_bytes(x.shape[0], x.shape[2:], shapes, stride, padding)
    scratch = torch.full((n_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE)  # NaN in f16
    wanted = wanted.permute(0, 3, 1, 2)
    out = torch.full(wanted.shape, torch.nan, device=DEVICE)
    conv.conv_stack(x, weights, biases, out.permute(0, 2, 3, 1), scratch, stride=stride, padding=padding)
    return out, wanted


@pytest.mark.parametrize(
    ("n", "channels", "h", "w"),
    [(1, (1, 4), 8, 8), (3, (2, 7), 5, 9), (2, (1, 6, 6, 6), 16, 26), (1, (1, 70, 130, 5), 9, 7), (1, (1, 3, 3), 1, 2)],
)
def test_stack(n: int, channels: tuple[int, ...], h: int, w: int) -> None:
    assert error(*stack(random(n, channels[0], h, w, seed=3), *layers(channels, 3), 2, 1)) < HALF


@pytest.mark.parametrize(("side", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (5, 2, 0), (2, 1, 1)])
def test_sizes_of_steps_and_borders(side: int, stride: int, padding: int) -> None:
    assert error(*stack(random(2, 2, 16, 17), *layers((2, 5, 4), side), stride, padding)) < HALF


def test_one_convolution_with_nothing_after_it() -> None:
    x, (weights, biases) = random(2, 5, 7, 9), layers((5, 33), 3)
    wanted = F.conv2d(x.cpu().double(), weights[0].cpu().double(), biases[0].cpu().double(), stride=2, padding=1)
    out = torch.full(wanted.shape, torch.nan, device=DEVICE)
    conv.conv2d(x, weights[0], biases[0], out, stride=2, padding=1)
    assert error(out, wanted) < HALF


def test_what_does_not_fit_a_half_between_convolutions_is_the_largest_one() -> None:
    weights, biases = layers((1, 4, 4), 3)
    out, _ = stack(torch.full((1, 1, 8, 8), 60_000.0, device=DEVICE), [10 * w for w in weights], biases, 2, 1)
    assert out.isfinite().all()


def test_gelu_for_small_and_large() -> None:
    """One tap of weight one, so that each number comes out by itself."""
    x = torch.linspace(-12, 12, 193, device=DEVICE).half().float()[None, None, None]
    out = torch.full(x.shape, torch.nan, device=DEVICE)
    conv.conv_stack(
        x, [torch.ones(1, 1, 1, 1, device=DEVICE)], [torch.zeros(1, device=DEVICE)], out, None, stride=1, padding=0
    )
    assert (out - F.gelu(x.double())).abs().max() < 1e-6
