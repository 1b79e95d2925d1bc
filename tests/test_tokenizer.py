"""The tokenizer against llama.cpp's pairs for the real vocabulary, the official files and the libraries' trainers."""

from __future__ import annotations

import io
import subprocess
import sys
import unicodedata
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from auricle.engine.byte_pairs import _reduce, restore_merges
from auricle.engine.charsmap import is_sound
from auricle.engine.tokenizer import Tokenizer, TokenizerError
from support import SHARED, needs_shared
from vocabularies import CORPUS, SPECIALS, golden_metadata, qwen2_metadata, small_metadata, trained

PAIRS = SHARED / "data/tokenizer/ggml-vocab-qwen2.gguf"
# Unassigned characters stay out: two Unicode versions may normalise them differently.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=60)
PLAIN = TEXT.filter(lambda text: not any(token in text for token in (*SPECIALS, "<s>", "</s>", "<unk>")))
PUBLISHED_LACKS = ("tokenizer.ggml.pre", "tokenizer.ggml.token_type")


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def without(metadata: dict, *keys: str) -> dict:
    return {key: value for key, value in metadata.items() if key not in keys}


def as_published(metadata: dict) -> dict:
    """As the peer's converter leaves it: no types, no `pre`, and merges that begin with `#` taken for comments."""
    merges = [merge for merge in metadata["tokenizer.ggml.merges"] if not merge.startswith("#")]
    return without(metadata, *PUBLISHED_LACKS) | {"tokenizer.ggml.merges": merges}


@cache
def small() -> Tokenizer:
    return Tokenizer.from_metadata(small_metadata())


@cache
def qwen2() -> Tokenizer:
    return Tokenizer.from_metadata(qwen2_metadata())


@cache
def published_qwen2() -> Tokenizer:
    return Tokenizer.from_metadata(as_published(qwen2_metadata()))


def llama_cpp_pairs() -> list[tuple[str, list[int]]]:
    with open(f"{PAIRS}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    with open(f"{PAIRS}.out", encoding="utf-8") as file:
        ids = [[int(i) for i in line.split()] for line in file.read().split("\n")]
    assert len(texts) == len(ids) == 47
    return list(zip(texts, ids, strict=True))


@needs_shared
@pytest.mark.parametrize("tokenizer", [qwen2, published_qwen2])
def test_agrees_with_llama_cpp_on_the_real_vocabulary(tokenizer):
    for text, ids in llama_cpp_pairs():
        assert tokenizer().encode(text) == ids, text
        assert tokenizer().decode(ids) == nfc(text)


@needs_shared
@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_real_vocabulary_round_trips(text):
    assert qwen2().decode(qwen2().encode(text), skip_special=False) == nfc(text)


@needs_shared
def test_real_vocabulary_as_published_is_mended():
    hashes = "# one\n## two\n#### four\n# include <x>\n#define Y\n########" + "#" * 50
    assert published_qwen2().encode(hashes) == qwen2().encode(hashes)
    assert published_qwen2().special_ids == qwen2().special_ids == {151643, 151644, 151645}
    assert qwen2().id_of("<s>") not in qwen2().special_ids  # an ordinary BPE token of Qwen, written like a special one
    assert qwen2().id_of("[PAD151700]") is None
    assert qwen2().n_tokens == 151936


@needs_shared
@pytest.mark.parametrize("name", ["jfk", "jfk_3s", "late_loud"])
def test_decodes_the_golden_answers(name):
    with safe_open(SHARED / f"golden/a/{name}.safetensors", "np") as file:
        ids, text = file.get_tensor("generated_ids").tolist(), file.metadata()["generated_text"]
    assert Tokenizer.from_metadata(golden_metadata()).decode(ids) == text


@cache
def official() -> tuple[Tokenizer, object]:
    transformers = pytest.importorskip("transformers", reason="the oracle extra is not installed")
    folder = SHARED / "golden/a/checkpoint"
    return Tokenizer.from_metadata(golden_metadata()), transformers.Qwen2TokenizerFast.from_pretrained(folder)


# Without the think tokens: the library numbers added tokens without gaps, and the golden vocabulary has one there.
PARTS = [*SPECIALS[:3], "the audio", "'Ll", "\r\n", " \n ", "é", "e\u0301", "a1"]


@needs_shared
@given(st.one_of(PLAIN, st.lists(st.sampled_from(PARTS)).map("".join)))
@settings(max_examples=200, deadline=None)
def test_agrees_with_the_official_tokenizer(text):
    ours, theirs = official()
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@given(PLAIN)
@settings(deadline=None)
def test_small_vocabulary_agrees_with_its_trainer_and_round_trips(text):
    ids = small().encode(text)
    assert ids == trained().encode(text, add_special_tokens=False).ids
    assert small().decode(ids) == nfc(text)
    assert b"".join(map(small().token_bytes, ids)) == nfc(text).encode()


def test_special_tokens_in_a_text():
    start, end, think = map(small().id_of, ("<|im_start|>", "<|im_end|>", "<think>"))
    ids = small().encode("<|im_start|>user<|im_end|><think><|im_")
    assert [ids[0], ids.count(end), ids.count(think)] == [start, 1, 1]
    assert small().decode(ids, skip_special=False) == "<|im_start|>user<|im_end|><think><|im_"
    assert small().decode(ids) == "user<think><|im_"  # <think> is an added token, but not a control one
    assert small().special_ids == {small().id_of(token) for token in SPECIALS if "think" not in token}


@pytest.mark.parametrize("kind", [1, 4, 5])  # converters disagree on the type of a filler
def test_fillers_are_nothing(kind):
    metadata = small_metadata()
    metadata["tokenizer.ggml.token_type"][-8:] = [kind] * 8
    tokenizer, filler = Tokenizer.from_metadata(metadata), small().n_tokens - 1
    assert tokenizer.token_bytes(filler) == b""
    assert tokenizer.decode([filler, *tokenizer.encode("a"), filler], skip_special=False) == "a"
    assert tokenizer.id_of(f"[PAD{filler}]") is None
    assert tokenizer.decode(tokenizer.encode(f"[PAD{filler}]")) == f"[PAD{filler}]"


def test_special_tokens_without_types():
    for lost in (0, 1, 5):
        metadata = without(small_metadata(), *PUBLISHED_LACKS)
        del metadata["tokenizer.ggml.merges"][10 : 10 + lost]
        tokenizer = Tokenizer.from_metadata(metadata)
        assert tokenizer.special_ids == {small().id_of(token) for token in SPECIALS}, lost


@pytest.mark.parametrize("lost", [0, 2])
def test_last_bpe_token_is_no_special_one(lost):
    alphabet = trained().pre_tokenizer[1].alphabet()
    tokens = [*sorted(alphabet), "ab", "cd", "<!", "<!>", "<think>", "odd", "</think>", "[PAD263]"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "c d", "< !", "<! >"][lost:],
    }
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.special_ids == {260, 262}
    assert tokenizer.encode("<!><think>") == [259, 260]


