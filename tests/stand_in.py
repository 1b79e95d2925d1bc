"""A plain CPU in the place of a GPU: what the CUDA backend asks of a card, without streams, pinned memory or recording.

`StandIn` counts what is allocated; for kernels to run on it, Triton must run its interpreter: TRITON_INTERPRET=1 before
anything is imported. `StandInDriver` is there where kernels are compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoEvent:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class StandIn:
    """A card's interface (see `engine/backends/cuda_device.py`). `allocated` and `peak` are bytes, `captured` calls."""

    name, capability, processors = "stand-in", (8, 9), 34

    def __init__(self) -> None:
        self.target = torch.device("cpu")
        self.allocated = self.peak = self.captured = 0

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(memory.untyped_storage(), self._free, nbytes)
        return memory

    def _free(self, nbytes: int) -> None:
        self.allocated -= nbytes

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def event(self) -> NoEvent:
        return NoEvent()

    def capture(self, call: Callable[[], None], warm_ups: int = 1) -> Callable[[], None]:
        self.captured += 1
        for _ in range(warm_ups):
            call()
        return call

    def release(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40

    def total_bytes(self) -> int:
        return 12 << 30

    def peak_bytes(self) -> int:
        return self.peak


@dataclass(frozen=True)
class Started:
    """What Triton's launcher was called with."""

    kernel: Any
    grid: tuple[int, int, int]
    stream: int
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


class StandInDriver:
    """In the place of Triton's driver, within `with`: claims a card of capability `arch`, for which kernels are then
    really compiled, and starts nothing. `asked`: how often Triton looked for a variant; `loaded`: kernels brought to
    the card; `started`: launches; `variants`: what was compiled of each kernel, by Triton's own keys."""

    def __init__(self, arch: int, compiles: bool = True) -> None:
        """Without `compiles` variants are only noted."""
        self._target, self._compiles = GPUTarget("cuda", arch, 32), compiles
        self.asked = self.loaded = self.stream = 0
        self.started: list[Started] = []
        self.variants: dict[str, set[str]] = {}
        self.utils, self.launcher_cls = self, lambda source, metadata: partial(self._start, source.fn)

    def __enter__(self) -> StandInDriver:
        self._before, self._seen = driver._active, set()
        self._run, self._compile = JITFunction.run, JITFunction._do_compile
        JITFunction.run = lambda kernel, *args, **options: self._ask(kernel, *args, **options)
        JITFunction._do_compile = lambda kernel, key, *args, **options: self._note(kernel, key, *args, **options)
        driver.set_active(self)
        return self

    def __exit__(self, *_: object) -> None:
        driver._active = self._before
        JITFunction.run, JITFunction._do_compile = self._run, self._compile
        for kernel in self._seen:
            kernel.device_caches.clear()  # what was compiled knows this driver

    def _ask(self, kernel: JITFunction, *args: Any, **options: Any) -> Any:
        self.asked += 1
        if kernel not in self._seen:
            kernel.device_caches.clear()
            self._seen.add(kernel)
        return self._run(kernel, *args, **options)

    def _note(self, kernel: JITFunction, key: str, *args: Any, **options: Any) -> Any:
        self.variants.setdefault(kernel.fn.__name__, set()).add(key)
        if self._compiles:
            return self._compile(kernel, key, *args, **options)
        compiled = SimpleNamespace(run=partial(self._start, kernel), function=0, packed_metadata=())
        compiled.launch_metadata = lambda *_: None
        kernel.device_caches[self.get_current_device()][0][key] = compiled
        return compiled

    def _start(self, kernel: JITFunction, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        self.started.append(Started(kernel, (x, y, z), stream, rest[5:]))

    # What Triton asks its driver.

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        self.loaded += 1
        return None, 1, 32, 0, 1024  # no module, so none that is unloaded
