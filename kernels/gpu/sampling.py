"""From a row of logits to the next token, on the card: the host only fetches tokens, when it likes.

The likeliest token takes two launches. A drawn one is what `engine/sampling.py` draws for the same random number, which
is read from a buffer. The host sorts; here a limit is searched for: all logits are compared with 32 limits at once,
each program writes what its block has above each of them, and the search goes on between the two limits that enclose
the answer. Seven rounds tell any float32 from its neighbours. Probabilities are whole numbers, UNIT for the likeliest
token, so that their sums do not depend on any order, and the answer is the same every time.

Options are read on the card, too, from `settings`, so that one captured graph serves every request that uses the same
kinds of limits. Knows no text and no stop rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .launch import launch
from .static import Case

if TYPE_CHECKING:
    import torch

BLOCK = 512  # logits of a program
LIMITS = 32  # compared with at once
SHIFTS = (27, 22, 17, 12, 7, 2, 0)  # of the limits, in each round: the last has two bits left
UNIT = tl.constexpr(float(1 << 44))  # the weight of the likeliest token: 2^18 of them stay below 2^63
WARPS, TALLY_WARPS = 4, 16
PAIR_WARPS = 16
PAIRS = 8192  # at a time, in the second stage of the argmax: 16 of a thread, on their way together

# Places of `state`: the lowest key that top-k keeps, the lowest that top-p keeps, the mass that top-p keeps.
FLOOR, LEAST, TARGET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STATE = 4
EVERYTHING = tl.constexpr(1 << 62)
# Places of `settings`, float64: as `SamplingOptions` of the engine has them.
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY = (tl.constexpr(n) for n in range(len(SETTINGS)))


# The likeliest.


@triton.jit
def _argmax_blocks(logits, maxima, indices, n, BLOCK: tl.constexpr):
    """Each program: the largest logit of its block, and the lowest place where it is."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + i, mask=i < n, other=-float("inf"))
    x = tl.where(x == x, x, float("inf"))  # a maximum leaves NaN out, and infinity is no token either
    largest = tl.max(x, 0)
    tl.store(maxima + tl.program_id(0), largest)
    tl.store(indices + tl.program_id(0), tl.min(tl.where(x == largest, i, n), 0))


@triton.jit
def _argmax_pairs(maxima, indices, token, n_pairs, PAIRS: tl.constexpr):
    """One program: the index of the largest of the maxima, the lowest of equals; -1 if that is not finite."""
    i = tl.arange(0, PAIRS)
    largest = tl.full((PAIRS,), -float("inf"), tl.float32)
    lowest = tl.full((PAIRS,), 2147483647, tl.int32)
    for start in range(0, n_pairs, PAIRS):
        inside = start + i < n_pairs
        value = tl.load(maxima + start + i, mask=inside, other=-float("inf"))
        index = tl.load(indices + start + i, mask=inside, other=2147483647)
        better = (value > largest) | ((value == largest) & (index < lowest))
        largest, lowest = tl.where(better, value, largest), tl.where(better, index, lowest)
    most = tl.max(largest, 0)
    found = tl.min(tl.where(largest == most, lowest, 2147483647), 0)
    tl.store(token, tl.where((most == most) & (tl.abs(most) < float("inf")), found, -1))


def argmax_blocks(logits: torch.Tensor, maxima: torch.Tensor, indices: torch.Tensor) -> None:
    """First stage: float32 logits [n] to pairs, maxima float32 and indices int32 [block_count(n)]."""
    n = logits.numel()
    launch(_argmax_blocks, (block_count(n),), logits, maxima, indices, n, BLOCK, num_warps=WARPS)


def argmax_pairs(maxima: torch.Tensor, indices: torch.Tensor, token: torch.Tensor) -> None:
    """Second stage: pairs from any number of programs to token int32 [1], which becomes -1 if no logit is finite."""
    launch(_argmax_pairs, (1,), maxima, indices, token, maxima.numel(), PAIRS, num_warps=PAIR_WARPS)


def block_count(n: int) -> int:
    return triton.cdiv(n, BLOCK)


# A draw.


