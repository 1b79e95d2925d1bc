"""The one base class of every error a user can cause. Knows how a message is made fit to be read, and nothing else."""

from __future__ import annotations

from .display import show


class AuricleError(Exception):
    """A mistake of the user or of their files, told in one line: the value and the remedy. Where lists belong to it,
    they are further arguments, a line each. What a file brought into a line is shown, never obeyed."""

    def __str__(self) -> str:
        return "\n".join(map(show, self.args))
