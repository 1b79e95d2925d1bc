"""Tables of a byte-level BPE: the visible character of each byte, and the merges, mended where a file has lost some.

Knows strings and ids only: no file, no special token, no way to cut text into words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

Merge = tuple[str, str]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's visible character of each byte: printable Latin-1 is itself, the other 68 follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def usable_merges(lines: Iterable[str], index: Mapping[str, int]) -> list[Merge]:
    """The merges whose two halves and whose product are all tokens, in their order; damaged lines are left out."""
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if left in index and right in index and left + right in index:
            merges.append((left, right))
    return merges


def restore_merges(
    merges: list[Merge], tokens: Sequence[str], index: Mapping[str, int], normal_ids: Iterable[int]
) -> list[Merge]:
    """Put back merges that a converter has lost (a common one takes those that begin with `#` for comments).

    Where ids follow the rank of the merge, as in Qwen's vocabulary, a lost merge is the pair that the others leave
    of its token. In another order, or with more than one merge in twenty lost, they stay as they are.
    """
    made = [index[left + right] for left, right in merges]
    if not made or any(a >= b for a, b in pairwise(made)):
        return merges
    known = set(made)
    lost = [i for i in normal_ids if i < made[-1] and i not in known and len(tokens[i]) > 1]
    if not lost or 20 * len(lost) > len(merges):
        return merges
    ranks = dict(zip(merges, made, strict=True))
    for i in lost:
        parts = _reduce(tokens[i], ranks)
        if len(parts) == 2 and parts[0] in index and parts[1] in index:
            ranks[parts[0], parts[1]] = i
    return sorted(ranks, key=ranks.__getitem__)


def _reduce(token: str, ranks: Mapping[Merge, int]) -> list[str]:
    """What the merges leave of a token, lowest rank first and the leftmost of a rank; in n log n steps."""
    parts: list[str | None] = list(token)  # None: has become part of one before it
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    waiting = [(ranks[pair], at, pair) for at, pair in enumerate(pairwise(token)) if pair in ranks]
    heapify(waiting)
    while waiting:
        _, at, pair = heappop(waiting)
        right = after[at]
        if right == len(parts) or (parts[at], parts[right]) != pair:
            continue  # one of them has been merged meanwhile
        parts[at], parts[right], after[at] = pair[0] + pair[1], None, after[right]
        if after[at] < len(parts):
            before[after[at]] = at
        for left in (before[at], at):
            if left >= 0 and after[left] < len(parts):
                pair = parts[left], parts[after[left]]
                if pair in ranks:
                    heappush(waiting, (ranks[pair], left, pair))
    return [part for part in parts if part is not None]
