"""Where the cases of the GPU kernels run: interpreted on the processor, or with `--card` on the GPU of this machine."""

from __future__ import annotations

import os
import sys

import torch

CARD = "--card" in sys.argv
DEVICE = torch.device("cuda" if CARD else "cpu")

assert CARD or os.environ.get("TRITON_INTERPRET") == "1", "without --card the cases are interpreted: TRITON_INTERPRET=1"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same numbers, wherever they are."""
    return torch.equal(a.cpu(), b.cpu())
