"""Text in the tables of a terminal. Knows no table."""

from __future__ import annotations

from rich.text import Text

from ..kernels.display import CELL, show


def cell(value: object) -> Text:
    """As it is, never as markup or emoji codes, with every character visible, and not too much of it."""
    return Text(show(value, CELL))
