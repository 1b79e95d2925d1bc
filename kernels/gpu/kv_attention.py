"""Causal attention over the KV cache, in two forms: many new tokens at once, and a few.

Many (a prompt): a program takes a tile of tokens of one query head. Few (decoding): there are not enough queries to
fill the card, so the past is split among programs, each of which reads its share of one KV head once for all query
heads that use it; a second, small kernel puts the shares together. How the past is split depends on the position, which
is read on the card, and the grid does not: a captured graph serves every step. Sums are taken in a fixed order.

A step of one token (`step_attention`) takes q, k and v as the products leave them: norms, rotary positions and the
writing of the cache are part of the first kernel. The program whose share ends with the new token writes its key and
value before it reads its share; no other program reads that slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..formats import F16, F32, Q8_0, Format
from .cache import GpuCache, cache_arguments, load_rows, store_rows
from .launch import launch
from .rope import find_turn, turn_rows
from .softmax import HIDDEN, attend_tile, score_scale
from .static import Case

if TYPE_CHECKING:
    import torch

FEW = 8  # tokens that the split form takes
SPLIT_SLOTS = 128  # of the context, at least, for each split
MAX_SPLITS = tl.constexpr(32)
# Rows of queries and slots of a step, warps, stages: of the form for many tokens, and of that for few, whose rows
# follow from the heads. Float32 takes twice the memory on the chip and three products for one.
MANY = {F16: (64, 32, 4, 3), Q8_0: (64, 32, 4, 2), F32: (32, 32, 8, 1)}
SPLIT = {F16: (64, 4, 2), Q8_0: (64, 4, 2), F32: (32, 8, 1)}
STEP = ("new_keys", "new_values", "q_weight", "k_weight", "frequencies")  # operands of the form for one new token


@triton.jit
def _attend_slots(
    q,
    planes,
    kv_head,
    n_kv_head,
    position,
    first,
    end,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Attention of q [ROWS, D_PAD] at positions [ROWS] to the slots of a KV head from `first` to before `end`: peak,
    total and mixed values. `planes`: keys, their scales, values, their scales."""
    keys, keys_scales, values, values_scales = planes
    peak = tl.full((ROWS,), HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, D_PAD), tl.float32)
    for start in range(first, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        written = slot < end
        k = load_rows(keys, keys_scales, slot * n_kv_head + kv_head, written, D, D_PAD)
        v = load_rows(values, values_scales, slot * n_kv_head + kv_head, written, D, D_PAD)
        peak, total, mixed = attend_tile(q, k, v, slot[None, :] <= position[:, None], peak, total, mixed)
    return peak, total, mixed


@triton.jit(do_not_specialize=["n_tokens"])
def _attend_many(
    queries,
    keys,
    keys_scales,
    values,
    values_scales,
    positions,
    out,
    n_tokens,
    n_head,
    n_kv_head,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: (tiles of tokens, query heads). The last tiles have the longest past and start first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // (n_head // n_kv_head)
    token = tile * ROWS + tl.arange(0, ROWS)
    inside = token < n_tokens
    position = tl.load(positions + token, mask=inside, other=-1)
    row = token * n_head + head
    q = load_rows(queries, None, row, inside, D, D_PAD) * scale
    q = q.to(tl.float32 if keys.dtype.element_ty == tl.float32 else tl.float16)
    n_slots = tl.max(position, 0) + 1
    planes = (keys, keys_scales, values, values_scales)
    _, total, mixed = _attend_slots(q, planes, kv_head, n_kv_head, position, 0, n_slots, D, D_PAD, ROWS, SLOTS)

    column = tl.arange(0, D_PAD)
    mask = inside[:, None] & (column < D)[None, :]
    total = tl.where(position >= 0, total, float("inf"))  # of a token that pads, so that it gets zeros
    tl.store(out + row[:, None] * D + column[None, :], mixed / total[:, None], mask=mask)


@triton.jit
def _count_slots(positions, n_tokens):
    """Slots that the last token sees; the last in the row may be no tokens, at -1."""
    n_slots = 0
    for t in range(n_tokens):
        n_slots = tl.maximum(n_slots, tl.load(positions + t) + 1)
    return n_slots


@triton.jit
def _share(split, n_slots, SLOTS: tl.constexpr, splits):
    """First slot of the share of a split, and the first after it. Splits that get none have first >= n_slots."""
    steps = tl.cdiv(tl.cdiv(n_slots, SLOTS), splits)
    first = split * steps * SLOTS
    return first, tl.minimum(first + steps * SLOTS, n_slots)


@triton.jit
def _write_row(new_keys, new_values, planes, turn, kv_head, n_kv_head, slot, D: tl.constexpr, D_PAD: tl.constexpr):
    """One head's new key, normalised and turned, and its value to a slot of the cache. `turn`: the norm's weight and
    eps, cosine and sine."""
    keys, keys_scales, values, values_scales = planes
    weight, eps, cosine, sine = turn
    head = kv_head + tl.arange(0, 1)
    row, wanted = slot * n_kv_head + head, head >= 0
    k = turn_rows(new_keys, weight, cosine, sine, head, wanted, eps, D, D_PAD)
    store_rows(keys, keys_scales, row, wanted, k, D, D_PAD)
    v = load_rows(new_values, None, head, wanted, D, D_PAD)
    store_rows(values, values_scales, row, wanted, v, D, D_PAD)


@triton.jit(do_not_specialize=["n_tokens"])
def _attend_split(
    queries,
    keys,
    keys_scales,
    values,
    values_scales,
    positions,
    new_keys,
    new_values,
    q_weight,
    k_weight,
    frequencies,
    eps,
    sums,
    n_tokens,
    n_head,
    n_kv_head,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: (KV heads, splits). A row of the tile is a query head of the KV head's group, of one token.

    With `new_keys` there is one token, and nothing of it is normalised, turned or in the cache yet.

    Writes to `sums` [n_tokens, n_head, MAX_SPLITS, D + 2] the mixed values, then the peak and the total of the share.
    """
    kv_head, split = tl.program_id(0), tl.program_id(1)
    n_slots = tl.load(positions) + 1 if new_keys is not None else _count_slots(positions, n_tokens)
    first, end = _share(split, n_slots, SLOTS, tl.num_programs(1))
    if first >= n_slots:
        return
    token, member = tl.arange(0, ROWS) // GROUP, tl.arange(0, ROWS) % GROUP
    inside = token < n_tokens
    position = tl.load(positions + token, mask=inside, other=-1)
    row = token * n_head + kv_head * GROUP + member
    planes = (keys, keys_scales, values, values_scales)
    if new_keys is not None:
        cosine, sine = find_turn(frequencies, n_slots - 1, D, D_PAD)
        if end == n_slots:
            turn = (k_weight, eps, cosine, sine)
            _write_row(new_keys, new_values, planes, turn, kv_head, n_kv_head, n_slots - 1, D, D_PAD)
            tl.debug_barrier()  # the threads of this program see what was stored
        q = turn_rows(queries, q_weight, cosine, sine, row, inside, eps, D, D_PAD) * scale
    else:
        q = load_rows(queries, None, row, inside, D, D_PAD) * scale
    q = q.to(tl.float32 if keys.dtype.element_ty == tl.float32 else tl.float16)
    peak, total, mixed = _attend_slots(q, planes, kv_head, n_kv_head, position, first, end, D, D_PAD, ROWS, SLOTS)

    column = tl.arange(0, D_PAD)
    at = sums + (row * MAX_SPLITS + split) * (D + 2)
    tl.store(at[:, None] + column[None, :], mixed, mask=inside[:, None] & (column < D)[None, :])
    tl.store(at + D, peak, mask=inside)
    tl.store(at + D + 1, total, mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "splits"])
def _join(
    sums,
    positions,
    out,
    n_tokens,
    n_head,
    splits,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: (tokens, query heads). Puts the shares of one row together; those that nobody wrote are not read."""
    row = tl.program_id(0) * n_head + tl.program_id(1)
    split = tl.arange(0, MAX_SPLITS)  # those that there are not have no share
    n_slots = _count_slots(positions, n_tokens)
    first, _ = _share(split, n_slots, SLOTS, splits)
    used = first < n_slots
    at = sums + (row * MAX_SPLITS + split) * (D + 2)
    peak = tl.load(at + D, mask=used, other=HIDDEN)
    total = tl.load(at + D + 1, mask=used, other=0.0)
    column = tl.arange(0, D_PAD)
    mixed = tl.load(at[:, None] + column[None, :], mask=used[:, None] & (column < D)[None, :], other=0.0)

    weight = tl.exp2(peak - tl.max(peak, 0))
    # A token that pads gets zeros.
    total = tl.where(tl.load(positions + tl.program_id(0)) >= 0, tl.sum(total * weight, 0), float("inf"))
    result = tl.sum(mixed * weight[:, None], 0) / total
    tl.store(out + row * D + column, result, mask=column < D)


def split_count(n_ctx: int) -> int:
    """Programs that share the past of a KV head, a power of two."""
    return min(MAX_SPLITS.value, triton.next_power_of_2(triton.cdiv(n_ctx, SPLIT_SLOTS)))


def kv_attention_scratch_bytes(n_tokens: int, n_head: int, d_head: int) -> int:
    """What `kv_attention` and `step_attention` need beside their operands, 0 for many tokens."""
    return 4 * n_tokens * n_head * MAX_SPLITS.value * (d_head + 2) if n_tokens <= FEW else 0


def kv_attention(
    q: torch.Tensor,
    keys: GpuCache,
    values: GpuCache,
    positions: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor | None = None,
) -> None:
    """Token t sees slots 0 .. positions[t]; no other slot is read.

    q, out float32 [n_tokens, n_head, d_head]; query head h reads KV head h // (n_head / n_kv_head). positions int32
    [n_tokens] rise by one a token; the last may be -1, which pads and gets zeros. scratch: at least
    `kv_attention_scratch_bytes`, float32, for up to FEW tokens.
    """
    n_tokens, n_head, d = q.shape
    if n_tokens <= FEW:
        assert scratch is not None
        _attend_few(q, keys, values, positions, (None,) * 5 + (0.0,), out, scratch)
        return
    planes = (keys.codes, keys.scales, values.codes, values.scales, positions)
    sizes = (n_tokens, n_head, keys.codes.shape[1], score_scale(d), d, _width(d))
    rows, slots, warps, stages = MANY[keys.format]
    grid = (triton.cdiv(n_tokens, rows), n_head)
    launch(_attend_many, grid, q, *planes, out, *sizes, rows, slots, num_warps=warps, num_stages=stages)


def step_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    frequencies: torch.Tensor,
    keys: GpuCache,
    values: GpuCache,
    positions: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """`rope.norm_rope_store` of one token and `kv_attention` of it: q, out [1, n_head, d_head], k, v [1, n_kv_head,
    d_head], weights [d_head]."""
    assert q.shape[0] == 1, f"{q.shape=}"
    _attend_few(q, keys, values, positions, (k, v, q_weight, k_weight, frequencies, eps), out, scratch)


def _attend_few(
    q: torch.Tensor,
    keys: GpuCache,
    values: GpuCache,
    positions: torch.Tensor,
    new: tuple,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """`new`: what `_attend_split` takes of a token that is not in the cache yet."""
    n_tokens, n_head, d = q.shape
    n_ctx, n_kv_head, _ = keys.codes.shape
    splits, group, width = split_count(n_ctx), n_head // n_kv_head, _width(d)
    slots, warps, stages = SPLIT[keys.format]
    planes = (keys.codes, keys.scales, values.codes, values.scales, positions)
    sizes = (n_tokens, n_head, n_kv_head, score_scale(d), d, width)
    cut = (group, split_rows(n_tokens, group), slots)
    launch(
        _attend_split, (n_kv_head, splits), q, *planes, *new, scratch, *sizes, *cut, num_warps=warps, num_stages=stages
    )
    launch(_join, (n_tokens, n_head), scratch, positions, out, n_tokens, n_head, splits, d, width, slots, num_warps=4)


def _width(d_head: int) -> int:
    """Columns of a tile: a tensor core takes 16 at least."""
    return max(16, triton.next_power_of_2(d_head))


def split_rows(n_tokens: int, group: int) -> int:
    """Rows of the tile of the split form: a tensor core takes 16 at least."""
    return max(16, triton.next_power_of_2(n_tokens * group))


def static_cases() -> Iterator[Case]:
    for fmt in (F32, F16, Q8_0):
        planes, missing = cache_arguments(fmt, "keys", "values")
        signature = planes | {"queries": "*fp32", "positions": "*i32", "n_tokens": "i32", "n_head": "i32"}
        signature |= {"n_kv_head": "i32", "scale": "fp32"}
        yield _many_case(fmt, signature | {"out": "*fp32"}, missing)
        signature |= {"sums": "*fp32", "eps": "fp32"}
        for n_tokens in (1, 8):
            absent = dict.fromkeys(STEP)
            yield _split_case("kv_attention_split", fmt, n_tokens, signature, missing | absent)
        yield _split_case("step_attention", fmt, 1, signature | dict.fromkeys(STEP, "*fp32"), missing)
    signature = {"sums": "*fp32", "positions": "*i32", "out": "*fp32"}
    signature |= dict.fromkeys(("n_tokens", "n_head", "splits"), "i32")
    config = {"SLOTS": SPLIT[F16][0]}
    yield Case("kv_attention_join", "F32", config, _join, signature, {"D": 128, "D_PAD": 128} | config, 4, 1)


def _many_case(fmt: Format, signature: dict[str, str], missing: dict[str, None]) -> Case:
    rows, slots, warps, stages = MANY[fmt]
    config = {"ROWS": rows, "SLOTS": slots}
    constants = {"D": 128, "D_PAD": 128} | config | missing
    read = ("keys", "values")
    return Case("kv_attention_many", fmt.name, config, _attend_many, signature, constants, warps, stages, read)


def _split_case(name: str, fmt: Format, n_tokens: int, signature: dict[str, str], missing: dict[str, None]) -> Case:
    slots, warps, stages = SPLIT[fmt]
    config = {"GROUP": 4, "ROWS": split_rows(n_tokens, 4), "SLOTS": slots}
    constants = {"D": 128, "D_PAD": 128} | config | missing
    read = ("keys", "values")
    return Case(name, fmt.name, config, _attend_split, signature, constants, warps, stages, read)
