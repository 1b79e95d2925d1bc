"""The tokenizer files of a checkpoint folder as the token list of a GGUF file: byte-level BPE of Qwen's kind.

Knows vocab.json, merges.txt, added_tokens.json, tokenizer_config.json, tokenizer.json and chat_template.jinja.
Does not tokenise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.fields import as_kind
from ..engine.gguf import Typed, i32s, string, strings, u32
from ..engine.tokenizer import TokenType
from ..kernels.quote import quote
from .documents import REMEDY, Document, read_document, read_whole
from .source import ConversionError

VOCAB, MERGES, TOKENIZER = "vocab.json", "merges.txt", "tokenizer.json"
ADDED, SETTINGS = "added_tokens.json", "tokenizer_config.json"
MAX_ID_DIGITS = 18


@dataclass(frozen=True)
class Vocabulary:
    """`tokens[id]` and `types[id]` for every row of the embedding; `notes` say what was changed on the way."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    ids: dict[str, int]
    eos_id: int | None
    pad_id: int | None
    bos_id: int | None
    chat_template: str | None
    notes: tuple[str, ...]

    def metadata(self) -> dict[str, Typed]:
        """The `tokenizer.*` keys of a GGUF file."""
        entries = {
            "tokenizer.ggml.model": string("gpt2"),
            "tokenizer.ggml.pre": string("qwen2"),
            "tokenizer.ggml.tokens": strings(self.tokens),
            "tokenizer.ggml.token_type": i32s([int(kind) for kind in self.types]),
            "tokenizer.ggml.merges": strings(self.merges),
        }
        numbers = {"eos": self.eos_id, "padding": self.pad_id, "bos": self.bos_id}
        entries |= {f"tokenizer.ggml.{name}_token_id": u32(i) for name, i in numbers.items() if i is not None}
        if self.chat_template is not None:
            entries["tokenizer.chat_template"] = string(self.chat_template)
        return entries


def read_vocabulary(directory: Path, n_vocab: int, placeholders: Mapping[str, int]) -> Vocabulary:
    """Every token of the folder's tokenizer and the `placeholders` ({text: id}) in a list of `n_vocab`.

    The hub tokenizer does not know the placeholders; where it has an added token of another text at such an id
    (Qwen's has `<|vision_pad|>` at 151654) the placeholder takes its place, with a note. Ids without a token become
    `[PADn]`. Raises ConversionError for missing files, ids beyond `n_vocab`, and two tokens for one id or the reverse.
    """
    base, merges = _read_bpe(directory)
    settings = read_document(directory / SETTINGS) or Document({}, directory / SETTINGS, ConversionError, REMEDY)
    added = _read_added(directory, settings)
    ids = _Ids(n_vocab)
    for token, i in base.items():
        if added.get(token, (None,))[0] != i:  # some folders list the added tokens in vocab.json too
            ids.put(token, i, TokenType.NORMAL)
    for token, (i, kind) in added.items():
        if i not in placeholders.values():
            ids.put(token, i, kind)
    notes = _put_placeholders(ids, placeholders, {i: token for token, (i, _) in added.items()})
    _check_merges(merges, ids.by_token)
    tokens = [ids.by_id.get(i, f"[PAD{i}]") for i in range(n_vocab)]
    return Vocabulary(
        tokens=tokens,
        types=[ids.types.get(i, TokenType.UNUSED) for i in range(n_vocab)],
        merges=merges,
        ids=ids.by_token,
        eos_id=ids.find(settings.look_up("eos_token")),
        pad_id=ids.find(settings.look_up("pad_token")),
        bos_id=ids.find(settings.look_up("bos_token")),
        chat_template=_read_chat_template(directory, settings),
        notes=notes,
    )


