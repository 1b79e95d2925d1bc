"""SentencePiece's precompiled map of characters: the bytes of a trie and of what its keys become, checked before a
library walks them without looking.

Layout (SentencePiece's `normalizer.cc`): uint32 bytes of the trie; the trie, units of uint32 (darts-clone); texts that
each end with a zero byte, which leaves of the trie point into.
"""

from __future__ import annotations

import numpy as np

from .fields import Fields

KEY = "tokenizer.ggml.precompiled_charsmap"
_LEAF = np.uint32(1 << 31)  # a unit with this bit is the place of a text


def read_charsmap(fields: Fields) -> bytes:
    """The map, b"" where there is none. Raises the error of `fields` for one that leads outside of itself."""
    values = fields.get(KEY, np.ndarray)
    if values is None or not len(values):
        return b""
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        raise fields.complaint(KEY, "each must be a byte")
    raw = values.astype(np.uint8).tobytes()
    if not is_sound(raw):
        raise fields.complaint(KEY, "it is damaged")
    return raw


def is_sound(raw: bytes) -> bool:
    """Whether no walk through the trie leaves it, and each of its texts lies inside `raw` and ends there."""
    n_bytes = int.from_bytes(raw[:4], "little")
    texts = raw[4 + n_bytes :]
    if n_bytes == 0 or n_bytes % 4 or not texts.endswith(b"\0"):
        return False
    units = np.frombuffer(raw, "<u4", n_bytes // 4, 4)
    leaf = (units & _LEAF) != 0
    if ((units[leaf] & ~_LEAF) >= len(texts)).any():
        return False
    at = np.flatnonzero(~leaf)
    inner = units[at].astype(np.int64)
    children = at ^ ((inner >> 10) << ((inner & 1 << 9) >> 6))  # where the child of the byte 0 is
    return not ((children | 255) >= len(units)).any()