@triton.jit
def _key(x):
    """A float32 as a whole number from 0 to 2^32 - 1 of the same order; the two zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _weigh(logits, token, settings, weights, state, n, BLOCK: tl.constexpr):
    """weights int64 [n]: how likely each token is, in units of the likeliest, which is `token`. Begins the searches."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.load(logits + tl.maximum(tl.load(token), 0)).to(tl.float64)
    x = tl.load(logits + i, mask=i < n, other=-float("inf")).to(tl.float64)
    weight = tl.exp((x - best) / tl.load(settings + TEMPERATURE))
    tl.store(weights + i, (weight * UNIT + 0.5).to(tl.int64), mask=i < n)
    if tl.program_id(0) == 0:
        tl.store(state + FLOOR, 0)
        tl.store(state + LEAST, 0)
        tl.store(state + TARGET, EVERYTHING)


@triton.jit(do_not_specialize=["shift"])
def _tally(logits, weights, state, sums, n, shift, MASS: tl.constexpr, LIMITS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes to sums [blocks, LIMITS] how many logits of the block, or how much mass, reach each of the limits.

    Limits are 2^shift apart, from state[LEAST] on for mass, from state[FLOOR] on for logits. Only tokens from
    state[FLOOR] on have mass.
    """
    block, number = tl.program_id(0), tl.arange(0, LIMITS)
    i = block * BLOCK + tl.arange(0, BLOCK)
    key = _key(tl.load(logits + i, mask=i < n, other=0.0))
    if MASS:
        low = tl.load(state + LEAST)
        amount = tl.load(weights + i, mask=(i < n) & (key >= tl.load(state + FLOOR)), other=0)
    else:
        low = tl.load(state + FLOOR)
        amount = (i < n).to(tl.int64)
    limit = low + (number.to(tl.int64) << shift)
    reached = tl.where(key[:, None] >= limit[None, :], amount[:, None], 0)
    tl.store(sums + block * LIMITS + number, tl.sum(reached, 0))


@triton.jit(do_not_specialize=["shift"])
def _narrow(
    sums,
    state,
    settings,
    n,
    n_blocks,
    shift,
    MASS: tl.constexpr,
    FIRST: tl.constexpr,
    LIMITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: moves the lower end of the search up to the highest limit that enough still reaches.

    Enough is top_k logits (0: all), or the part top_p of the mass, all of which reaches the first limit of all.
    """
    block, number = tl.arange(0, BLOCKS), tl.arange(0, LIMITS)
    at = sums + block[:, None] * LIMITS + number[None, :]
    total = tl.sum(tl.load(at, mask=(block < n_blocks)[:, None], other=0), 0)
    if MASS:
        place = state + LEAST
        if FIRST:
            all_mass = tl.max(total, 0)
            enough = (tl.load(settings + TOP_P) * all_mass.to(tl.float64)).to(tl.int64)
            enough = tl.minimum(tl.maximum(enough, 1), all_mass)  # a float64 may have been rounded up
            tl.store(state + TARGET, enough)
        else:
            enough = tl.load(state + TARGET)
    else:
        place = state + FLOOR
        top_k = tl.load(settings + TOP_K).to(tl.int64)
        enough = tl.where((top_k == 0) | (top_k > n), n, top_k)
    reached = tl.sum((total >= enough).to(tl.int64), 0)  # so many limits, from the first: totals fall
    tl.store(place, tl.load(place) + ((reached - 1) << shift))


@triton.jit
def _survivors(logits, weights, state, settings, sums, n, BLOCK: tl.constexpr):
    """Writes to sums [blocks, 4], of the tokens of a block: the mass above the least token that top-p keeps, and how
    much of that min-p keeps; how many tokens equal that least one, and the mass of one of them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    least = tl.maximum(tl.load(state + LEAST), tl.load(state + FLOOR))
    key = _key(tl.load(logits + i, mask=i < n, other=0.0))
    weight = tl.load(weights + i, mask=i < n, other=0)
    above = tl.where((i < n) & (key > least), weight, 0)
    likely = above.to(tl.float64) >= tl.load(settings + MIN_P) * UNIT
    equal = (i < n) & (key == least)
    at = sums + tl.program_id(0) * 4
    tl.store(at, tl.sum(above, 0))
    tl.store(at + 1, tl.sum(tl.where(likely, above, 0), 0))
    tl.store(at + 2, tl.sum(equal.to(tl.int64), 0))
    tl.store(at + 3, tl.max(tl.where(equal, weight, 0), 0))


@triton.jit
def _draw(
    logits,
    weights,
    state,
    settings,
    sums,
    uniform,
    step,
    token,
    n,
    n_blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: finds the block in which the random number falls, then the token. A `token` of -1 stays."""
    block = tl.arange(0, BLOCKS)
    at, inside = sums + block * 4, block < n_blocks
    above = tl.sum(tl.load(at, mask=inside, other=0), 0)
    n_equal = tl.load(at + 2, mask=inside, other=0)
    tie = tl.max(tl.load(at + 3, mask=inside, other=0), 0)
    needed = (tl.load(state + TARGET) - above + tl.maximum(tie, 1) - 1) // tl.maximum(tie, 1)  # of the equal ones
    limit = tl.load(settings + MIN_P) * UNIT
    equal_before = tl.cumsum(n_equal, 0) - n_equal
    kept = tl.minimum(tl.maximum(needed - equal_before, 0), n_equal)
    kept = tl.where(tie.to(tl.float64) >= limit, kept, 0)
    mass = tl.load(at + 1, mask=inside, other=0) + kept * tie
    ends = tl.cumsum(mass, 0)
    total = tl.sum(mass, 0)
    u = tl.load(uniform + tl.load(step))
    drawn = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
    chosen = tl.sum((ends <= drawn).to(tl.int32), 0)

    drawn -= tl.sum(tl.where(block < chosen, mass, 0), 0)
    rank = tl.sum(tl.where(block < chosen, n_equal, 0), 0)
    i = chosen * BLOCK + tl.arange(0, BLOCK)
    least = tl.maximum(tl.load(state + LEAST), tl.load(state + FLOOR))
    key = _key(tl.load(logits + i, mask=i < n, other=0.0))
    weight = tl.load(weights + i, mask=i < n, other=0)
    equal = (i < n) & (key == least)
    rank += tl.cumsum(equal.to(tl.int64), 0) - 1
    survives = (key > least) | (equal & (rank < needed))
    weight = tl.where(survives & (weight.to(tl.float64) >= limit), weight, 0)
    place = tl.sum((tl.cumsum(weight, 0) <= drawn).to(tl.int32), 0)
    tl.store(token, tl.where(tl.load(token) < 0, -1, chosen * BLOCK + place))


def draw_scratch_bytes(n: int) -> int:
    """Of `draw` for n logits."""
    return 8 * (n + block_count(n) * LIMITS + STATE)


def draw(
    logits: torch.Tensor,
    settings: torch.Tensor,
    uniform: torch.Tensor,
    step: torch.Tensor,
    token: torch.Tensor,
    scratch: torch.Tensor,
    *,
    top_k: bool = True,
    top_p: bool = True,
) -> None:
    """token int32 [1], the likeliest when called, becomes the one that uniform[step] draws.

    logits float32 [n], finite, n at most 2^18; settings float64 [len(SETTINGS)], with a temperature above 0; uniform
    float64 [any], from 0 to 1, step int32 [1]; scratch int64, at least `draw_scratch_bytes`. Without `top_k` or `top_p`
    that setting is not looked at, and its search saved.
    """
    n, n_blocks = logits.numel(), block_count(logits.numel())
    weights, sums, state = scratch[:n], scratch[n : n + n_blocks * LIMITS], scratch[n + n_blocks * LIMITS :]
    blocks = triton.next_power_of_2(n_blocks)
    launch(_weigh, (n_blocks,), logits, token, settings, weights, state, n, BLOCK, num_warps=WARPS)
    for mass in [False] * top_k + [True] * top_p:
        for turn, shift in enumerate(SHIFTS):
            sizes = (mass, LIMITS, BLOCK)
            launch(_tally, (n_blocks,), logits, weights, state, sums, n, shift, *sizes, num_warps=TALLY_WARPS)
            sizes = (mass, turn == 0, LIMITS, blocks)
            launch(_narrow, (1,), sums, state, settings, n, n_blocks, shift, *sizes, num_warps=TALLY_WARPS)
    launch(_survivors, (n_blocks,), logits, weights, state, settings, sums, n, BLOCK, num_warps=WARPS)
    launch(
        _draw,
        (1,),
        logits,
        weights,
        state,
        settings,
        sums,
        uniform,
        step,
        token,
        n,
        n_blocks,
        BLOCK,
        blocks,
        num_warps=WARPS,
    )


# From step to step.


@triton.jit
def _penalise(logits, seen, settings, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + i, mask=i < n, other=0.0)
    penalty = tl.load(settings + PENALTY).to(tl.float32)
    changed = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty)
    tl.store(logits + i, tl.where(tl.load(seen + i, mask=i < n, other=0) != 0, changed, x), mask=i < n)


