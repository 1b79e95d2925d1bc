"""Values inside the layers of a PyTorch model, under the names that graphs give them.

The modules are found by the checkpoint's names, so the official model and ours are probed alike. Stands alone (torch
only): the program that runs the official code in another environment uses it, too. Knows transformers' Qwen3 by one
name, that of the function that applies rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Emit = Callable[[str, Tensor], None]

# Module in a layer -> name of its input and of its result after the layer's own; None: not wanted.
ENCODER: dict[str, tuple[str | None, str]] = {
    "self_attn_layer_norm": (None, ".attn_norm"),
    "self_attn.q_proj": (None, ".attn.q"),
    "self_attn.k_proj": (None, ".attn.k"),
    "self_attn.v_proj": (None, ".attn.v"),
    "self_attn.out_proj": (":window_attention", ".attn.o"),
    "final_layer_norm": (":add", ".ffn_norm"),
    "fc1": (None, ".ffn.fc1"),
    "fc2": (":gelu", ".ffn.fc2"),
}
DECODER: dict[str, tuple[str | None, str]] = {
    "input_layernorm": (None, ".attn_norm"),
    "self_attn.q_proj": (None, ".attn.q"),
    "self_attn.k_proj": (None, ".attn.k"),
    "self_attn.v_proj": (None, ".attn.v"),
    "self_attn.q_norm": (None, ".attn.q_norm"),
    "self_attn.k_norm": (None, ".attn.k_norm"),
    "self_attn.o_proj": (":kv_attention", ".attn.o"),
    "post_attention_layernorm": (":add", ".ffn_norm"),
    "mlp.gate_proj": (None, ".ffn.gate"),
    "mlp.up_proj": (None, ".ffn.up"),
    "mlp.down_proj": (":mul", ".ffn.down"),
}
ADAPTER: dict[str, tuple[str | None, str | None]] = {
    "gate_proj": (None, ".gate"),
    "up_proj": (None, ".up"),
    "down_proj": (":mul", None),
}


def probe_names(model: nn.Module) -> dict[nn.Module, tuple[str | None, str | None]]:
    """Every probed module with the names of its input and its result."""
    encoder, found = model.audio_encoder, {}
    for n in (1, 2, 3):
        found[getattr(encoder, f"conv{n}")] = None, f"enc.conv{n}"
    found[encoder.layer_norm] = None, "enc.norm"
    for n, layer in enumerate(encoder.layers):
        found |= _inside(layer, f"enc.blk.{n}", ENCODER)
    found |= _inside(model.audio_adapter, "adapter", ADAPTER)
    for k, merger in enumerate(model.deepstack_audio_merger_list):
        found |= _inside(merger, f"deepstack.{k}", ADAPTER)
    for n, layer in enumerate(model.language_model.layers):
        found |= _inside(layer, f"llm.blk.{n}", DECODER)
    return found


def _inside(parent: nn.Module, name: str, table: dict[str, tuple[str | None, str | None]]) -> dict[nn.Module, Any]:
    return {
        parent.get_submodule(path): tuple(None if part is None else name + part for part in parts)
        for path, parts in table.items()
    }


@contextmanager
def probe(model: nn.Module, emit: Emit):
    """While the context lasts, hands every probed value to `emit` as [rows, …]: windows first in the encoder, tokens
    first in the decoder."""
    current = [""]

    def squeeze(name: str, value: Tensor) -> Tensor:
        batched = name.startswith("llm.") or value.dim() == 3  # else rows of audio tokens, or windows
        return value[0] if batched and not name.startswith("enc.") else value

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: emit(name, squeeze(name, args[0]))

    def after(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: emit(name, squeeze(name, output))

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: current.__setitem__(0, name)

    with ExitStack() as stack:
        for module, (given, result) in probe_names(model).items():
            if given:
                stack.callback(module.register_forward_pre_hook(before(given)).remove)
            if result:
                stack.callback(module.register_forward_hook(after(result)).remove)
        first = model.audio_encoder.layers[0]
        stack.callback(first.register_forward_pre_hook(before("enc.blk.0:add_positions")).remove)
        for n, layer in enumerate(model.language_model.layers):
            stack.callback(layer.register_forward_pre_hook(enter(f"llm.blk.{n}")).remove)
        stack.enter_context(_probe_rope(current, emit))
        yield


@contextmanager
def _probe_rope(current: list[str], emit: Emit):
    """Queries and keys after their rotation, [T, n_head, d_head]: a function makes them, not a module."""
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    original = qwen3.apply_rotary_pos_emb

    def rotate(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k = original(*args, **options)
        emit(f"{current[0]}:rope", q[0].transpose(0, 1))
        emit(f"{current[0]}:rope.1", k[0].transpose(0, 1))
        return q, k

    qwen3.apply_rotary_pos_emb = rotate
    try:
        yield
    finally:
        qwen3.apply_rotary_pos_emb = original
