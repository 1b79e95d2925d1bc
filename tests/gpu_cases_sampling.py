"""The GPU's argmax and draws, interpreted on the CPU and compared with `engine/sampling.py`. As `gpu_cases_rows.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from auricle.engine.sampling import Sampler, SamplingOptions, penalise
from auricle.kernels.gpu import sampling
from gpu_device import DEVICE


def logits_of(n: int, seed: int, ties: bool = False) -> torch.Tensor:
    x = 3 * np.random.default_rng(seed).standard_normal(n, dtype=np.float32)
    return torch.from_numpy(np.round(x) if ties else x).to(DEVICE)


def full(n: int, value: float, kind: torch.dtype) -> torch.Tensor:
    return torch.full((n,), value, dtype=kind, device=DEVICE)


def tensor(values: list, kind: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=kind, device=DEVICE)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    n = sampling.block_count(logits.numel())
    maxima, indices = full(n, torch.nan, torch.float32), full(n, -7, torch.int32)
    token = full(1, -7, torch.int32)
    sampling.argmax_blocks(logits, maxima, indices)
    sampling.argmax_pairs(maxima, indices, token)
    return token


def draw(logits: torch.Tensor, options: SamplingOptions, numbers: list[float], step: int = 0) -> int:
    settings = tensor([getattr(options, name) for name in sampling.SETTINGS], torch.float64)
    scratch = full(sampling.draw_scratch_bytes(logits.numel()) // 8, -1 << 40, torch.int64)
    token = likeliest(logits)
    sampling.draw(
        logits,
        settings,
        tensor(numbers, torch.float64),
        tensor([step], torch.int32),
        token,
        scratch,
        top_k=options.top_k > 0,
        top_p=options.top_p < 1,
    )
    return int(token)


def host(logits: torch.Tensor, options: SamplingOptions, number: float) -> int:
    """What the host draws. The number must not be within rounding of the border between two tokens."""
    ids, probabilities = Sampler(options).distribution(logits.cpu().numpy(), [])
    cumulative = np.cumsum(probabilities)
    low, high = (np.searchsorted(cumulative, (number + d) * cumulative[-1], side="right") for d in (-1e-9, 1e-9))
    assert low == high, "take another number"
    return int(ids[min(low, len(ids) - 1)])


@pytest.mark.parametrize("n", [1, 500, 512, 1501])
def test_argmax(n: int) -> None:
    logits = logits_of(n, n)
    assert int(likeliest(logits)) == int(np.argmax(logits.cpu().numpy()))


def test_argmax_takes_the_first_of_equals() -> None:
    logits = logits_of(3000, 0)
    logits[[2900, 1500, 1600]] = 50.0
    assert int(likeliest(logits)) == 1500
    pairs = tensor([1.0, 7.0, 7.0], torch.float32), tensor([3, 900, 20], torch.int32)
    token = full(1, 0, torch.int32)
    sampling.argmax_pairs(*pairs, token)
    assert int(token) == 20
    n = 2 * sampling.PAIRS + 5  # more than one program takes at a time
    pairs = torch.zeros(n), torch.arange(n, dtype=torch.int32)
    for place in (n - 1, sampling.PAIRS + 7, 2 * sampling.PAIRS - 1):
        pairs[0][place] = 3.0
    sampling.argmax_pairs(*pairs, token)
    assert int(token) == sampling.PAIRS + 7


def test_argmax_of_nothing_finite_is_no_token() -> None:
    assert int(likeliest(full(5, -torch.inf, torch.float32))) == -1
    assert int(likeliest(full(5, torch.nan, torch.float32))) == -1
    logits = logits_of(1501, 3)
    logits[700] = torch.nan
    assert int(likeliest(logits)) == -1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "ties", "number"),
    [
        (1.0, 0, 1.0, 0.0, False, 0.0),
        (1.0, 0, 1.0, 0.0, False, 0.99999),
        (0.7, 5, 1.0, 0.0, False, 0.6),
        (0.9, 30, 1.0, 0.0, True, 0.9),
        (1.0, 50, 0.6, 0.0, False, 0.7),
        (1.0, 50, 0.6, 0.0, True, 0.999),
        (1.3, 0, 0.9, 0.0, True, 0.995),
        (0.3, 0, 0.05, 0.0, False, 0.5),
        (2.0, 0, 1.0, 0.02, True, 0.999),
        (1.1, 4000, 0.95, 0.01, False, 0.8),
        (1e-3, 0, 0.5, 0.0, False, 0.5),
    ],
)
def test_draw(temperature: float, top_k: int, top_p: float, min_p: float, ties: bool, number: float) -> None:
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(1300, 7, ties)
    assert draw(logits, options, [number]) == host(logits, options, number)


def test_a_draw_follows_the_distribution_of_the_host() -> None:
    """Every token that survives comes up, at the number in the middle of its share, and no other."""
    options = SamplingOptions(temperature=1.0, top_k=4, top_p=0.95)
    logits = logits_of(1100, 3)
    ids, probabilities = Sampler(options).distribution(logits.cpu().numpy(), [])
    assert len(ids) > 2
    ends = np.cumsum(probabilities)
    assert [draw(logits, options, [u]) for u in ends - probabilities / 2] == ids.tolist()


def test_a_draw_reads_the_number_of_its_step_and_leaves_no_token_alone() -> None:
    logits, options = logits_of(600, 1), SamplingOptions(temperature=1.5)
    assert draw(logits, options, [0.1, 0.9], step=1) == draw(logits, options, [0.9])
    assert draw(full(6, torch.nan, torch.float32), options, [0.5]) == -1


def test_penalty_and_steps() -> None:
    logits, seen = logits_of(2000, 2), full(2000, 0, torch.uint8)
    history, position = full(3, -1, torch.int32), tensor([40], torch.int32)
    step, settings = full(1, 0, torch.int32), tensor([0, 0, 1, 0, 1.3], torch.float64)
    token = tensor([-7], torch.int32)
    for found in (5, 1999, 5, 17):  # one more than the history holds
        sampling.advance(tensor([found], torch.int32), token, history, position, step, seen)
        assert int(token) == found
    assert history.tolist() == [5, 1999, 5]
    assert (int(position), int(step)) == (44, 4)
    assert seen.nonzero().ravel().tolist() == [5, 17, 1999]
    wanted = penalise(logits.cpu().numpy(), [5, 1999, 17], 1.3)
    sampling.penalise(logits, seen, settings)
    assert np.array_equal(logits.cpu().numpy(), wanted)
