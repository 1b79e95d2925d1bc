"""Adapters merged into the weights of a file that is made: which tensors change, and how the file says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..engine.gguf import Typed, strings
from ..engine.lora import LoraSpec, LowRank, parse_lora, read_loras

MERGED_KEY = "auricle.lora.merged"  # the adapters in a file's weights, as FILE:SCALE


def plan_merge(
    specs: Sequence[LoraSpec],
    architecture: str,
    shapes: Mapping[str, tuple[int, ...]],
    model: object,
    before: Sequence[str] = (),
) -> tuple[dict[str, LowRank], dict[str, Typed]]:
    """The changes that adapters make to the tensors of `model`, and the keys that record them, after what the file said
    `before` under MERGED_KEY.

    Raises as `read_loras` does.
    """
    if not specs:
        return {}, {}
    names = [*before] + [f"{path.name}:{scale:g}" for path, scale in map(parse_lora, specs)]
    return read_loras(specs, architecture, shapes, model), {MERGED_KEY: strings(names)}
