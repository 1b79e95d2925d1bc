"""The choice of a token on the card, and the counters that go from step to step: bound calls, and the memory they need.

The order is that of `engine/sampling.py`. Which parts of it run is recorded; the numbers of the options are read on the
card, so one recording serves all requests with the same parts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ...kernels.gpu import sampling
from ...kernels.gpu.launch import record
from ..sampling import Kind, Sampler
from .cuda_memory import CardDevice

Tensor = torch.Tensor


class Choice:
    """From logits to `token` int32 [1]; `position` and `step` int32 [1] are counted on."""

    def __init__(self, device: CardDevice, n_vocab: int, n_slots: int) -> None:
        self._device = device
        memory, start = device.empty(choice_bytes(n_vocab, n_slots)), 0
        parts = {}
        for name, (kind, n) in choice_parts(n_vocab, n_slots).items():
            parts[name] = memory[start : start + n * kind.itemsize].view(kind)
            start += n * kind.itemsize
        self.token, self.position = parts["token"], parts["position"]
        self._parts = parts

    def begin(self, token: int, position: int, n_steps: int, sampler: Sampler) -> None:
        """Sets everything for a request whose last token is `token`, not appended yet."""
        options, parts, fill = sampler.options, self._parts, self._device.fill
        counters = {"token": token, "position": position, "step": 0}
        for name, value in counters.items():
            fill(parts[name], np.array([value], np.int32))
        parts["seen"].zero_()
        parts["seen"][token : token + 1].fill_(1)
        fill(parts["settings"], np.array([float(getattr(options, name)) for name in sampling.SETTINGS]))
        if options.kind.drawn:
            fill(parts["uniform"], sampler.draws(n_steps))

    def bind(self, logits: Tensor, kind: Kind) -> Callable[[], None]:
        """The call that chooses from `logits` float32 [n_vocab], which it may change, and counts on."""
        p = self._parts
        pairs, seen = (p["maxima"], p["indices"]), p["seen"] if kind.penalised else None

        def choose() -> None:
            if kind.penalised:
                sampling.penalise(logits, p["seen"], p["settings"])
            sampling.argmax_blocks(logits, *pairs)
            sampling.argmax_pairs(*pairs, p["token"])
            if kind.drawn:
                limits = {"top_k": kind.top_k, "top_p": kind.top_p}
                sampling.draw(logits, p["settings"], p["uniform"], p["step"], p["token"], p["scratch"], **limits)
            self._count_on(p["token"], seen)

        return record(choose)

    def bind_counters(self, found: Tensor, seen: Tensor | None = None) -> Callable[[], None]:
        """The call that takes `found` int32 [1] for the next token and counts on."""
        return record(self._count_on, found, seen)

    def _count_on(self, found: Tensor, seen: Tensor | None) -> None:
        p = self._parts
        sampling.advance(found, p["token"], p["history"], p["position"], p["step"], seen)


def choice_parts(n_vocab: int, n_slots: int) -> dict[str, tuple[torch.dtype, int]]:
    """Type and length of each buffer, the widest types first, so that each is aligned."""
    n_blocks = sampling.block_count(n_vocab)
    return {
        "uniform": (torch.float64, n_slots),
        "settings": (torch.float64, len(sampling.SETTINGS)),
        "scratch": (torch.int64, sampling.draw_scratch_bytes(n_vocab) // 8),
        "maxima": (torch.float32, n_blocks),
        "indices": (torch.int32, n_blocks),
        "history": (torch.int32, n_slots),
        **dict.fromkeys(("token", "position", "step"), (torch.int32, 1)),
        "seen": (torch.uint8, n_vocab),
    }


def choice_bytes(n_vocab: int, n_slots: int) -> int:
    return sum(n * kind.itemsize for kind, n in choice_parts(n_vocab, n_slots).values())
