"""Where graphs run: the reference that defines each op, and the backends that are fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ...kernels.errors import AuricleError

if TYPE_CHECKING:
    from .backend import Backend

BACKENDS = ("cpu", "reference")


class BackendError(AuricleError):
    """A backend that does not exist or cannot run here."""


def find_backend(name: str) -> Backend:
    """The backend called `name`; its libraries are imported now, not before."""
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}; there are: {', '.join(BACKENDS)}")
    return importlib.import_module(f".{name}", __name__).BACKEND