def test_text_of_audio_slots_is_plain_text():
    metadata = small_metadata()
    slot = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"].append("<|AUDIO|>")
    metadata["tokenizer.ggml.token_type"].append(3)
    assert Tokenizer.from_metadata(metadata).encode("<|AUDIO|>") == [slot]
    metadata |= {"general.architecture": "moss_audio", "moss_audio.audio_token_id": slot}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("<|AUDIO|>") == small().encode("<|AUDIO|>") != [slot]
    assert tokenizer.decode([slot]) == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda merges: merges[::2],
        lambda merges: [],
        lambda merges: ["", "nospace", " ", "zz qq", "a  b", *merges],
        lambda merges: merges[::-1],
    ],
)
def test_damaged_merges_still_load_and_round_trip(damage):
    metadata = small_metadata()
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.merges": damage(metadata["tokenizer.ggml.merges"])})
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == nfc(text)


def test_few_lost_merges_are_restored():
    metadata = small_metadata()
    merges = metadata["tokenizer.ggml.merges"]
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.merges": merges[:3] + merges[4:40] + merges[41:]})
    for text in CORPUS:
        assert tokenizer.encode(text) == small().encode(text)


def test_without_the_merges_key():
    tokenizer = Tokenizer.from_metadata(without(small_metadata(), "tokenizer.ggml.merges"))
    assert tokenizer.encode("dog") == [tokenizer.id_of(letter) for letter in "dog"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model = 'bert': this program reads 'gpt2'"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model = 3: it must be a text"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer.ggml.pre = 'llama-bpe': this program knows qwen2"),
        ({"tokenizer.ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens = [1, 2]: it must be a list of texts"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens = 'abc': it must be a list of texts"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "there are 2 for 433 tokens"),
        ({"tokenizer.ggml.token_type": [9] * 433}, "each must be a whole number from 1 to 6"),
        ({"tokenizer.ggml.model": "llama"}, "lacks tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "tokenizer.ggml.model = ['gpt2']: it must be a text"),
        ({"tokenizer.ggml.pre": ["qwen2"]}, "tokenizer.ggml.pre = ['qwen2']: it must be a text"),
        ({"tokenizer.ggml.pre": np.array([1, 2])}, "tokenizer.ggml.pre = array([1, 2]): it must be a text"),
        ({"tokenizer.ggml.merges": "a b"}, "tokenizer.ggml.merges = 'a b': it must be a list of texts"),
        ({"tokenizer.ggml.merges": [["a", "b"]]}, "it must be a list of texts"),
        ({"tokenizer.ggml.token_type": "x"}, "tokenizer.ggml.token_type = 'x': it must be a list of numbers"),
        ({"tokenizer.ggml.token_type": ["x"] * 433}, "it must be a list of numbers"),
        ({"tokenizer.ggml.token_type": [1.5] * 433}, "each must be a whole number from 1 to 6"),
        ({"tokenizer.ggml.token_type": np.ones((433, 1))}, "it must be a list of numbers"),
        ({"general.architecture": [1]}, "general.architecture = [1]: it must be a text"),
        ({"general.architecture": "m", "m.audio_token_id": "7"}, "m.audio_token_id = '7': it must be a whole number"),
    ],
)
def test_unusable_metadata(change, message):
    assert len(small_metadata()["tokenizer.ggml.tokens"]) == 433
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_metadata(small_metadata() | change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class Counted(dict):
    """How often it was asked."""

    n_asked = 0

    def __contains__(self, key):
        self.n_asked += 1
        return super().__contains__(key)


@pytest.mark.parametrize("n", [1000, 4000])
def test_restoring_a_long_token_takes_about_as_many_steps_as_it_has_letters(n):
    ranks = Counted({("a", "b"): 0, ("ab", "ab"): 1, ("abab", "abab"): 2})
    assert "".join(_reduce("ab" * n, ranks)) == "ab" * n
    assert ranks.n_asked < 10 * n


@given(
    token=st.text("abc", max_size=30),
    pairs=st.lists(
        st.tuples(st.text("abc", min_size=1, max_size=3), st.text("abc", min_size=1, max_size=3)), max_size=12
    ),
)
def test_reducing_takes_the_lowest_rank_first(token, pairs):
    ranks = {pair: rank for rank, pair in enumerate(dict.fromkeys(pairs))}
    parts = list(token)
    while known := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
        at = min(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    assert _reduce(token, ranks) == parts


def test_a_lost_merge_of_letters_that_are_no_tokens_stays_lost():
    tokens = [*"abcdef", "ab", "xy", *(a + b for a in "abcdef" for b in "cdef")]
    index = {token: i for i, token in enumerate(tokens)}
    merges = [("a", "b"), *((a, b) for a in "abcdef" for b in "cdef")]
    assert restore_merges(merges, tokens, index, range(len(tokens))) == merges
    for known in ("x", "y"):
        assert restore_merges(merges, tokens, index | {known: 99}, range(len(tokens))) == merges
    both = index | {"x": 98, "y": 99}
    assert restore_merges(merges, tokens, both, range(len(tokens))) == [merges[0], ("x", "y"), *merges[1:]]


def test_special_tokens_without_end():
    """A pattern of a whole vocabulary would take minutes to make."""
    metadata = small_metadata()
    n = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<" + "x" * 98 + ">"] * 2622
    metadata["tokenizer.ggml.token_type"] += [3] * 2622
    with pytest.raises(TokenizerError, match="special tokens have 262,144 letters at most"):
        Tokenizer.from_metadata(metadata)
    metadata["tokenizer.ggml.token_type"][n + 100 :] = [1] * 2522
    Tokenizer.from_metadata(metadata)


def test_text_that_is_no_unicode():
    with pytest.raises(TokenizerError, match="at character 3"):
        small().encode("abc\udc80")


def test_byte_without_a_token():
    metadata = small_metadata()
    metadata["tokenizer.ggml.tokens"][small().id_of("Z")] = "[gone]"
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("dog")) == "dog"
    with pytest.raises(TokenizerError, match="byte 0x5a"):
        tokenizer.encode("Zoo")


@cache
def piece_trainer(space_prefix: bool) -> object:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=space_prefix,
        user_defined_symbols=["<|im_start|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def piece_metadata(space_prefix: bool) -> dict:
    theirs = piece_trainer(space_prefix)
    ids = range(theirs.vocab_size())
    kinds = [(theirs.is_unknown, 2), (theirs.is_control, 3), (theirs.is_unused, 5), (theirs.is_byte, 6)]
    types = [next((kind for is_kind, kind in kinds if is_kind(i)), 1) for i in ids]
    types[theirs.piece_to_id("<|im_start|>")] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([theirs.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


@cache
def pieces(space_prefix: bool) -> Tokenizer:
    return Tokenizer.from_metadata(piece_metadata(space_prefix))


# SentencePiece reads its own mark of a space as a space.
PIECE_TEXT = st.one_of(PLAIN, st.sampled_from(CORPUS)).map(lambda text: text.replace("▁", ""))


@pytest.mark.parametrize("space_prefix", [True, False])
@given(text=PIECE_TEXT)
@settings(deadline=None)
def test_sentencepiece_agrees_with_its_trainer_and_round_trips(space_prefix, text):
    ids = pieces(space_prefix).encode(text)
    assert ids == piece_trainer(space_prefix).encode(text)
    assert pieces(space_prefix).decode(ids) == text


def test_sentencepiece_special_tokens():
    tokenizer = pieces(True)
    assert tokenizer.special_ids == {0, 1, 2}
    ids = tokenizer.encode("<s>The dog</s><|im_start|>")
    assert [ids[0], *ids[-2:]] == [1, 2, tokenizer.id_of("<|im_start|>")]
    assert tokenizer.decode(ids) == "The dog<|im_start|>"
    assert Tokenizer.from_metadata(without(piece_metadata(True), "tokenizer.ggml.token_type")).special_ids == {0, 1, 2}


def test_sentencepiece_with_repeated_and_empty_tokens():
    metadata = piece_metadata(True)
    for key, more in (("tokens", ["", "▁", "[PAD402]"]), ("scores", [0.0] * 3), ("token_type", [1, 1, 5])):
        metadata[f"tokenizer.ggml.{key}"] = np.append(metadata[f"tokenizer.ggml.{key}"], more).tolist()
    assert Tokenizer.from_metadata(metadata).encode(CORPUS[0]) == piece_trainer(True).encode(CORPUS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": "high"}, "scores = 'high': it must be a list of numbers"),
        ({"scores": ["a"] * 400}, "it must be a list of numbers"),
        ({"scores": [0.0]}, "there are 1 for 400 tokens"),
        ({"scores": [float("nan")] * 400}, "each must be a finite float32"),
        ({"scores": [1e39] * 400}, "each must be a finite float32"),
        ({"add_space_prefix": "yes"}, "add_space_prefix = 'yes': it must be true or false"),
        ({"add_space_prefix": [True]}, "it must be true or false"),
        ({"precompiled_charsmap": "abc"}, "precompiled_charsmap = 'abc': it must be a list of numbers"),
        ({"precompiled_charsmap": [256]}, "each must be a byte"),
        ({"precompiled_charsmap": [-1]}, "each must be a byte"),
        ({"precompiled_charsmap": [0.5]}, "each must be a byte"),
        ({"precompiled_charsmap": [1, 2, 3]}, "it is damaged"),
        ({"token_type": [7] * 400}, "each must be a whole number from 1 to 6"),
    ],
)
def test_unusable_metadata_of_sentencepiece(change, message):
    metadata = piece_metadata(True) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_metadata(metadata)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def trie(*units: int, texts: bytes = b"a\0") -> bytes:
    raw = np.array(units, "<u4").tobytes()
    return len(raw).to_bytes(4, "little") + raw + texts


ROOM = [0] * 255


@pytest.mark.parametrize(
    ("raw", "sound"),
    [
        (trie(0, *ROOM), True),
        (trie(1 << 10, *ROOM), True),
        (trie(256 << 10, *ROOM), False),
        (trie(0), False),
        (trie(1 << 31, *ROOM), True),
        (trie(1 << 31 | 1, *ROOM), True),
        (trie(1 << 31 | 2, *ROOM), False),
        (trie(0, *ROOM, texts=b"a"), False),
        (trie(0, *ROOM, texts=b""), False),
        (trie(), False),
        (trie(0, *ROOM)[:40], False),
        (b"", False),
    ],
)
def test_a_map_of_characters_must_not_lead_out_of_itself(raw, sound):
    assert is_sound(raw) is sound


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf"])
def test_the_maps_of_sentencepiece_are_sound_and_normalise_as_it_does(rule):
    import sentencepiece

    theirs = sentencepiece.SentencePieceNormalizer(rule_name=rule)
    model = theirs.serialized_model_proto()
    start = model.index(b"\x12", model.index(rule.encode()))  # field 2 of the normaliser, after its name
    length = shift = 0
    for at in range(start + 1, start + 6):
        length |= (model[at] & 0x7F) << shift
        shift += 7
        if model[at] < 0x80:
            break
    raw = model[at + 1 : at + 1 + length]
    assert is_sound(raw)
    metadata = piece_metadata(False) | {"tokenizer.ggml.precompiled_charsmap": list(raw)}
    tokenizer, plain = Tokenizer.from_metadata(metadata), pieces(False)
    normal = theirs.normalize("ＡＢＣ ①").removeprefix("▁").replace("▁", " ")
    assert tokenizer.encode("ＡＢＣ ①") == plain.encode(normal)


def test_sentencepiece_refuses_a_model_that_lacks_a_byte():
    metadata = piece_metadata(True)
    metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("<0x41>")] = 1
    with pytest.raises(TokenizerError, match="sentencepiece refuses"):
        Tokenizer.from_metadata(metadata).encode("a")


def test_import_loads_no_tokenizer_library():
    code = "import sys, auricle.engine.tokenizer; print({'tokenizers', 'sentencepiece', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
