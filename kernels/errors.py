"""The one base class of every error a user can cause. Knows nothing else."""

from __future__ import annotations


class AuricleError(Exception):
    """A mistake of the user or of their files, told in one line: the value and the remedy."""
