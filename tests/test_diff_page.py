"""The page of a diff: what it says, that it holds nothing dangerous and needs no network, and how large it gets."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.tools.cli.main import run  # noqa: F401  (registers the commands)
from auricle.tools.diff import page
from auricle.tools.diff.figures import figures, show, where
from auricle.tools.sample import SampleShape, write_checkpoint
from sounds import encode, synthetic
from support import diff_command

LIMIT_BYTES = 2_000_000
ENCODER_OPS = ("attn_norm", "attn.q", "attn.k", "attn.v", ":window_attention", "attn.o", ":add", "ffn_norm", "ffn.fc1")
ENCODER_OPS += (":gelu", "ffn.fc2")
DECODER_OPS = ("attn_norm", "attn.q", "attn.k", "attn.v", "attn.q_norm", "attn.k_norm", ":rope", ":rope.1")
DECODER_OPS += (":kv_attention", "attn.o", ":add", "ffn_norm", "ffn.gate", "ffn.up", ":silu", ":mul", "ffn.down")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{data}}\x00\x1b[31m\u202e\u2066gnp\ud800"


# Documents.


def stage(name: str, n_rows: int, rng: np.random.Generator, kind: str = "stage", **changes: Any) -> dict[str, Any]:
    """A compared value as `report.document` has it, with as many bins and as long numbers as a real one."""
    n_bins = min(200, n_rows)
    errors = rng.uniform(1e-3, 1e-2, n_bins)
    result = {
        "name": name,
        "kind": kind,
        "shape": [n_rows, 2560],
        "reference_shape": [n_rows, 2560],
        "rows": "all",
        "given": ["llm.blk.0"],
        "ops": ["rms_norm", "linear", "linear"],
        "types": {f"{name}.weight": "Q4_K / F16", f"{name}.bias": "F32"},
        "metrics": {"cos_min": 0.9991, "cos_p1": 0.9992, "cos_mean": 0.99995, "nmse": 4.1e-5, "error_max": 0.0099},
        "positions": {
            "n_rows": n_rows,
            "starts": np.linspace(0, n_rows, n_bins, endpoint=False).astype(int).tolist(),
            "cos_min": (1 - errors**2).tolist(),
            "error_max": errors.tolist(),
            "worst_rows": [{"row": int(i), "cos": 0.99912345, "error": 0.00991234} for i in range(min(5, n_rows))],
            "worst_column": 3,
        },
        "limits": {"nmse": 1e-3, "cos_min": 0.99},
        "failures": [],
        "bad_rows": {},
        "passed": True,
    }
    result["metrics"] |= {"error_p99": 0.009, "max_abs": 0.31, "max_relative": 0.2, "norm_ratio": 0.99987654}
    return result | changes


def full_shape(n_audio: int = 800, n_prompt: int = 1000, n_new: int = 64) -> dict[str, Any]:
    """A bisection of a model of the 4B shape, every value of it compared."""
    rng = np.random.default_rng(0)
    windows = [50] * (n_audio // 50)
    encoder = ["enc.stem_proj", *(f"enc.blk.{n}" for n in range(32)), "enc.out", "adapter"]
    encoder += [f"{kind}.{k}" for k in range(3) for kind in ("enc.tap", "deepstack")]
    decoder = [
        "llm.embed",
        *(f"llm.{kind}.{n}" for n in range(36) for kind in ("blk", "inject") if n < 3 or kind == "blk"),
    ]
    decoder += ["llm.final_norm", "logits"]
    stages = [
        stage("mel", 8 * n_audio, rng),
        stage("input_ids", n_prompt, rng, metrics={"mismatches": 0.0}, positions={}),
    ]
    stages += [stage(name, n_audio, rng) for name in encoder] + [stage(name, n_prompt, rng) for name in decoder]
    stages.append(stage("decode.logits", n_new, rng, "tokens"))
    logits = next(s for s in stages if s["name"] == "logits")
    logits["positions"]["kl_max"] = logits["positions"]["error_max"]
    logits["metrics"] |= {"kl_mean": 0.01, "kl_p99": 0.02, "kl_max": 0.03, "top1": 0.9, "top5": 0.95}
    inside = [f"enc.blk.{n}{'' if op[0] == ':' else '.'}{op}" for n in range(32) for op in ENCODER_OPS]
    inside += [f"llm.blk.{n}{'' if op[0] == ':' else '.'}{op}" for n in range(36) for op in DECODER_OPS]
    ids = rng.integers(0, 150_000, n_new).tolist()
    stream = {"ids": ids, "pieces": [" token"] * n_new, "text": " token" * n_new}
    return {
        "format": "auricle.diff",
        "version": 1,
        "verdict": passing(),
        "meta": {
            "mode": "bisect",
            "model": {
                "path": "models/q4.gguf",
                "name": "MOSS-Audio-4B",
                "backend": "cpu",
                "kv_type": "f32",
                "types": {"encoder": {"Q8_0": 195, "F32": 292}, "decoder": {"Q4_K": 216, "Q6_K": 36, "F32": 145}},
                "encoder_layers": 32,
                "decoder_layers": 36,
                "taps": [8, 16, 24],
                "n_inject": 3,
            },
            "reference": {"kind": "model", "path": "f16.gguf", "backend": "reference", "kv_type": "f32"},
            "prompt": "Transcribe the audio.",
            "clips": [n_audio * 0.08],
            "windows": windows,
            "window_clips": [0] * len(windows),
            "token_seconds": 0.08,
            "n_tokens": n_prompt,
            "audio_spans": [[17, 17 + n_audio]],
            "text_tokens": [[i, f" word{i}"] for i in (*range(17), *range(17 + n_audio, n_prompt))],
            "missing": [],
        },
        "stages": stages,
        "ops": [stage(name, n_prompt, rng, "op") for name in inside],
        "tensors": [tensor(f"llm.blk.{n}.attn.q.weight") for n in range(901)],
        "tokens": {
            "reference": stream,
            "own": copy.deepcopy(stream),
            "forced": copy.deepcopy(stream),
            "passed": True,
            "first_mismatch": None,
            "margin": 0.0,
            "forced_agreement": 1.0,
            "p_reference": [0.123456789] * n_new,
            "margins": [0.0] * n_new,
            "limits": {"margin": 0.5},
            "failures": [],
        },
    }


def passing() -> dict[str, Any]:
    verdict = {"passed": True, "stage": None, "op": None, "tensor": None, "ops": [], "given": [], "evidence": []}
    return verdict | {"summary": "agrees: all limits hold"}


def tensor(name: str, **changes: Any) -> dict[str, Any]:
    result = {"name": name, "type": "Q4_K", "reference_type": "F16", "nbytes": 3_686_400, "error": 0.0641234567}
    result |= {
        "worst": 0.1312345678,
        "worst_at": [1234, 2304],
        "limits": {"error": 0.128, "worst": 0.32},
        "failures": [],
    }
    return result | changes


def small(**changes: Any) -> dict[str, Any]:
    """A few stages, and no values inside them."""
    document = full_shape(100, 130, 4)
    return document | {"stages": document["stages"][:6] + document["stages"][-4:], "ops": [], "tensors": []} | changes


def failing() -> dict[str, Any]:
    """A stage beyond its limits, one of another shape, one that is not finite, and a token that differs."""
    document = small()
    wrong, shape, nan = document["stages"][3:6]
    wrong |= {"passed": False, "failures": ["nmse 0.5 > 0.001"]}
    wrong["metrics"] |= {"nmse": 0.5, "cos_min": -0.25, "error_max": None}
    wrong["positions"]["error_max"][0] = None
    shape |= {
        "passed": False,
        "failures": ["shape [4, 3] here, [5, 3] in the reference"],
        "metrics": {},
        "positions": {},
    }
    nan |= {"passed": False, "failures": ["this side has values that are not finite"], "metrics": {}, "positions": {}}
    tokens = document["tokens"]
    tokens |= {"passed": False, "first_mismatch": 2, "margin": 3.25, "failures": ["token 2 is 7, 9 in the reference"]}
    tokens["own"]["ids"][2:] = [7, 7]
    document["verdict"] = {
        "passed": False,
        "stage": "enc.blk.0",
        "op": "enc.blk.0.attn.q",
        "tensor": "enc.blk.0.attn.q.weight",
        "ops": ["linear"],
        "given": ["enc.blk.0.attn_norm"],
        "evidence": ["tensor enc.blk.0.attn.q.weight is not what the reference has", "nmse 0.5 > 0.001"],
        "summary": "differs first at enc.blk.0.attn.q in enc.blk.0",
    }
    return document


class Reader(HTMLParser):
    """What a browser would see: elements with attributes, and text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(tag)
            self.scripts.append((dict(attrs), "")) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
        elif not self.inside:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        (source,) = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return json.loads(source, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def read(document: dict[str, Any]) -> Reader:
    return Reader(page.render(document))


# What it says.


def test_a_pass_says_so_without_scripts() -> None:
    text = read(small()).text
    assert "Agrees q4.gguf on cpu beside f16.gguf on reference. Every limit holds" in text
    assert "10 of 10" in text
    assert "All 4 greedy tokens are the same." in text
    assert "✕" not in text
    assert "llm.final_norm" in text, "the table is text"


def test_a_failure_is_named_first() -> None:
    reader = read(failing())
    text = reader.text
    assert text.index("Differs, first at enc.blk.0.attn.q") < text.index("nmse 0.5 > 0.001") < text.index("What was")
    assert "The tensor enc.blk.0.attn.q.weight is damaged" in text
    assert "there this side’s own token exceeds the reference’s by 3.25 in logits (allowed: 0.5)" in text
    marked = [attrs for tag, attrs in reader.elements if attrs.get("aria-label") == "first mismatch"]
    assert [attrs["class"] for attrs in marked] == ["first"]
    rows = re.findall(r"<tr[ >].*?</tr>", page.render(failing()).split('class="data stages"')[1], re.DOTALL)[1:11]
    assert ["✕ fails" in row for row in rows] == [True] * 3 + [False] * 7
    assert "shape [4, 3] here, [5, 3] in the reference" in rows[1]


def test_what_failed_without_numbers_still_has_its_place() -> None:
    data = read(failing()).data
    depth = {point["label"]: point for point in data["depth"]["encoder"]}
    assert depth["1"]["bad"]
    assert depth["1"]["cos"] == [None, None, None]
    assert depth["1"]["note"] == "shape [4, 3] here, [5, 3] in the reference"
    heat = {row["label"]: row for row in data["heat"]["encoder"]["rows"]}
    assert "error" not in heat["1"]
    assert (heat["0"]["error"][0], heat["0"]["limit"]) == (None, pytest.approx(1e-3**0.5, rel=1e-3))


def test_charts_have_every_stage_in_its_place() -> None:
    data = read(full_shape()).data
    encoder, decoder = data["depth"]["encoder"], data["depth"]["decoder"]
    assert [p["label"] for p in encoder[:3]] == ["mel", "stem", "0"]
    assert [p["label"] for p in encoder[-8:]] == [
        "out",
        "adapter",
        *(f"{k} {n}" for n in range(3) for k in ("tap", "merger")),
    ]
    assert [p["label"] for p in encoder if p["mark"]] == ["8", "16", "24"]
    assert [p["label"] for p in decoder[:3]] == ["embed", "0", "inject 0"]
    assert [p["label"] for p in decoder[-3:]] == ["norm", "logits", "decoding"]
    assert [p["label"] for p in decoder if p["mark"]] == ["0", "1", "2"]
    assert encoder[2]["cos"] == pytest.approx([9e-4, 8e-4, 5e-5], rel=1e-3)
    assert encoder[2]["error"] == pytest.approx([0.0099, 0.009, 4.1e-5**0.5], rel=1e-3)
    assert (encoder[2]["cos_limit"], encoder[2]["error_limit"]) == pytest.approx((0.01, 1e-3**0.5), rel=1e-3)
    assert {p["label"] for p in data["inside"]["decoder"]} == {"", *map(str, range(36))}
    rows = data["heat"]["decoder"]["rows"]
    assert (rows[-1]["at"], rows[-1]["n"], data["heat"]["decoder"]["n"]) == (999, 64, 1063)
    mel = data["heat"]["encoder"]["rows"][0]
    assert mel["n"] * mel["scale"] == data["heat"]["encoder"]["n"] == 800
    assert [len(row["error"]) for row in rows[:-1]] == [200] * len(rows[:-1])
    assert len(data["grids"]) == 4, "mel, encoder, decoder, answer"


def test_rows_are_told_in_seconds_and_words() -> None:
    meta = small()["meta"] | {"windows": [50, 20, 30], "window_clips": [0, 0, 1], "audio_spans": [[17, 67], [68, 118]]}
    assert where("enc.blk.0", 49, meta) == "audio, clip 1, 3.92 s, window 1 of 3"
    assert where("enc.blk.0", 70, meta) == "audio, clip 2, 0.00 s, window 3 of 3"
    assert where("mel", 12, meta) == "audio, clip 1, 0.12 s"
    assert where("llm.blk.0", 67 + 21, meta) == "audio, clip 2, 0.00 s, window 3 of 3"
    assert where("llm.blk.0", 3, meta) == "prompt, “ word3”"
    assert where("decode.logits", 1, meta, ["a", "b"]) == "answer, token 1 “b”"


@pytest.mark.parametrize("mode", ["chain", "isolate"])
def test_without_audio_and_without_an_answer(mode: str) -> None:
    document = small(tokens=None)
    document["stages"] = [s for s in document["stages"] if s["name"] in ("input_ids", "llm.final_norm", "logits")]
    document["meta"] |= {"mode": mode, "clips": [], "windows": [], "window_clips": [], "audio_spans": []}
    reader = read(document)
    assert "audio none" in reader.text
    assert "Answers" not in reader.text
    assert reader.data["depth"]["encoder"] == reader.data["heat"]["encoder"]["rows"] == []


# What it must not do.


NAMED_BY_FILES = ("types", "metadata")  # dictionaries whose keys are names from files


def poison(value: Any, keys: bool = False) -> Any:
    """The same document with hostile text wherever there is text that a file or a user gave."""
    if isinstance(value, dict):
        return {
            key + HOSTILE * keys: v if key == "kind" else poison(v, keys or key in NAMED_BY_FILES)
            for key, v in value.items()
        }
    if isinstance(value, list):
        return [poison(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text() -> None:
    document = failing()
    document["meta"]["reference"]["metadata"] = {"source": "x"}
    document["meta"]["model"]["types"] = {"encoder": {"Q8_0": 1}}
    document["ops"] = [stage("enc.blk.0.attn.q", 100, np.random.default_rng(0), "op")]
    document["tensors"] = [tensor("a.weight", failures=["worst 1 > 0"])]
    clean, text = Reader(page.render(document)), page.render(poison(document))
    dirty = Reader(text)
    assert {tag for tag, _ in dirty.elements} <= {tag for tag, _ in clean.elements} - {"img"}
    assert {name for _, attrs in dirty.elements for name in attrs} <= {
        name for _, attrs in clean.elements for name in attrs
    }
    assert [source for _, source in dirty.scripts][1:] == [source for _, source in clean.scripts][1:]
    assert len(dirty.scripts) == 2
    assert "alert(1)" in dirty.text
    assert "{{data}}" in dirty.text, "what is put into the template is not read as one"
    unseen = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co")} - {"\n"}
    assert not unseen
    text.encode("utf-8")


def test_what_is_shown_can_be_seen() -> None:
    assert show("a\n\x00\u202eb\ud800\ufeff") == "a\\n\\u0000\\u202eb\\ud800\\ufeff"
    assert show("é 日本 שלום \u200d") == "é 日本 שלום \u200d"
    assert show("x" * 4000) == "x" * 4000
    assert re.fullmatch(r"x+ … \(10,000 characters\) … x+", show("x" * 10_000))


def test_the_page_asks_for_nothing() -> None:
    text = page.render(full_shape())
    reader = Reader(text)
    for tag, attributes in reader.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img", "video", "audio")
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src") is None
        assert attributes.get("href") in (None, "data:,")
    assert "@import" not in text
    assert "url(" not in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    (policy,) = [a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 1
    assert not re.search(r"fetch|XMLHttp|innerHTML|eval\(|document\.write", reader.scripts[-1][1])


def test_a_page_of_the_4b_shape_is_small() -> None:
    text = page.render(full_shape())
    n_bytes = len(text.encode())
    assert n_bytes < LIMIT_BYTES, f"{n_bytes:,}"
    assert text.count("<tr") > 1900, "all values and tensors are in it"


# The command.

SHAPE = SampleShape(
    n_window=20,
    taps=(0, 2),
    n_inject=2,
    enc_n_layer=3,
    enc_d_model=64,
    enc_d_out=48,
    enc_d_ff=96,
    d_adapter=64,
    d_model=96,
    n_layer=3,
    d_head=64,
    d_ff=128,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("page")
    paths = {name: folder / name for name in ("checkpoint", "f32.gguf", "q8_0.gguf", "a.wav")}
    write_checkpoint(paths["checkpoint"], SHAPE, seed=2)
    for name in ("f32", "q8_0"):
        convert(plan_conversion(paths["checkpoint"], name), paths[f"{name}.gguf"])
    paths["a.wav"].write_bytes(encode(synthetic(1.3, 16_000), 16_000, "wav"))
    return paths


@pytest.mark.parametrize("mode", [[], ["--isolate"], ["--bisect"]])
def test_the_command_writes_it(files: dict[str, Path], tmp_path: Path, mode: list[str]) -> None:
    """A page and a document of one run tell the same."""
    out = tmp_path / "report.html"
    both = [files["q8_0.gguf"], files["a.wav"], "--against", files["f32.gguf"], "--tokens", 3]
    status, text = diff_command(*both, "--threshold", "llm.blk.1=0.99999999", "--json", "--html", out, *mode)
    assert status == 7, text
    document, reader = json.loads(text), Reader(out.read_text(encoding="utf-8"))
    assert "Differs, first at llm.blk.1" in reader.text
    points = reader.data["depth"]["encoder"] + reader.data["depth"]["decoder"]
    assert [p["name"] for p in points if p["bad"]] == [s["name"] for s in document["stages"] if not s["passed"]]
    assert {p["name"] for p in points} == {s["name"] for s in document["stages"]} - {"input_ids"}
    assert reader.data == json.loads(json.dumps(figures(document)))
    assert reader.data["text"]["0"] == show(document["meta"]["text_tokens"][0][1])
    assert ("Values inside stages" in reader.text) == ("--bisect" in mode)


def test_the_command_looks_at_the_path_first(files: dict[str, Path]) -> None:
    both = [files["q8_0.gguf"], files["a.wav"], "--against", files["f32.gguf"]]
    status, text = diff_command(*both, "--html", files["q8_0.gguf"])
    assert status == 8
    assert "is an input itself" in text
