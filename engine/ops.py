"""The op table: for each op its operands, its attributes and its shape rule, or its expansion into plain ops.

A plain op is a shape rule here and a definition in `backends/reference.py`. A fused op is only an
expansion: what it means is what the plain ops say. Knows shapes and names, no numbers.

Every rule takes operands as `Value`s (a weight is one too) and returns the shape of the result, or a
list of shapes when the op has several results. Results are float32 unless the op says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .graph import Graph, Value

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One row of the table. `view`: the result is the first operand's memory seen with another shape.
    `writes`: the first operand is a state that the op changes; the result stands for the changed state. `changes`: for
    each result of a fused op that stands for a changed state, the number of that operand. `dtype`: of the results."""

    name: str
    rule: Callable[..., Shape | list[Shape]] | None = None
    expand: Callable[..., Value | tuple[Value, ...]] | None = None
    view: bool = False
    writes: bool = False
    changes: Mapping[int, int] = field(default_factory=dict)
    dtype: str = "f32"

    def shared(self, output: int) -> int | None:
        """The number of the operand whose memory the result number `output` is; None if it has its own."""
        return 0 if self.view or self.writes else self.changes.get(output)


OPS: dict[str, Op] = {}


def _row(rule: Callable[..., Shape | list[Shape]], **kind: Any) -> Callable[..., Shape | list[Shape]]:
    OPS[rule.__name__] = Op(rule.__name__, rule=rule, **kind)
    return rule


_plain = _row
_whole = partial(_row, dtype="i32")
_view = partial(_row, view=True)
_writes = partial(_row, writes=True)


def _fused(
    expand: Callable[..., Value | tuple[Value, ...]], changes: Mapping[int, int] | None = None
) -> Callable[..., Value | tuple[Value, ...]]:
    OPS[expand.__name__] = Op(expand.__name__, expand=expand, changes=changes or {})
    return expand


# Weights meet activations.


@_plain
def linear(x: Value, weight: Value, bias: Value | None = None) -> Shape:
    """x [..., n_in] times weight [n_out, n_in] transposed, plus bias [n_out] -> [..., n_out]."""
    n_out, n_in = weight.shape
    assert x.shape[-1] == n_in, f"linear: {x.shape=} {weight.shape=}"
    assert bias is None or bias.shape == (n_out,), f"linear: {bias.shape=} {weight.shape=}"
    return (*x.shape[:-1], n_out)


@_plain
def get_rows(table: Value, ids: Value) -> Shape:
    """table [n, d], ids [n_tokens] int32 -> table[ids] [n_tokens, d]."""
    assert ids.dtype == "i32", f"get_rows: {ids.dtype=}"
    return (*ids.shape, table.shape[1])


