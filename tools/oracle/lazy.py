"""Weights that come when a module runs and go when it has run, so that a large model needs little memory.

Stands alone (torch and numpy only): the program that runs the official code in another environment uses it, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
ROWS_BYTES = 64 << 20  # of stored numbers widened at a time


class Stored:
    """Tensors in files, read with plain reads: mapped pages would stay in memory. `places`: {name: (file, dtype, shape,
    byte it begins at)}, which somebody has checked."""

    def __init__(self, places: Mapping[str, Sequence[Any]]) -> None:
        self._places = places

    def read(self, name: str) -> Tensor:
        """A tensor in float32. Raises OSError for a file that has been cut short meanwhile."""
        path, kind, shape, offset = self._places[name]
        dtype = DTYPES[kind]
        out = np.empty(math.prod(shape), np.float32)
        step = ROWS_BYTES // dtype.itemsize
        with open(path, "rb") as file:
            file.seek(offset)
            for start in range(0, len(out), step):
                part = out[start : start + step]
                stored = np.fromfile(file, dtype, len(part))
                if len(stored) < len(part):
                    raise OSError(f"{path} ends inside {name}: it was cut short while being read")
                if kind == "BF16":
                    np.left_shift(stored, 16, out=part.view(np.uint32), dtype=np.uint32, casting="unsafe")
                else:
                    part[:] = stored
        return torch.from_numpy(out.reshape(tuple(shape)))


def load_lazily(
    model: nn.Module, read: Callable[[str], Tensor], resident_bytes: int, aliases: Mapping[str, str] | None = None
) -> None:
    """Makes each module of `model` that owns parameters fetch them by name when it is called.

    They stay while all that stay take no more than `resident_bytes`; others go after the call. `aliases`: names of
    parameters that are read under another name.
    """
    aliases, free = aliases or {}, [resident_bytes]
    for path, module in model.named_modules():
        owned = {key: f"{path}.{key}" for key, value in module._parameters.items() if value is not None}
        if owned:
            _attach(module, owned, read, aliases, free)


def _attach(
    module: nn.Module, owned: dict[str, str], read: Callable[[str], Tensor], aliases: Mapping[str, str], free: list[int]
) -> None:
    empty = dict(module._parameters)

    def fetch(module: nn.Module, args: object) -> None:
        for key, name in owned.items():
            if module._parameters[key].is_meta:
                module._parameters[key] = nn.Parameter(read(aliases.get(name, name)), requires_grad=False)

    def drop(module: nn.Module, args: object, output: object) -> None:
        size = sum(4 * value.numel() for value in module._parameters.values() if value is not None)
        if size <= free[0]:
            free[0] -= size
            for hook in hooks:
                hook.remove()
        else:
            module._parameters.update(empty)

    hooks = [module.register_forward_pre_hook(fetch), module.register_forward_hook(drop)]


def meta_parameters(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` gives, with parameters that have shapes only; buffers keep their values. Nothing is initialised."""
    init = {name: value for name, value in vars(nn.init).items() if name.endswith("_") and callable(value)}
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, value if value is None else nn.Parameter(value.to("meta"), requires_grad=False))

    try:
        nn.Module.register_parameter = register_empty
        for name in init:
            setattr(nn.init, name, lambda tensor, *args, **options: tensor)
        return build().eval()
    finally:
        nn.Module.register_parameter = register
        for name, value in init.items():
            setattr(nn.init, name, value)
