"""Where graphs run: the reference that defines each op, and the backends that are fast."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from ...kernels.errors import AuricleError

if TYPE_CHECKING:
    from .backend import Backend

log = logging.getLogger("auricle.backends")

BACKENDS = ("cpu", "reference")  # that run on every machine
CHOICES = ("auto", "cpu", "cuda", "reference")
CARD_PRECISIONS = ("auto", "exact")


class BackendError(AuricleError):
    """A backend that does not exist or cannot run here."""


def find_backend(name: str, precision: str | None = None) -> Backend:
    """The backend called `name`; its libraries are imported now, not before.

    `auto` is `cuda` where that runs and has the precision, else `cpu`. `precision`: one of `cpu.PRECISIONS`, with
    `cuda` of `CARD_PRECISIONS`, None for `auto`; the reference has `exact` only. Raises BackendError, one line.
    """
    if name not in CHOICES:
        raise BackendError(f"no backend {name!r}; there are: {', '.join(CHOICES)}")
    if name == "reference":
        if precision not in (None, "exact"):
            raise BackendError(f"--precision {precision} is not for the reference backend, which is exact")
        from .reference import BACKEND

        return BACKEND
    if name == "cuda" or (name == "auto" and precision in (None, *CARD_PRECISIONS) and has_card()):
        if precision not in (None, *CARD_PRECISIONS):
            raise BackendError(f"--precision is {precision!r}; on cuda it must be one of: {', '.join(CARD_PRECISIONS)}")
        from .cuda_device import check_cuda

        check_cuda()
        from .cuda import first_card

        return first_card(precision or "auto")
    from .cpu import PRECISIONS, make_backend

    if precision is not None and precision not in PRECISIONS:
        raise BackendError(f"--precision is {precision!r}; it must be one of: {', '.join(PRECISIONS)}")
    return make_backend(precision or "auto")


def has_card() -> bool:
    """Whether `auto` takes the GPU: says so, and why not when there is one that cannot be used."""
    import torch

    from .cuda_device import check_cuda, machine_has_card

    try:
        check_cuda()
    except BackendError as error:
        if machine_has_card():
            tell_left_alone(str(error).removesuffix(", or use --backend cpu").removesuffix("; use --backend cpu"))
        return False
    log.info("computing on %s (--backend cpu for the processor)", torch.cuda.get_device_name())
    return True


@cache
def tell_left_alone(reason: str) -> None:
    """Said once for each reason."""
    log.warning("the GPU is left alone and the processor computes: %s", reason)
