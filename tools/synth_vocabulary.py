"""Invents a byte-level BPE vocabulary of any size, in Qwen's form: what a model without a real one is given.

English comes out in half as many tokens again as with a real vocabulary, and the tables are as large. Knows letters,
and where Qwen has its special tokens; does not know how text is cut into words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice, product

from ..convert.vocabulary import Vocabulary
from ..engine.byte_pairs import BYTE_TO_CHAR, Merge
from ..engine.tokenizer import TokenType

# Places after the last byte-pair token, as Qwen's; all others up to the end are fillers.
SPECIALS = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|AUDIO|>": 11,
    "<think>": 24,
    "</think>": 25,
    "<|audio_bos|>": 26,
    "<|audio_eos|>": 27,
}
N_AFTER = 293  # specials and fillers: 151936 - 151643

SPACE = BYTE_TO_CHAR[0x20]
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiouy"
# A longer cluster is made of a shorter one and a letter; those that others begin with come first.
CLUSTERS = "st sc sp sh th ch ph wh bl br cl cr dr fl fr gl gr pl pr tr str scr spr thr".split()  # noqa: SIM905
DIGRAPHS = "ai au ay ea ee ei ie io oa oo ou".split()  # noqa: SIM905
WORDS = """the of and to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up other about out many
then them these so some her would make like him into time has look two more write go see number no way could people
my than first water been call who its now find long down day did get come made may part over new sound take only
little work know place year live me back give most very after thing our just name good sentence man think say great
where help through much before line right too mean old any same tell boy follow came want show also around form three
small set put end does another well large must big even such because turn here why ask went men read need land
different home us move try kind hand picture again change off play spell air away animal house point page letter
mother answer found study still learn should world transcribe audio level timestamp timestamps describe speaker
speech voice music noise hear assistant system user using format start second seconds exclude headings exact content
text translate summary question word words language english""".split()  # noqa: SIM905
_PIECE = re.compile(
    rf"(?:{'|'.join(reversed(CLUSTERS))}|[{CONSONANTS}])?(?:{'|'.join(DIGRAPHS)}|[{VOWELS}])"
    rf"|{'|'.join(reversed(CLUSTERS))}|.",
    re.IGNORECASE,
)


def invent_vocabulary(n_vocab: int) -> Vocabulary:
    """A byte-level BPE vocabulary of `n_vocab` tokens, the same always: 256 bytes, merges, specials, fillers.

    Every token made by a merge is what its own text is encoded to, and their lengths are like those of Qwen's.
    """
    merges = list(islice(invent_merges(), n_vocab - N_AFTER - 256))
    tokens = [*BYTE_TO_CHAR.values(), *("".join(merge) for merge in merges)]
    types = [TokenType.NORMAL] * len(tokens) + [TokenType.UNUSED] * N_AFTER
    specials = {text: len(tokens) + place for text, place in SPECIALS.items()}
    tokens += [f"[PAD{i}]" for i in range(len(tokens), n_vocab)]
    for text, i in specials.items():
        tokens[i] = text
        types[i] = TokenType.CONTROL if text.startswith("<|") else TokenType.USER_DEFINED
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[" ".join(merge) for merge in merges],
        ids={token: i for i, token in enumerate(tokens) if types[i] is not TokenType.UNUSED},
        eos_id=specials["<|im_end|>"],
        pad_id=specials["<|endoftext|>"],
        bos_id=specials["<|endoftext|>"],
        chat_template=None,
        notes=(),
    )


def invent_merges() -> Iterator[Merge]:
    """Merges without end, no product twice.

    Letters first join to syllables: consonants, then a vowel, so that nothing joins across two of them. Then words
    grow from their beginning, a space or a capital, by a syllable at a time. At most one merge fits at any time, and
    hence each product is reached. Chinese characters, three bytes each, are strewn in.
    """
    yield from _syllable_merges()
    syllables = _syllables()
    pieces = [*CONSONANTS, *VOWELS, *DIGRAPHS, *syllables]
    made = {SPACE + piece.title() for piece in pieces} | {SPACE + piece for piece in pieces}
    yield from ((SPACE, token[1:]) for token in sorted(made))
    for word in WORDS:
        yield from _grow([SPACE, *_PIECE.findall(word)], made)
    for word in WORDS:
        yield from _grow([SPACE, *_PIECE.findall(word.title())], made)
        yield from _grow(_PIECE.findall(word.title()), made)
    ideographs = _ideograph_merges()
    for i, merge in enumerate(merge for word in _invent_words(syllables) for merge in _grow(word, made)):
        yield merge
        if i % 6 == 0:
            yield from islice(ideographs, 1)


def _syllables() -> list[str]:
    return ["".join(parts) for parts in product([*CONSONANTS, *CLUSTERS], [*VOWELS, *DIGRAPHS])]


def _syllable_merges() -> Iterator[Merge]:
    for cluster in CLUSTERS:
        yield cluster[:-1], cluster[-1]
        yield cluster[:-1].title(), cluster[-1]
    for first, second in DIGRAPHS:
        yield first, second
        yield first.title(), second
    for onset, vowel in product([*CONSONANTS, *CLUSTERS], [*VOWELS, *DIGRAPHS]):
        yield onset, vowel
        yield onset.title(), vowel


def _grow(pieces: Iterable[str], made: set[str]) -> Iterator[Merge]:
    """The merges that make a word of its pieces from the left, as far as they are not yet `made`."""
    first, *rest = pieces
    for piece in rest:
        if first + piece not in made:
            made.add(first + piece)
            yield first, piece
        first += piece


def _invent_words(syllables: list[str]) -> Iterator[list[str]]:
    """Words of two to five syllables after a space, one in eight with a capital, for ever.

    A syllable is four times as rare as one that is a letter shorter: that makes the tables as large as the real ones.
    """
    rng = random.Random(0)
    frequencies = list(accumulate(0.25 ** len(syllable) for syllable in syllables))
    while True:
        first, *rest = rng.choices(syllables, cum_weights=frequencies, k=rng.choice((2, 3, 3, 4, 4, 5)))
        yield [SPACE + (first.title() if rng.random() < 1 / 8 else first), *rest]


def _ideograph_merges() -> Iterator[Merge]:
    """Each of Unicode's first block of Chinese characters, and before it the two bytes it begins with."""
    made = set()
    for code in range(0x4E00, 0xA000):
        first, second, third = (BYTE_TO_CHAR[byte] for byte in chr(code).encode())
        if first + second not in made:
            made.add(first + second)
            yield first, second
        yield first + second, third
