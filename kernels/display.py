"""Text that came from a file, made fit to be looked at: every character visible, and not too much of it.

Names, metadata and messages of others may hold escape codes that a terminal obeys, kilobytes, or halves of characters.
Knows nothing else.
"""

from __future__ import annotations

import unicodedata

LINE, CELL = 2000, 500  # characters of a message's line, of a table's cell
JOINERS = "\u200c\u200d"  # invisible, but parts of words in some scripts and of emoji
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
USUAL = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def show(value: object, limit: int = LINE) -> str:
    """One line whose every character can be seen: what controls, reorders or cannot be encoded becomes an escape.
    Of a text longer than `limit`, its beginning, its length and its end. Showing twice changes nothing."""
    text = str(value)
    shown = _escape(text) if len(text) <= limit else ""
    if len(text) <= limit and len(shown) <= limit:
        return shown
    between = f" … ({len(text):,} characters) … "
    head, tail = (limit - len(between) + 1) // 2, (limit - len(between)) // 2
    return _escape(text[:head])[:head] + between + _escape(text[-tail:])[-tail:]


def show_answer(text: str) -> str:
    """What a model says, for a terminal: lines and tabs stay, and other control characters become escapes."""
    return "".join(_escape(c) if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def _escape(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape_character(c) if unicodedata.category(c) in UNSEEN else c for c in text)


def _escape_character(c: str) -> str:
    if c in JOINERS:
        return c
    return USUAL.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}")