class _Ids:
    """A two-way map of tokens and ids that refuses a second meaning of either."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab
        self.by_id: dict[int, str] = {}
        self.by_token: dict[str, int] = {}
        self.types: dict[int, TokenType] = {}

    def put(self, token: str, i: int, kind: TokenType) -> None:
        if type(i) is not int or not 0 <= i < self.n_vocab:
            raise ConversionError(
                f"token {quote(token)} has the id {quote(i)}: the embedding has rows 0 to {self.n_vocab - 1}"
            )
        if self.by_id.get(i, token) != token:
            raise ConversionError(f"two tokens have the id {i}: {quote(self.by_id[i])} and {quote(token)}")
        if self.by_token.get(token, i) != i:
            raise ConversionError(f"token {quote(token)} has two ids: {self.by_token[token]} and {i}")
        self.by_id[i], self.by_token[token], self.types[i] = token, i, kind

    def find(self, token: Any) -> int | None:
        """The id of a token given by text or as an added-token object; None when it has none."""
        text = token.get("content") if isinstance(token, dict) else token
        return self.by_token.get(text) if isinstance(text, str) else None


def _put_placeholders(ids: _Ids, placeholders: Mapping[str, int], added: Mapping[int, str]) -> tuple[str, ...]:
    notes = []
    for token, i in placeholders.items():
        ids.put(token, i, TokenType.CONTROL)
        if added.get(i, token) != token:
            notes.append(f"id {i}: the tokenizer's {added[i]} is written as {token}")
    return tuple(notes)


def _read_bpe(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """{token: id} and the merges, `a b`, from vocab.json and merges.txt, or else from tokenizer.json."""
    vocab = read_document(directory / VOCAB)
    merges = _read_merges(directory / MERGES)
    if vocab is not None and merges is not None:
        return vocab.values, merges
    tokenizer = read_document(directory / TOKENIZER)
    if tokenizer is None:
        raise ConversionError(f"{directory} has no tokenizer: looked for {VOCAB} with {MERGES}, and for {TOKENIZER}")
    entries, merges = tokenizer.get("model.vocab", dict), tokenizer.look_up("model.merges")
    pairs = as_kind(merges, list[list[str]])
    lines = as_kind(merges, list[str]) if pairs is None else [" ".join(pair) for pair in pairs]
    if tokenizer.look_up("model.type") != "BPE" or entries is None or lines is None:
        raise ConversionError(f"{tokenizer.where} holds no BPE with vocab and merges, the one kind converted")
    return entries, lines


def _read_merges(path: Path) -> list[str] | None:
    """The lines of merges.txt. Only a first line `#version` is a comment: real merges begin with `#` too."""
    text = _read_text(path)
    if text is None:
        return None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines[lines[0].startswith("#version") :] if line]


def _read_text(path: Path) -> str | None:
    data = read_whole(path)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not UTF-8 (byte {error.start}): fetch it again") from None


def _check_merges(merges: Iterable[str], ids: Mapping[str, int]) -> None:
    for n, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise ConversionError(f"merge {n} ({quote(merge)}) does not join two tokens of the vocabulary to a third")


def _read_added(directory: Path, settings: Document) -> dict[str, tuple[int, TokenType]]:
    """{text: (id, type)} from every file that lists added tokens; the files must agree."""
    added: dict[str, tuple[int, TokenType]] = {}
    for token, i, special in _list_added(directory, settings):
        if added.get(token, (i,))[0] != i:
            raise ConversionError(f"token {quote(token)} has two ids: {quote(added[token][0])} and {quote(i)}")
        if token not in added or special is not None:
            # Without a flag, the rule readers use for files without types: `<…>` is special.
            special = token.startswith("<") and token.endswith(">") if special is None else special
            added[token] = (i, TokenType.CONTROL if special else TokenType.USER_DEFINED)
    return added


def _list_added(directory: Path, settings: Document) -> Iterator[tuple[str, int, bool | None]]:
    """(text, id, whether it is special or None where the file does not say) of every entry of every file."""
    texts = read_document(directory / ADDED)
    for token, i in (texts.values if texts else {}).items():
        if type(i) is not int:
            raise ConversionError(f"{texts.where} lists added token {quote(token)} with id {quote(i)}: fetch it again")
        yield token, i, None
    tokenizer = read_document(directory / TOKENIZER)
    for n, entry in enumerate(tokenizer.get("added_tokens", list[dict], []) if tokenizer else []):
        fields = tokenizer.inside(entry, f"added token {n}")
        yield fields.require("content", str), fields.require("id", int), fields.get("special", bool, False)
    for key, entry in settings.get("added_tokens_decoder", dict, {}).items():
        if not isinstance(entry, dict) or not key.isdecimal() or len(key) > MAX_ID_DIGITS:
            raise ConversionError(f"{settings.where} lists {quote(entry)} as added token {quote(key)}: fetch it again")
        fields = settings.inside(entry, f"added token {key}")
        yield fields.require("content", str), int(key), fields.get("special", bool, False)


def _read_chat_template(directory: Path, settings: Document) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json (of several, `default`)."""
    text = _read_text(directory / "chat_template.jinja")
    if text is not None:
        return text
    template = settings.look_up("chat_template")
    for n, entry in enumerate(as_kind(template, list[dict]) or []):
        fields = settings.inside(entry, f"chat_template {n}")
        if fields.get("name", str) == "default":
            return fields.get("template", str)
    return as_kind(template, str)
