"""Where the time of a request goes: the card's time by kernel against the wall's, as PyTorch's profiler tells it.

And, without that profiler, op by op with events around each bound call, in which the host's launches count, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from card_device import Gpu
from card_requests import TOKEN, Sizes, sound

from auricle.engine import Model
from auricle.engine.answer import GenerateOptions
from auricle.engine.backends.backend import Backend, Kernel
from auricle.engine.gguf import open_gguf
from auricle.engine.graph import Node
from auricle.engine.sampling import Sampler
from auricle.tools.bench import SAMPLE_RATE, fill_cache, hear

MOST_NAMES = 40
N_STEPS = 8


class Profiles:
    """The parts of a request, each run once before it is watched."""

    def __init__(self, gpu: Gpu, path: Path) -> None:
        self.gpu, self.path, self.sizes = gpu, path, Sizes(gpu.rehearsal)
        self._models: dict[str, Model] = {}
        self.watched: list[tuple[str, Any, Any]] = []

    def model(self, kind: str) -> Model:
        if kind not in self._models:
            backend = self.gpu.backend()
            backend = self._watch(backend) if kind == "ops" else backend
            self._models[kind] = Model(open_gguf(self.path), backend, n_ctx=None, kv_type=None, poison=False)
        return self._models[kind]

    def steps(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for part in ("step", "prefill", "encoder"):
            yield part, lambda part=part: self.profile(part)
        if not self.gpu.rehearsal:
            for part in ("step", "prefill", "encoder"):
                yield f"{part} by op", lambda part=part: self.time_ops(part)

    def part(self, model: Model, name: str) -> tuple[Callable[[], object], int]:
        """A call, and how many times it does what it is called for."""
        heard, prompt = hear(model, sound(self.sizes.clip_s), SAMPLE_RATE, self.sizes.n_new)
        rows = model.runtime.encode(heard.mels)
        if name == "encoder":
            return lambda: model.runtime.encode(heard.mels), 1
        if name == "prefill":
            return lambda: model.runtime.prefill(prompt, rows, self.sizes.n_new), 1
        context = self.sizes.contexts[0]
        fill_cache(model, context + N_STEPS + 2)
        return lambda: list(model.runtime.steps(TOKEN, context, N_STEPS, Sampler(GenerateOptions()))), N_STEPS + 1

    def profile(self, name: str) -> dict[str, Any]:
        call, n = self.part(self.model("plain"), name)
        walls = [self._wall(call) for _ in range(2 if self.gpu.rehearsal else 4)]
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [] if self.gpu.rehearsal else [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            self.gpu.wait()
        times: dict[str, list[float]] = {}
        for event in profiler.events():
            on_card = event.device_type != torch.autograd.DeviceType.CPU
            if on_card or self.gpu.rehearsal:
                us = event.self_device_time_total if on_card else event.self_cpu_time_total
                entry = times.setdefault(event.name, [0, 0.0])
                entry[0], entry[1] = entry[0] + 1, entry[1] + us
        total = sum(us for _, us in times.values())
        first = sorted(times.items(), key=lambda item: -item[1][1])[:MOST_NAMES]
        return {
            "runs": n,
            "wall_us": 1e6 * min(walls[1:]) / n,
            "first_wall_us": 1e6 * walls[0] / n,
            "device_us": total / n,
            "launches": sum(count for count, _ in times.values()) / n,
            "kernels": [{"name": k[:120], "count": c / n, "us": us / n} for k, (c, us) in first],
        }

    def _wall(self, call: Callable[[], object]) -> float:
        start = self.gpu.wait()
        call()
        return self.gpu.wait() - start

    def time_ops(self, name: str) -> dict[str, Any]:
        """Each op between two events; a step is the plain call, not the recorded one."""
        model = self.model("ops")
        if name == "step":
            model.runtime.decode(TOKEN, self.sizes.contexts[0])
            call: Callable[[], object] = lambda: model.runtime.decode(TOKEN, self.sizes.contexts[0])  # noqa: E731
        else:
            call, _ = self.part(model, name)
        call()
        self.watched.clear()
        call()
        self.gpu.wait()
        times: dict[str, list[float]] = {}
        for op, start, stop in self.watched:
            entry = times.setdefault(op, [0, 0.0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + 1e3 * start.elapsed_time(stop)
        first = sorted(times.items(), key=lambda item: -item[1][1])[:MOST_NAMES]
        return {"ops": [{"name": k, "count": c, "us": us} for k, (c, us) in first]}

    def _watch(self, backend: Backend) -> Backend:
        """The backend with an event before and after each call."""

        def watch(kernel: Kernel) -> Kernel:
            def bind(node: Node, *operands: Any) -> Callable[[], None]:
                call, name = kernel.bind(node, *operands), describe(node)

                def watched() -> None:
                    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    call()
                    stop.record()
                    self.watched.append((name, start, stop))

                return watched

            return replace(
                kernel, bind=bind, transient=lambda node: max(1, kernel.transient(node))
            )  # so never recorded

        kernels = {op: watch(kernel) for op, kernel in backend.kernels.items()}
        return replace(backend, kernels=kernels, bind_steps=None)


def describe(node: Node) -> str:
    """An op with the names of its weights, layers together."""
    names = [v.name for v in node.operands if v is not None and v.kind == "weight" and len(v.shape) == 2]
    short = ["".join("N" if c.isdigit() else c for c in name) for name in names]
    return " ".join([node.op, *short])
