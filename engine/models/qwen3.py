"""The Qwen3 decoder, written once in graph ops, with rows from outside as arguments (DeepStack).

Source: the Qwen3 technical report and the released model; names of tensors are those of published GGUF files.
Knows no audio, no tokens and no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..graph import Graph, Value

Head = Literal["none", "last", "all", "token"]
"""What comes after the last layer: nothing; logits of the last token, or of all; or the likeliest token after each."""


@dataclass(frozen=True)
class DecoderConfig:
    """The keys `moss_audio.llm.*`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True)
class Inject:
    """Rows that come from elsewhere: `index` [n_tokens] int32 is the row for each token, or -1.

    `embeddings` replace the token embeddings; `layers[n]` are added to what layer n gives."""

    index: Value
    embeddings: Value
    layers: Mapping[int, Value]


def build_decoder(
    g: Graph, c: DecoderConfig, n_tokens: int, n_ctx: int, *, inject: Inject | None, tied: bool, head: Head
) -> None:
    """Appends the decoder for `n_tokens` tokens with a cache of `n_ctx` slots.

    Inputs `input_ids`, `positions` [n_tokens] int32. Stages `llm.embed`, `llm.blk.N` (before an injection),
    `llm.inject.N` (after it), `llm.final_norm` [n_tokens, hidden], `logits` [1 or n_tokens, vocab], `token` [n_tokens].
    """
    ids = g.input("input_ids", (n_tokens,), "i32")
    positions = g.input("positions", (n_tokens,), "i32")
    embed = g.weight("llm.embed.weight", (c.vocab_size, c.hidden_size))
    x = g.get_rows(embed, ids)  # [T, hidden]
    if inject:
        x = g.put_rows(x, inject.embeddings, inject.index)
    g.stage("llm.embed", x)
    for n in range(c.num_layers):
        x = g.stage(f"llm.blk.{n}", build_block(g, c, n, x, positions, n_ctx))
        if inject and n in inject.layers:
            x = g.stage(f"llm.inject.{n}", g.add_rows(x, inject.layers[n], inject.index))
    if head == "none":
        return
    if head == "last":
        x = g.take_rows(x, g.input("last_row", (1,), "i32"))
    x = g.rms_norm(x, g.weight("llm.final_norm.weight", (c.hidden_size,)), eps=c.rms_norm_eps)
    g.stage("llm.final_norm", x)
    lm_head = embed if tied else g.weight("llm.lm_head.weight", (c.vocab_size, c.hidden_size))
    logits = g.stage("logits", g.linear(x, lm_head))
    if head == "token":
        g.stage("token", g.argmax(logits))


def build_block(g: Graph, c: DecoderConfig, n: int, x: Value, positions: Value, n_ctx: int) -> Value:
    """x + attention(norm(x)), then + SwiGLU(norm(x)): [T, hidden] -> [T, hidden]."""

    def norm(x: Value, name: str) -> Value:
        return g.rms_norm(x, g.weight(f"llm.blk.{n}.{name}.weight", x.shape[-1:]), eps=c.rms_norm_eps)

    def weight(name: str, n_out: int, n_in: int) -> Value:
        return g.weight(f"llm.blk.{n}.{name}.weight", (n_out, n_in))

    def heads(x: Value, name: str, n_head: int) -> Value:
        y = g.linear(x, weight(f"attn.{name}", n_head * c.head_dim, c.hidden_size))
        return g.reshape(y, shape=(x.shape[0], n_head, c.head_dim))  # [T, n_head, d_head]

    def cache(name: str) -> Value:
        return g.state(f"kv.{n}.{name}", (n_ctx, c.num_kv_heads, c.head_dim))

    h = norm(x, "attn_norm")
    q, k, v = heads(h, "q", c.num_heads), heads(h, "k", c.num_kv_heads), heads(h, "v", c.num_kv_heads)
    q = g.rope(norm(q, "attn.q_norm"), positions, theta=c.rope_theta)
    k = g.rope(norm(k, "attn.k_norm"), positions, theta=c.rope_theta)
    keys, values = g.kv_store(cache("k"), k, positions), g.kv_store(cache("v"), v, positions)
    g.require(keys)
    g.require(values)
    mixed = g.kv_attention(q, keys, values, positions)
    mixed = g.reshape(mixed, shape=(x.shape[0], c.num_heads * c.head_dim))
    x = g.add(x, g.linear(mixed, weight("attn.o", c.hidden_size, c.num_heads * c.head_dim)))

    h = norm(x, "ffn_norm")
    gate = g.linear(h, weight("ffn.gate", c.intermediate_size, c.hidden_size))
    up = g.linear(h, weight("ffn.up", c.intermediate_size, c.hidden_size))
    return g.add(x, g.linear(g.mul(g.silu(gate), up), weight("ffn.down", c.hidden_size, c.intermediate_size)))