@_plain
def conv2d(x: Value, weight: Value, bias: Value, *, stride: int, padding: int) -> Shape:
    """x [n, c_in, h, w], weight [c_out, c_in, kh, kw], bias [c_out] -> [n, c_out, h', w']."""
    n, c_in, h, w = x.shape
    c_out, c_in_weight, kh, kw = weight.shape
    assert c_in == c_in_weight, f"conv2d: {x.shape=} {weight.shape=}"
    assert bias.shape == (c_out,), f"conv2d: {bias.shape=} {weight.shape=}"
    return (n, c_out, (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1)


# Element by element.


@_plain
def add(a: Value, b: Value) -> Shape:
    """a + b; b has a's shape or its trailing dimensions (then it is repeated)."""
    assert a.shape[len(a.shape) - len(b.shape) :] == b.shape, f"add: {a.shape=} {b.shape=}"
    return a.shape


@_plain
def mul(a: Value, b: Value) -> Shape:
    """a * b of one shape."""
    assert a.shape == b.shape, f"mul: {a.shape=} {b.shape=}"
    return a.shape


@_plain
def silu(x: Value) -> Shape:
    """x * sigmoid(x)."""
    return x.shape


@_plain
def gelu(x: Value) -> Shape:
    """x * Phi(x) with the exact error function, not its tanh approximation."""
    return x.shape


# Norms, over the last dimension.


@_plain
def rms_norm(x: Value, weight: Value, *, eps: float) -> Shape:
    """x / sqrt(mean(x^2) + eps) * weight."""
    assert weight.shape == x.shape[-1:], f"rms_norm: {x.shape=} {weight.shape=}"
    return x.shape


@_plain
def layer_norm(x: Value, weight: Value, bias: Value, *, eps: float) -> Shape:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""
    assert weight.shape == bias.shape == x.shape[-1:], f"layer_norm: {x.shape=} {weight.shape=} {bias.shape=}"
    return x.shape


# Shapes and rows.


@_view
def reshape(x: Value, *, shape: Shape) -> Shape:
    """The same numbers in the same order."""
    n = 1
    for d in shape:
        n *= d
    assert n == x.size, f"reshape: {x.shape=} {shape=}"
    return shape


@_plain
def permute(x: Value, *, dims: tuple[int, ...]) -> Shape:
    """Dimension `dims[i]` of x becomes dimension i; the result is contiguous."""
    assert sorted(dims) == list(range(len(x.shape))), f"permute: {x.shape=} {dims=}"
    return tuple(x.shape[d] for d in dims)


@_plain
def take_rows(x: Value, index: Value) -> Shape:
    """x [n, d], index [m] int32 -> x[index] [m, d]."""
    assert index.dtype == "i32", f"take_rows: {index.dtype=}"
    return (*index.shape, x.shape[1])


@_plain
def put_rows(x: Value, rows: Value, index: Value) -> Shape:
    """x [n, d] with row i replaced by rows[index[i]] wherever index[i] >= 0."""
    assert x.shape[1:] == rows.shape[1:], f"put_rows: {x.shape=} {rows.shape=}"
    assert index.shape == x.shape[:1], f"put_rows: {x.shape=} {index.shape=}"
    return x.shape


@_plain
def add_rows(x: Value, rows: Value, index: Value) -> Shape:
    """x [n, d] with rows[index[i]] added to row i wherever index[i] >= 0."""
    return put_rows(x, rows, index)


# Attention.


@_plain
def rope(x: Value, positions: Value, *, theta: float) -> Shape:
    """Rotary positions: x [n_tokens, n_head, d_head]; element i turns with element i + d_head/2
    (the rotate-half or NeoX kind) by positions * theta^(-2i/d_head)."""
    assert len(x.shape) == 3, f"rope: {x.shape=}"
    assert positions.shape == x.shape[:1], f"rope: {x.shape=} {positions.shape=}"
    return x.shape


@_plain
def window_attention(q: Value, k: Value, v: Value, lengths: Value) -> Shape:
    """Every token of a window sees the first lengths[b] tokens of its window, scaled by 1/sqrt(d_head).
    q, k, v [n_windows, n_tokens, n_head, d_head], lengths [n_windows] int32."""
    assert q.shape == k.shape == v.shape, f"window_attention: {q.shape=} {k.shape=} {v.shape=}"
    assert lengths.shape == q.shape[:1], f"window_attention: {q.shape=} {lengths.shape=}"
    return q.shape


@_writes
def kv_store(cache: Value, rows: Value, positions: Value) -> Shape:
    """Writes rows [n_tokens, n_kv_head, d_head] into cache [n_ctx, n_kv_head, d_head] at positions [n_tokens]. The last
    tokens may be at -1: they pad, and are not written."""
    assert cache.shape[1:] == rows.shape[1:], f"kv_store: {cache.shape=} {rows.shape=}"
    assert positions.shape == rows.shape[:1], f"kv_store: {rows.shape=} {positions.shape=}"
    return cache.shape


@_plain
def kv_attention(q: Value, k_cache: Value, v_cache: Value, positions: Value) -> Shape:
    """Causal attention over a cache: token t sees slots 0 .. positions[t], scaled by 1/sqrt(d_head).
    q [n_tokens, n_head, d_head], caches [n_ctx, n_kv_head, d_head]; query head h reads KV head
    h // (n_head / n_kv_head). positions [n_tokens] int32 rise by one a token. The last tokens may be at -1: they pad,
    see nothing, and get zeros."""
    assert q.shape[2] == k_cache.shape[2], f"kv_attention: {q.shape=} {k_cache.shape=}"
    assert k_cache.shape == v_cache.shape, f"kv_attention: {k_cache.shape=} {v_cache.shape=}"
    assert q.shape[1] % k_cache.shape[1] == 0, f"kv_attention: {q.shape=} {k_cache.shape=}"
    return q.shape


# Choosing.


@_whole
def argmax(x: Value) -> Shape:
    """x [n, d] -> the place of the largest number of each row, the first of equals, or -1 where that is not finite:
    int32 [n]."""
    return x.shape[:-1]


# Observing.


@_writes
def sum_squares(sums: Value, x: Value, lengths: Value | None = None) -> Shape:
    """Adds the squares of x [..., n_cols] over all rows to sums [n_cols + 1] float64, and the number of rows to its
    last element. With lengths [n_windows] int32 only the first lengths[b] tokens of each window of
    x [n_windows, n_tokens, n_cols] count."""
    assert sums.shape == (x.shape[-1] + 1,), f"sum_squares: {sums.shape=} {x.shape=}"
    if lengths is not None:
        assert len(x.shape) == 3, f"sum_squares: {x.shape=}"
        assert lengths.shape == x.shape[:1], f"sum_squares: {x.shape=} {lengths.shape=}"
    return sums.shape


# Fused ops: written as their expansion.


@_fused
def linears(g: Graph, x: Value, weights: tuple[Value, ...], biases: tuple[Value | None, ...]) -> tuple[Value, ...]:
    """Several linear maps of one x; each weight keeps its own type and layout."""
    return tuple(g.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


@_fused
def gated_linear(g: Graph, x: Value, gate: Value, up: Value) -> Value:
    """silu(x gate^T) * (x up^T): the inner half of SwiGLU."""
    return g.mul(g.silu(g.linear(x, gate)), g.linear(x, up))


@_fused
def add_rms_norm(g: Graph, a: Value, b: Value, weight: Value, *, eps: float) -> tuple[Value, Value]:
    """(a + b, rms_norm(a + b)): the seam between two halves of a block."""
    total = g.add(a, b)
    return total, g.rms_norm(total, weight, eps=eps)


@_fused
def norm_rope(g: Graph, x: Value, weight: Value, positions: Value, *, eps: float, theta: float) -> Value:
    """RMSNorm of each head, then rotary positions: queries and keys on their way to attention."""
    return g.rope(g.rms_norm(x, weight, eps=eps), positions, theta=theta)


@partial(_fused, changes={1: 5, 2: 6})
def norm_rope_store(
    g: Graph,
    q: Value,
    k: Value,
    v: Value,
    q_weight: Value,
    k_weight: Value,
    k_cache: Value,
    v_cache: Value,
    positions: Value,
    *,
    eps: float,
    theta: float,
) -> tuple[Value, Value, Value]:
    """All between the products and attention: (norm_rope(q), and the caches that hold norm_rope(k) and v)."""
    q = g.norm_rope(q, q_weight, positions, eps=eps, theta=theta)
    k = g.norm_rope(k, k_weight, positions, eps=eps, theta=theta)
    return q, g.kv_store(k_cache, k, positions), g.kv_store(v_cache, v, positions)


@partial(_fused, changes={1: 5, 2: 6})
def norm_rope_attention(g: Graph, *operands: Value, eps: float, theta: float) -> tuple[Value, Value, Value]:
    """Of the operands of `norm_rope_store`, that and attention: (its result, and the caches)."""
    q, k_cache, v_cache = g.norm_rope_store(*operands, eps=eps, theta=theta)
    return g.kv_attention(q, k_cache, v_cache, operands[-1]), k_cache, v_cache


@_fused
def wide_linear(
    g: Graph,
    x: Value,
    norm: tuple[Value, ...] | None,
    weights: tuple[Value, ...],
    biases: tuple[Value | None, ...],
    residual: Value | None,
    *,
    eps: float,
    close: str,
) -> tuple[Value, ...]:
    """Linear maps of one x with what stands before and after them. `norm`: the weight of an RMSNorm, or weight and bias
    of a LayerNorm. `close`: "gate" makes silu(first) * second of two maps, "gelu" and "argmax" are applied to each,
    "none" is not; then `residual` is added."""
    if norm is not None:
        x = g.rms_norm(x, *norm, eps=eps) if len(norm) == 1 else g.layer_norm(x, *norm, eps=eps)
    if close == "gate":
        return (g.gated_linear(x, *weights),)
    results = [g.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    if close in ("gelu", "argmax"):
        results = [getattr(g, close)(y) for y in results]
    return tuple(results if residual is None else (g.add(residual, y) for y in results))


@_fused
def conv_stack(
    g: Graph,
    x: Value,
    weights: tuple[Value, ...],
    biases: tuple[Value, ...],
    *,
    stride: int,
    padding: int,
    dims: tuple[int, ...],
) -> Value:
    """Convolutions with a GELU after each, one upon the other; then dimension `dims[i]` becomes dimension i."""
    for weight, bias in zip(weights, biases, strict=True):
        x = g.gelu(g.conv2d(x, weight, bias, stride=stride, padding=padding))
    return g.permute(x, dims=dims)
