"""Rotary positions of heads, with the RMSNorm before them and the writing of the KV cache after.

Element i of a head turns with element i + d/2 by position * frequency[i] (the rotate-half or NeoX kind, Su et al.,
arXiv 2104.09864). A row is loaded twice, the second time with its halves exchanged and from the cache on the chip, so
that each thread has an element and its partner. So a result must not lie where its operand is: a thread may still be
loading what another has turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..formats import F16, F32, Q8_0
from .cache import HEADS, GpuCache, cache_arguments, load_rows, store_rows
from .launch import launch
from .static import Case

if TYPE_CHECKING:
    import torch

WARPS = 4


def rope_frequencies(d_head: int, theta: float) -> torch.Tensor:
    """theta^(-2i/d), float32 [d_head / 2] on the CPU: to the bit what the reference computes."""
    import torch

    return 1.0 / theta ** (torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)


@triton.jit
def sine_cosine(angle):
    """Of angles up to 1e5, within 1e-6 (1e-7 on a card): one reduction for both, and no table as larger ones need.

    A quarter turn in three parts, the first of few bits, so that multiples of it are exact (Cody and Waite, 1980);
    polynomials from Cephes (S. Moshier).
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = tl.fma(quarter, -1.5703125, angle)
    r = tl.fma(quarter, -4.837512969970703e-4, r)
    r = tl.fma(quarter, -7.549789954891882e-8, r)
    s = r * r
    near_sine = r + r * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4))
    even = 4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5)
    near_cosine = 1.0 - 0.5 * s + s * s * even
    turn = quarter.to(tl.int32)
    odd = (turn & 1) != 0
    sine, cosine = tl.where(odd, near_cosine, near_sine), tl.where(odd, near_sine, near_cosine)
    return tl.where((turn & 2) != 0, -sine, sine), tl.where(((turn + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def find_turn(frequencies, position, D: tl.constexpr, D_PAD: tl.constexpr):
    """Cosine and sine of each column's angle at a position, the sine with the sign of the partner's part: [D_PAD]."""
    column = tl.arange(0, D_PAD)
    # Angles reach tens of thousands, and are rounded once, as the reference's are.
    angle = position.to(tl.float32) * tl.load(frequencies + column % (D // 2), mask=column < D, other=0.0)
    sine, cosine = sine_cosine(angle)
    return cosine, tl.where(column < D // 2, -sine, sine)


@triton.jit
def turn_rows(x, weight, cosine, sine, rows, wanted, eps, D: tl.constexpr, D_PAD: tl.constexpr):
    """The rows `rows` [n] of x, normalised where a weight is given, and turned: a tile [n, D_PAD]."""
    column = tl.arange(0, D_PAD)
    partner = (column + D // 2) % D
    inside = column < D
    mask = wanted[:, None] & inside[None, :]
    own = tl.load(x + rows[:, None] * D + column[None, :], mask=mask, other=0.0)
    other = tl.load(x + rows[:, None] * D + partner[None, :], mask=mask, other=0.0)
    if weight is not None:
        factor = tl.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        own = own * factor * tl.load(weight + column, mask=inside, other=0.0)[None, :]
        other = other * factor * tl.load(weight + partner, mask=inside, other=0.0)[None, :]
    return own * cosine[None, :] + other * sine[None, :]


@triton.jit
def _rope(
    x,
    weight,
    frequencies,
    positions,
    out,
    n_head,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: (tokens, groups of HEADS heads)."""
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    wanted, row = head < n_head, token * n_head + head
    cosine, sine = find_turn(frequencies, tl.load(positions + token), D, D_PAD)
    tile = turn_rows(x, weight, cosine, sine, row, wanted, eps, D, D_PAD)
    store_rows(out, None, row, wanted, tile, D, D_PAD)


@triton.jit
def _norm_rope_store(
    q,
    k,
    v,
    q_weight,
    k_weight,
    frequencies,
    positions,
    out,
    keys,
    keys_scales,
    values,
    values_scales,
    n_head,
    n_kv_head,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: (tokens, groups of HEADS heads): those of the queries, then those of the keys, then those of the values."""
    token, group = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    q_groups, kv_groups = tl.cdiv(n_head, HEADS), tl.cdiv(n_kv_head, HEADS)
    if group < q_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        wanted, row = head < n_head, token * n_head + head
        cosine, sine = find_turn(frequencies, position, D, D_PAD)
        tile = turn_rows(q, q_weight, cosine, sine, row, wanted, eps, D, D_PAD)
        store_rows(out, None, row, wanted, tile, D, D_PAD)
    elif group < q_groups + kv_groups:
        head = (group - q_groups) * HEADS + tl.arange(0, HEADS)
        wanted, row = head < tl.where(position >= 0, n_kv_head, 0), token * n_kv_head + head
        cosine, sine = find_turn(frequencies, position, D, D_PAD)
        tile = turn_rows(k, k_weight, cosine, sine, row, wanted, eps, D, D_PAD)
        store_rows(keys, keys_scales, position * n_kv_head + head, wanted, tile, D, D_PAD)
    else:
        head = (group - q_groups - kv_groups) * HEADS + tl.arange(0, HEADS)
        wanted, row = head < tl.where(position >= 0, n_kv_head, 0), token * n_kv_head + head
        tile = load_rows(v, None, row, wanted, D, D_PAD)
        store_rows(values, values_scales, position * n_kv_head + head, wanted, tile, D, D_PAD)


def rope(x: torch.Tensor, frequencies: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
    """x, out float32 [n_tokens, n_head, d_head], out not x; frequencies float32 [d_head / 2], positions int32
    [n_tokens]."""
    _launch(x, None, 0.0, frequencies, positions, out)


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    frequencies: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """RMSNorm of each head with weight float32 [d_head], then `rope`."""
    _launch(x, weight, eps, frequencies, positions, out)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    frequencies: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
) -> None:
    n_tokens, n_head, d = x.shape
    heads = min(HEADS, triton.next_power_of_2(n_head))
    grid = (n_tokens, triton.cdiv(n_head, heads))
    width = triton.next_power_of_2(d)
    launch(_rope, grid, x, weight, frequencies, positions, out, n_head, eps, d, width, heads, num_warps=WARPS)


def norm_rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    frequencies: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    keys: GpuCache,
    values: GpuCache,
) -> None:
    """All that happens to q, k and v before attention, in one launch: out = norm_rope(q), norm_rope(k) to `keys` and v
    to `values` at the positions, -1 being nowhere. A weight that is None means no norm.

    q, out float32 [n_tokens, n_head, d_head], out not q; k, v float32 [n_tokens, n_kv_head, d_head].
    """
    n_tokens, n_head, d = q.shape
    n_kv_head = k.shape[1]
    heads = min(HEADS, triton.next_power_of_2(n_kv_head))
    grid = (n_tokens, triton.cdiv(n_head, heads) + 2 * triton.cdiv(n_kv_head, heads))
    planes = (keys.codes, keys.scales, values.codes, values.scales)
    sizes = (n_head, n_kv_head, eps, d, triton.next_power_of_2(d), heads)
    launch(
        _norm_rope_store,
        grid,
        q,
        k,
        v,
        q_weight,
        k_weight,
        frequencies,
        positions,
        out,
        *planes,
        *sizes,
        num_warps=WARPS,
    )


def static_cases() -> Iterator[Case]:
    shared = dict.fromkeys(("frequencies", "out"), "*fp32") | {"positions": "*i32", "n_head": "i32", "eps": "fp32"}
    constants = {"D": 128, "D_PAD": 128, "HEADS": HEADS}
    yield Case("rope", "F32", {}, _rope, shared | {"x": "*fp32"}, constants | {"weight": None}, WARPS, 1)
    yield Case("norm_rope", "F32", {}, _rope, shared | {"x": "*fp32", "weight": "*fp32"}, constants, WARPS, 1)
    for fmt in (F32, F16, Q8_0):
        planes, missing = cache_arguments(fmt, "keys", "values")
        signature = dict.fromkeys(("q", "k", "v", "q_weight", "k_weight"), "*fp32") | shared | planes
        signature["n_kv_head"] = "i32"
        yield Case("norm_rope_store", fmt.name, {}, _norm_rope_store, signature, constants | missing, WARPS, 1)
