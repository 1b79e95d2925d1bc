"""Numbers that are NaN or infinite: noticed in the logits, then looked for in the weights.

Knows files and formats. Does not know what a tensor is for.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.dequantize import dequantize
from .models.config import ModelError
from .sampling import NonFiniteError

if TYPE_CHECKING:
    from .gguf import GGUFFile

log = logging.getLogger("auricle.engine")

SLAB_NUMBERS = 1 << 22  # decoded at a time
TOLD_BYTES = 1 << 30  # of weights that take long enough to look through for a word about it


def check_logits(logits: np.ndarray) -> None:
    """Raises NonFiniteError unless all of [n_vocab] are finite: one token that can never be chosen is a wrong answer,
    too."""
    if not np.isfinite(logits).all():
        raise NonFiniteError(f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are not finite")


def blame(file: GGUFFile, error: NonFiniteError) -> ModelError:
    """What to tell about logits that are not finite: the tensor at fault, if it is one."""
    name = find_non_finite(file)
    if name is None:
        return ModelError(
            f"{file.path}: {error}, though every weight is: numbers grew too large on the way; "
            "try --kv-type f32 and --precision exact"
        )
    return ModelError(f"{file.path}: tensor {name} holds NaN or infinite numbers; fetch or convert the file again")


def find_non_finite(file: GGUFFile) -> str | None:
    """The first tensor that holds NaN or an infinite number."""
    if sum(info.nbytes for info in file.tensors.values()) > TOLD_BYTES:
        log.info("the logits are not finite; looking through the weights of %s", file.path)
    for name, info in file.tensors.items():
        data = file.data(name)
        rows = data.reshape(-1, data.shape[-1])
        step = max(1, SLAB_NUMBERS // info.shape[-1])
        for start in range(0, len(rows), step):
            with np.errstate(all="ignore"):
                if not np.isfinite(dequantize(rows[start : start + step], info.format)).all():
                    return name
    return None
