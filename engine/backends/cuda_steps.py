"""Token after token without waiting: a step reads its token on the card and leaves the next one there.

A step is the decoder for one token, the choice of the next, and the advance of the position; recorded once, it is
started with one call. Tokens come back through a small ring of pinned memory while the next step is already at work, so
one step more than is asked for may have run; it writes nothing that anybody reads. Knows no text and no stop rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..executor import Draft, Program
from ..sampling import Kind, NonFiniteError, Sampler
from .cuda_memory import CardDevice
from .cuda_sampling import Choice, choice_bytes

Tensor = torch.Tensor
RING = 2  # tokens on their way at a time


class Stepper:
    """The recorded step for one way of sampling. `nbytes(n_vocab, n_slots)` is what it keeps on the card."""

    nbytes = staticmethod(choice_bytes)

    def __init__(
        self,
        draft: Draft,
        weights: Callable[[str], Any],
        states: Mapping[str, Any],
        arena: Tensor,
        kind: Kind,
        n_vocab: int,
        n_slots: int,
    ) -> None:
        """`draft`: the decoder for one token, with the stage `token` for the likeliest and `logits` for other kinds."""
        device: CardDevice = draft.backend.device
        self._card = device.card
        self._choice = Choice(device, n_vocab, n_slots)
        inputs = {"input_ids": self._choice.token, "positions": self._choice.position}
        self._program = Program(draft, weights, states, arena, inputs=inputs)
        results = self._program.outputs
        if kind.likeliest:
            self._choose = self._choice.bind_counters(results["token"])
        else:
            self._choose = self._choice.bind(results["logits"][0], kind)
        self._ring = [(self._card.pinned(4).view(torch.int32), self._card.event()) for _ in range(RING)]
        self._replay: Callable[[], None] | None = None

    def run(self, token: int, position: int, n_steps: int, sampler: Sampler) -> Iterator[int]:
        """Appends `token` at `position` and gives `n_steps` tokens, each chosen by what comes before it."""
        if self._replay is None:
            self._choice.begin(token, position, 0, sampler)
            self._replay = self._card.capture(self._step)
        self._choice.begin(token, position, n_steps, sampler)
        for step in range(n_steps + 1):
            if step < n_steps:
                self._start(step)
            if step > 0:
                buffer, event = self._ring[(step - 1) % RING]
                event.synchronize()
                if buffer[0] < 0:
                    raise NonFiniteError(f"no logit is finite after position {position + step - 1}")
                yield int(buffer[0])

    def _start(self, step: int) -> None:
        self._replay()
        buffer, event = self._ring[step % RING]
        buffer.copy_(self._choice.token, non_blocking=True)
        event.record()

    def _step(self) -> None:
        self._program.call()
        self._choose()
