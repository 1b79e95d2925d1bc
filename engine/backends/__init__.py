"""Where graphs run: the reference that defines each op, and the backends that are fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.errors import AuricleError

if TYPE_CHECKING:
    from .backend import Backend

BACKENDS = ("cpu", "reference")


class BackendError(AuricleError):
    """A backend that does not exist or cannot run here."""


def find_backend(name: str, precision: str | None = None) -> Backend:
    """The backend called `name`; its libraries are imported now, not before.

    `precision`: one of `cpu.PRECISIONS`, None for `auto`; the reference has one only.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}; there are: {', '.join(BACKENDS)}")
    if name == "reference":
        if precision not in (None, "exact"):
            raise BackendError(f"--precision {precision} is not for the reference backend, which is exact")
        from .reference import BACKEND

        return BACKEND
    from .cpu import PRECISIONS, make_backend

    if precision is not None and precision not in PRECISIONS:
        raise BackendError(f"--precision is {precision!r}; it must be one of: {', '.join(PRECISIONS)}")
    return make_backend(precision or "auto")