@triton.jit(do_not_specialize=["n_history"])
def _advance(found, token, history, seen, position, step, n_history, n):
    chosen, now = tl.load(found), tl.load(step)
    tl.store(token, chosen)
    tl.store(history + now, chosen, mask=now < n_history)
    if seen is not None:
        tl.store(seen + chosen, 1, mask=(chosen >= 0) & (chosen < n))
    tl.store(position, tl.load(position) + 1)
    tl.store(step, now + 1)


def penalise(logits: torch.Tensor, seen: torch.Tensor, settings: torch.Tensor) -> None:
    """Changes logits float32 [n] where seen uint8 [n] is not 0: divided by the penalty above 0, else multiplied."""
    n = logits.numel()
    launch(_penalise, (block_count(n),), logits, seen, settings, n, BLOCK, num_warps=WARPS)


def advance(
    found: torch.Tensor,
    token: torch.Tensor,
    history: torch.Tensor,
    position: torch.Tensor,
    step: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> None:
    """Ends a step: token = history[step] = found, seen[found] = 1, position and step one further; `found` may be the
    token itself. All int32 but seen, uint8."""
    n = 0 if seen is None else seen.numel()
    launch(_advance, (1,), found, token, history, seen, position, step, history.numel(), n, num_warps=1)


def static_cases() -> Iterator[Case]:
    blocks = 512  # room for those of 151,936 logits
    row, pairs = {"logits": "*fp32", "n": "i32:16"}, {"maxima": "*fp32", "indices": "*i32"}
    search = {"weights": "*i64", "state": "*i64"}
    token, settings, sums = {"token": "*i32"}, {"settings": "*fp64"}, {"sums": "*i64"}
    drawn = {"uniform": "*fp64", "step": "*i32"}
    count = {"n_blocks": "i32"}
    block = {"BLOCK": BLOCK}
    shape = {"LIMITS": LIMITS, "BLOCKS": blocks}

    def case(fn: Any, signature: dict[str, str], constants: dict[str, Any], warps: int = WARPS) -> Case:
        name = fn.__name__.lstrip("_") + ("_mass" if constants.get("MASS") else "")
        return Case(name, "F32", {}, fn, signature, constants, warps, 1)

    yield case(_argmax_blocks, row | pairs, block)
    yield case(_argmax_pairs, pairs | token | {"n_pairs": "i32"}, {"PAIRS": PAIRS}, PAIR_WARPS)
    yield case(_weigh, row | token | settings | search, block)
    for mass in (False, True):
        flags = {"MASS": mass}
        yield case(_tally, row | search | sums | {"shift": "i32"}, flags | block | {"LIMITS": LIMITS}, TALLY_WARPS)
        signature = sums | settings | count | {"state": "*i64", "n": "i32:16", "shift": "i32"}
        yield case(_narrow, signature, flags | {"FIRST": mass} | shape, TALLY_WARPS)
    yield case(_survivors, row | search | settings | sums, block)
    yield case(_draw, row | search | settings | sums | drawn | token | count, block | {"BLOCKS": blocks})
    yield case(_penalise, row | settings | {"seen": "*u8"}, block)
    signature = dict.fromkeys(("found", "token", "history", "position", "step", "n_history", "n"), "*i32") | {
        "seen": "*u8"
    }
    yield case(_advance, signature | {"n_history": "i32", "n": "i32:16"}, {}, 1)
