"""The same shape in transformers on the same card: bfloat16, attention by SDPA, random weights.

A clip to its first token, and decoding with a growing cache, with a static cache, with a static cache and the step
recorded as a CUDA graph, and with that step compiled by `torch.compile` in the mode that transformers itself uses
("reduce-overhead").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from card_device import Gpu
from card_requests import TOKEN, Sizes
from peer_torch import Reference
from transformers import StaticCache

STEPS = 32
WARM_UPS = 4
MOST_WAIT_S = 120
SPARE = 56  # positions after the context


class Peer:
    def __init__(self, gpu: Gpu, path: Path) -> None:
        self.gpu, self.path, self.sizes = gpu, path, Sizes(gpu.rehearsal)
        self._reference: Reference | None = None
        self.n_steps = 2 if gpu.rehearsal else STEPS

    @property
    def reference(self) -> Reference:
        if self._reference is None:
            self._reference = Reference(str(self.path), torch.get_num_threads(), torch.bfloat16, self.gpu.device)
        return self._reference

    def eager(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "clip", self.clip
        yield "peak", lambda: {"peak_bytes": self.gpu.peak_bytes()}
        for context in self.sizes.contexts:
            yield f"static at {context}", lambda c=context: self.decode(c, self.make_step)
            yield f"growing at {context}", lambda c=context: {"step_s": self._growing(c)}
            yield f"graph at {context}", lambda c=context: self.decode(c, self.make_graph)

    def compiled(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for context in self.sizes.contexts:
            yield f"compiled at {context}", lambda c=context: self.decode(c, self.make_compiled)

    def clip(self) -> dict[str, Any]:
        self.reference.clip(1, self.sizes.clip_s)
        rounds = [self.reference.clip(1, self.sizes.clip_s) for _ in range(self.sizes.rounds)]
        return {name: median(r[name] for r in rounds) for name in ("first_token_s", "encoder_s")}

    def _growing(self, context: int) -> float:
        self.reference.decode(context, 4)
        return 1 / self.reference.decode(context, self.n_steps)

    @torch.no_grad()
    def decode(self, context: int, make: Callable[[StaticCache], Callable[[], None]]) -> dict[str, Any]:
        """Seconds of a token after `context` tokens."""
        cache = self._fill(context)
        self._token = torch.full((1, 1), TOKEN, device=self.gpu.device)
        start = self.gpu.wait()
        step = make(cache)
        for _ in range(WARM_UPS):
            step()
        prepared = self.gpu.wait() - start
        times = []
        for _ in range(1 if self.gpu.rehearsal else 3):
            self._rewind(cache, context)
            begin = self.gpu.wait()
            for _ in range(self.n_steps):
                step()
            times.append((self.gpu.wait() - begin) / self.n_steps)
        return {"step_s": median(times), "prepare_s": prepared}

    def _fill(self, context: int) -> StaticCache:
        d, config = self.reference.config.decoder, self.reference.oracle.model.language_model.config
        cache = StaticCache(config=config, max_cache_len=context + SPARE)
        for n in range(d.num_layers):
            shape = (1, d.num_kv_heads, context, d.head_dim)
            k, v = (torch.randn(*shape, dtype=torch.bfloat16, device=self.gpu.device) for _ in range(2))
            cache.update(k, v, n)
        return cache

    def _rewind(self, cache: StaticCache, context: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def _run(self, cache: StaticCache, token: torch.Tensor) -> torch.Tensor:
        model = self.reference.oracle.model
        out = model.language_model(input_ids=token, past_key_values=cache, use_cache=True)
        return model.lm_head(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)

    def make_step(self, cache: StaticCache) -> Callable[[], None]:
        def step() -> None:
            self._token = self._run(cache, self._token)

        return step

    def make_graph(self, cache: StaticCache) -> Callable[[], None]:
        """The step with a static cache, recorded."""
        if self.gpu.rehearsal:
            return self.make_step(cache)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(cache, self._token)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._token.copy_(self._run(cache, self._token))
        return graph.replay

    def make_compiled(self, cache: StaticCache) -> Callable[[], None]:
        hooks = self.reference.oracle.model.language_model.embed_tokens._forward_pre_hooks
        hooks.clear()  # ids are on the card already
        run = torch.compile(self._run, mode="reduce-overhead", dynamic=False)

        def step() -> None:
            if not self.gpu.rehearsal:
                torch.compiler.cudagraph_mark_step_begin()
            self._token = run(cache, self._token).clone()

        return step


def peer_steps(gpu: Gpu, path: Path, stage: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """`compile-peer` fills the compiler's cache, as soon as the file is there."""
    peer = Peer(gpu, path)
    if stage == "peer":
        yield from peer.eager()
        return
    if stage == "compile-peer":
        yield "wait", lambda: wait_for_file(path)
    yield from peer.compiled()


def wait_for_file(path: Path) -> dict[str, Any]:
    """Files appear when they are whole."""
    end = time.monotonic() + MOST_WAIT_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    return {"ok": path.exists()}
