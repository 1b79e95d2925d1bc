"""What a backend is: a name, rewrite rules, and a kernel for each op it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..device import Device
from ..graph import Node
from ..rewrite import Rule

# The operands a kernel is bound to: tensors of the arena, `Weight`s of the file, `CacheTensor`s, tuples of
# these, or None; in the order of `node.inputs`.
Bound = tuple[Any, ...]


def no_bytes(node: Node) -> int:
    return 0


@dataclass(frozen=True)
class Kernel:
    """`bind(node, inputs, outputs, scratch)` does once whatever depends on shapes and types, and returns the call
    that runs: it reads `inputs`, fills every element of each tensor in `outputs`, and may use `scratch`.

    `scratch(node)`: bytes of work space it wants in the arena (`scratch` is None when 0).
    `transient(node)`: bytes that libraries allocate and free during the call, at most.
    """

    bind: Callable[[Node, Bound, Bound, Any], Callable[[], None]]
    scratch: Callable[[Node], int] = no_bytes
    transient: Callable[[Node], int] = no_bytes


@dataclass(frozen=True)
class Backend:
    """`kv_type`: how it keeps keys and values unless told otherwise. `window_batch`: encoder windows at a time;
    `prefill_chunk`: prompt tokens at a time, of which the last piece is padded to a multiple of `prefill_step`, so that
    few programs serve prompts of all lengths. `rounds`: names of the types whose activations it rounds to int8.
    `device`: where the numbers are. `bind_steps`: see `cuda_steps.py`; None where tokens are drawn here, one by one.
    `alone()`: held while kernels run, where two threads must not run any at once, whichever models they work for."""

    name: str
    kernels: Mapping[str, Kernel]
    rules: tuple[Rule, ...]
    kv_type: str
    window_batch: int
    prefill_chunk: int
    prefill_step: int = 8
    rounds: frozenset[str] = frozenset()
    device: Device = field(default_factory=Device)
    bind_steps: Callable[..., Any] | None = None
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext

    def padded(self, n_tokens: int) -> int:
        """Rows of the program for a piece of a prompt."""
        return min(self.prefill_chunk, -(-n_tokens // self.prefill_step) * self.prefill_step)
