"""Text to token ids and back, rebuilt from the metadata of a GGUF file.

Two kinds: byte-level BPE (`tokenizer.ggml.model = gpt2`, Qwen's pre-tokeniser) through the `tokenizers` package, and
SentencePiece BPE (`llama`) through the `sentencepiece` package; both are imported at the first encoding.
Knows no prompt, no chat template and no stop rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..kernels.errors import AuricleError
from .byte_pairs import BYTE_TO_CHAR, CHAR_TO_BYTE, restore_merges, usable_merges
from .charsmap import read_charsmap
from .fields import Fields

# Qwen2's pre-tokeniser: contractions, words with one leading mark, single digits, punctuation runs, line ends, spaces.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENISERS = {"qwen2": QWEN2_PATTERN}
DEFAULT_PRE = "qwen2"  # files without `tokenizer.ggml.pre` come from converters of this family only

# Ids of audio slots. Their text, where there is one, is never read from a prompt: only the prompt builder places them.
PLACEHOLDER_KEYS = ("audio_token_id", "audio_start_id", "audio_end_id")

MAX_SPECIAL = 1 << 18  # letters in all special tokens together: one pattern finds them
SPACE_MARK = "▁"  # SentencePiece's visible space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(AuricleError):
    """The tokenizer in the file cannot be used, or a text cannot be encoded with it."""


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type` (GGUF; the same numbers as in SentencePiece's own model files)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """All tokens in id order; `index` leaves out the `[PADn]` fillers and gives the lowest id of a repeated token."""

    tokens: Sequence[str]
    types: np.ndarray  # [n_tokens] int32, TokenType; fillers are UNUSED whatever the file calls them
    index: dict[str, int]

    def of_type(self, *types: TokenType) -> list[int]:
        return np.flatnonzero(np.isin(self.types, types)).tolist()


class _Codec(Protocol):
    """One kind of tokenizer: plain text without special tokens to ids, and a token's text to its bytes."""

    leading_space: bool  # encoding puts a space before the text, so decoding takes one away

    def encode(self, text: str) -> list[int]: ...

    def bytes_of(self, token: str, kind: TokenType) -> bytes: ...


class Tokenizer:
    """`encode` and `decode` for one vocabulary. Cheap to build; the merge table is built at the first `encode`."""

    def __init__(self, vocabulary: Vocabulary, codec: _Codec, placeholders: frozenset[int] = frozenset()) -> None:
        self._vocabulary = vocabulary
        self._codec = codec
        self._placeholders = placeholders
        self.n_tokens: int = len(vocabulary.tokens)
        self.leading_space: bool = codec.leading_space
        self.special_ids: frozenset[int] = frozenset(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from the metadata of a GGUF file (`tokenizer.ggml.*`).

        Without `token_type`, special tokens are the ids above the last BPE token that are written `<…>`.
        Raises TokenizerError when the kind of tokenizer is unknown or its tables are missing.
        """
        fields = Fields(metadata, "the tokenizer", TokenizerError, "convert the model again")
        model = fields.require("tokenizer.ggml.model", str)
        if model == "gpt2":
            vocabulary, codec = _byte_level(fields)
        elif model == "llama":
            vocabulary, codec = _sentence_piece(fields)
        else:
            raise fields.complaint("tokenizer.ggml.model", "this program reads 'gpt2' and 'llama'")
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        if sum(len(vocabulary.tokens[i]) for i in vocabulary.of_type(*kinds)) > MAX_SPECIAL:
            raise fields.complaint("tokenizer.ggml.token_type", f"special tokens have {MAX_SPECIAL:,} letters at most")
        return cls(vocabulary, codec, _placeholder_ids(fields))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised, none is added. Raises TokenizerError."""
        return self.encode_parts([(text, True)])

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of a text in parts, each with whether it may hold special tokens. In one that may not, what is
        written like a control token is text as any other; what the vocabulary calls user-defined stays a token."""
        ids: list[int] = []
        plain = ""  # goes on across parts, since BPE is not compositional
        for text, parse_special in parts:
            _check_unicode(text)
            for fragment, special in self._fragments(text, parse_special):
                if special is None:
                    plain += fragment
                    continue
                ids += [*(self._codec.encode(plain) if plain else ()), special]
                plain = ""
        return [*ids, *(self._codec.encode(plain) if plain else ())]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`: U+FFFD for bytes that are no UTF-8; nothing for fillers, nor for specials unless asked for."""
        kept = (i for i in ids if not (skip_special and i in self.special_ids))
        text = b"".join(self.token_bytes(i) for i in kept).decode("utf-8", "replace")
        return text[1:] if self.leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for: maybe half a character, b"" for a filler, a special token as it is written."""
        assert 0 <= token_id < self.n_tokens, f"{token_id=} {self.n_tokens=}"
        kind = TokenType(int(self._vocabulary.types[token_id]))
        return b"" if kind == TokenType.UNUSED else self._codec.bytes_of(self._vocabulary.tokens[token_id], kind)

    def id_of(self, token: str) -> int | None:
        """The id of a token as it is written in the vocabulary (`<think>`, `Ġthe`), None when there is none."""
        return self._vocabulary.index.get(token)

    def _find_recognised(self, *types: TokenType) -> tuple[dict[str, int], re.Pattern[str] | None]:
        """Tokens of these types that a text can hold, and a pattern that finds them."""
        ids = (i for i in self._vocabulary.of_type(*types) if i not in self._placeholders)
        tokens = ((self._vocabulary.tokens[i], i) for i in ids)
        recognised = {token: i for token, i in tokens if token and SPACE_MARK not in token}
        longest_first = sorted(recognised, key=len, reverse=True)
        return recognised, re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _special(self) -> tuple[dict[str, int], re.Pattern[str] | None]:
        return self._find_recognised(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)

    @cached_property
    def _user_defined(self) -> tuple[dict[str, int], re.Pattern[str] | None]:
        return self._find_recognised(TokenType.USER_DEFINED)

    def _fragments(self, text: str, parse_special: bool) -> Iterator[tuple[str, int | None]]:
        """Cut `text` at the tokens that are recognised in it: (plain text, None) or (token, its id)."""
        recognised, pattern = self._special if parse_special else self._user_defined
        cursor = 0
        for match in pattern.finditer(text) if pattern else ():
            yield text[cursor : match.start()], None
            yield match[0], recognised[match[0]]
            cursor = match.end()
        yield text[cursor:], None


def _numbers(fields: Fields, key: str, n_tokens: int) -> np.ndarray | None:
    """One number a token, or None when the key is absent."""
    values = fields.get(key, np.ndarray)
    if values is not None and len(values) != n_tokens:
        raise fields.complaint(key, f"there are {len(values)} for {n_tokens} tokens")
    return values


def _given_types(fields: Fields, n_tokens: int) -> np.ndarray | None:
    key = "tokenizer.ggml.token_type"
    types = _numbers(fields, key, n_tokens)
    if types is None:
        return None
    if n_tokens and not (types.dtype.kind in "iu" and types.min() >= 1 and types.max() <= max(TokenType)):
        raise fields.complaint(key, f"each must be a whole number from 1 to {max(TokenType):d}")
    return types.astype(np.int32)


def _fillers(tokens: Sequence[str]) -> list[int]:
    """Ids that exist only to fill the embedding up, written `[PADn]`."""
    return [i for i, token in enumerate(tokens) if token.startswith("[PAD") and token == f"[PAD{i}]"]


def _vocabulary(tokens: Sequence[str], types: np.ndarray, fillers: Sequence[int]) -> Vocabulary:
    types = types.copy()
    types[list(fillers)] = TokenType.UNUSED
    index = {token: i for i, token in zip(range(len(tokens) - 1, -1, -1), reversed(tokens), strict=True)}
    for i in fillers:
        index.pop(tokens[i], None)
    return Vocabulary(tokens, types, index)


def _placeholder_ids(fields: Fields) -> frozenset[int]:
    architecture = fields.get("general.architecture", str, "")
    values = (fields.get(f"{architecture}.{key}", int) for key in PLACEHOLDER_KEYS)
    return frozenset(value for value in values if value is not None)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text is not valid Unicode at character {error.start}; pass it as UTF-8") from None


def _byte_level(fields: Fields) -> tuple[Vocabulary, _ByteLevel]:
    pre = fields.get("tokenizer.ggml.pre", str, DEFAULT_PRE)
    if pre not in PRE_TOKENISERS:
        raise fields.complaint("tokenizer.ggml.pre", f"this program knows {', '.join(sorted(PRE_TOKENISERS))}")
    tokens = fields.require("tokenizer.ggml.tokens", list[str])
    lines = fields.get("tokenizer.ggml.merges", list[str], ())
    fillers = _fillers(tokens)
    types = _given_types(fields, len(tokens))
    vocabulary = _vocabulary(tokens, np.ones(len(tokens), np.int32) if types is None else types, fillers)
    if types is None:
        vocabulary.types[_special_by_form(vocabulary, lines)] = TokenType.CONTROL
    return vocabulary, _ByteLevel(vocabulary, lines, PRE_TOKENISERS[pre])


def _special_by_form(vocabulary: Vocabulary, merges: Sequence[str]) -> list[int]:
    """Ids above the last BPE token that are written `<…>`.

    The last BPE token is the highest one a merge makes, never a count: some files have lost merges from the middle.
    """
    made = (vocabulary.index.get(line.replace(" ", ""), -1) for line in merges)
    bytes_ = (vocabulary.index.get(char, -1) for char in CHAR_TO_BYTE)
    last = max(max(made, default=-1), max(bytes_))
    return [
        i
        for i, token in enumerate(vocabulary.tokens[last + 1 :], last + 1)
        if len(token) > 2 and token.startswith("<") and token.endswith(">")
    ]


class _ByteLevel:
    """Byte-level BPE over NFC-normalised text."""

    leading_space = False

    def __init__(self, vocabulary: Vocabulary, merges: Sequence[str], pattern: str) -> None:
        self._vocabulary = vocabulary
        self._merges = merges
        self._pattern = pattern
        self._absent = frozenset(byte for byte, char in BYTE_TO_CHAR.items() if char not in vocabulary.index)

    def encode(self, text: str) -> list[int]:
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        if self._absent and (lost := self._absent.intersection(text.encode())):
            raise TokenizerError(f"the vocabulary has no token for byte 0x{min(lost):02x}; this text cannot be encoded")
        return ids

    def bytes_of(self, token: str, kind: TokenType) -> bytes:
        if kind != TokenType.NORMAL or not CHAR_TO_BYTE.keys() >= set(token):
            return token.encode()  # an added token is written as plain text
        return bytes([CHAR_TO_BYTE[char] for char in token])

    @cached_property
    def _bpe(self) -> Any:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        tokens, index = self._vocabulary.tokens, self._vocabulary.index
        merges = usable_merges(self._merges, index)
        merges = restore_merges(merges, tokens, index, self._vocabulary.of_type(TokenType.NORMAL))
        bpe = Tokenizer(models.BPE(vocab=index, merges=merges))
        bpe.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(self._pattern), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
        return bpe


def _sentence_piece(fields: Fields) -> tuple[Vocabulary, _SentencePiece]:
    tokens = fields.require("tokenizer.ggml.tokens", list[str])
    fields.require("tokenizer.ggml.scores", np.ndarray)
    scores = _numbers(fields, "tokenizer.ggml.scores", len(tokens))
    if not (np.abs(scores) < np.finfo(np.float32).max).all():
        raise fields.complaint("tokenizer.ggml.scores", "each must be a finite float32")
    types = _given_types(fields, len(tokens))
    vocabulary = _vocabulary(tokens, _piece_types(tokens) if types is None else types, _fillers(tokens))
    prefix = fields.get("tokenizer.ggml.add_space_prefix", bool, True)
    return vocabulary, _SentencePiece(vocabulary, scores, prefix, read_charsmap(fields))


def _piece_types(tokens: Sequence[str]) -> np.ndarray:
    named = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    plain = {True: TokenType.BYTE, False: TokenType.NORMAL}
    return np.array([named.get(t, plain[_BYTE_PIECE.fullmatch(t) is not None]) for t in tokens], np.int32)


class _SentencePiece:
    """SentencePiece BPE: pieces with scores, a space written as U+2581, unknown bytes as `<0xNN>`."""

    def __init__(self, vocabulary: Vocabulary, scores: np.ndarray, space_prefix: bool, charsmap: bytes) -> None:
        self.leading_space = space_prefix
        self._vocabulary = vocabulary
        self._scores = scores
        self._charsmap = charsmap

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def bytes_of(self, token: str, kind: TokenType) -> bytes:
        written = _BYTE_PIECE.fullmatch(token) if kind == TokenType.BYTE else None
        return bytes([int(written[1], 16)]) if written else token.replace(SPACE_MARK, " ").encode()

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        model = _model_proto(self._vocabulary, self._scores, self.leading_space, self._charsmap)
        try:
            return SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise TokenizerError(
                f"sentencepiece refuses the tokenizer in the file ({reason}); convert the model again"
            ) from None


def _model_proto(vocabulary: Vocabulary, scores: np.ndarray, space_prefix: bool, charsmap: bytes) -> bytes:
    """A SentencePiece model file; field numbers from `sentencepiece_model.proto`."""
    byte_fallback = bool(vocabulary.of_type(TokenType.BYTE))
    trainer = _field(3, 2) + _field(4, len(vocabulary.tokens)) + _field(35, int(byte_fallback))  # model_type 2: BPE
    unknown = vocabulary.of_type(TokenType.UNKNOWN)
    trainer += _field(45, vocabulary.tokens[unknown[0]].encode()) if unknown else b""
    normalizer = _field(2, charsmap) + _field(3, int(space_prefix)) + _field(4, 0) + _field(5, 1)
    pieces = [_field(1, _piece(vocabulary, i, float(score))) for i, score in enumerate(scores)]
    return b"".join([*pieces, _field(2, trainer), _field(3, normalizer)])


def _piece(vocabulary: Vocabulary, token_id: int, score: float) -> bytes:
    """One entry of the list of pieces. A repeated or empty one, which SentencePiece rejects, becomes an unused one."""
    token = vocabulary.tokens[token_id]
    kind = int(vocabulary.types[token_id])
    if not token or (kind != TokenType.UNUSED and vocabulary.index[token] != token_id):
        token, kind = f"[PAD{token_id}]", int(TokenType.UNUSED)
    number = b"\x15" + np.float32(score).tobytes()  # field 2, four bytes
    return _field(1, token.encode()) + number + _field(3, kind)


def _field(number: int, value: int | bytes) -> bytes:
    """A protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
