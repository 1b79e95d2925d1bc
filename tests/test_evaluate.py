"""Measures of answers against a second hand, and `auricle evaluate` from data to table."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import soundfile

pytest.importorskip("jiwer", reason="needs jiwer (the extra evaluate)")

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.engine.segments import Segment, parse_segments
from auricle.tools.evaluate.measures import Answer, EvaluationError, Scores, boundary_shifts, percentile, score
from auricle.tools.evaluate.text import Spelling
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint
from sounds import synthetic
from test_cli_conversion import auricle, fail

PLAIN = Spelling()


# Spelling.


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Hello,  World!\n", "hello world"),
        ("[0.00]hello there[2.01][2.01]the weather[4.32]", "hello there the weather"),
        ("[1.5][S01]Yes. [S02]No[2.345]", "yes no"),
        ("don't re-do 'that' -- it’s 5 %", "don't re-do that it’s 5"),
        ("[note] a[1] [12345678.00]", "note a 1 12345678 00"),
        ("ＡＢＣ　１２", "abc 12"),
        ("«Élan» ¿qué?", "élan qué"),
        ("转写，这段。", "转写 这段"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert PLAIN.clean(text) == cleaned
    assert PLAIN.clean(cleaned) == cleaned


def test_spelling_can_be_kept() -> None:
    assert Spelling(lower=False).clean("Hello, World!") == "Hello World"
    assert Spelling(punctuation=True).clean("Hello,  World! [1.00]") == "hello, world!"
    assert "case counts" in Spelling(lower=False).describe()


# Rates.


def distance(a: list[str] | str, b: list[str] | str) -> int:
    """Levenshtein's, over a table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_rates_by_a_second_hand() -> None:
    """Edits are summed over all answers, empty ones among them, and divided once."""
    rng = random.Random(0)
    words = ["zero", "one", "two", "three", "four"]
    pairs = [(" ".join(rng.choices(words, k=rng.randint(0, 9))), " ".join(rng.choices(words, k=rng.randint(0, 9))))
             for _ in range(60)]  # fmt: skip
    found = score([Answer(*pair) for pair in pairs])
    n_words, n_letters = sum(len(r.split()) for r, _ in pairs), sum(len(r) for r, _ in pairs)
    assert found.n_words == n_words
    assert found.wer == pytest.approx(sum(distance(r.split(), h.split()) for r, h in pairs) / n_words)
    assert found.cer == pytest.approx(sum(distance(r, h) for r, h in pairs) / n_letters)
    assert found.exact == sum(r == h for r, h in pairs) / len(pairs)
    assert found.substitutions + found.deletions + found.insertions == round(found.wer * n_words)
    assert (found.n_boundaries, found.matched, found.aas_ms, found.p95_ms, found.near) == (0, None, None, None, None)


def test_nothing_to_divide_by() -> None:
    silent = score([Answer("", "uh"), Answer("...", "")])
    assert (silent.wer, silent.cer, silent.insertions, silent.exact) == (None, None, 1, 0.5)
    with pytest.raises(EvaluationError, match="no answers"):
        score([])


def test_percentile() -> None:
    assert percentile([], 95) is None
    assert percentile([3.0], 95) == 3.0
    assert percentile(list(range(100, 0, -1)), 95) == 95
    assert percentile(list(range(1, 22)), 95) == 20


# Times.


def timed(reference: str, hypothesis: str, seconds: float = 100.0) -> Answer:
    return Answer(reference, hypothesis, parse_segments(reference, seconds), parse_segments(hypothesis, seconds))


def test_times_of_words() -> None:
    """By hand: 50, 100, 0 and 200 ms; a wrong word and one that was left out have none."""
    answer = timed("[1.00]one[1.50][2.00]two[2.50][3.00]six[3.40][4.00]four[4.20]",
                   "[1.05]One,[1.40][2.00]two[2.70][3.00]seven[3.40]")  # fmt: skip
    assert boundary_shifts(answer, PLAIN) == [50, 100, 0, 200]
    found = score([answer, timed("[0.00]five[0.10]", "five")])
    assert found.n_boundaries == 10
    assert found.matched == 0.4
    assert found.aas_ms == pytest.approx(87.5)
    assert found.p95_ms == 200
    assert found.near == 0.75
    assert found.wer == pytest.approx(2 / 5)


def test_times_of_sentences() -> None:
    """A start belongs to the first word and an end to the last, so sentences cut elsewhere share what they share."""
    answer = timed("[0.00]hello there[2.00][2.50]the weather is nice[4.00]",
                   "[0.10]hello there the weather[3.00][3.10]is nice[4.20]")  # fmt: skip
    assert boundary_shifts(answer, PLAIN) == [100, 200]


def test_the_limit_counts_as_near() -> None:
    shifts = boundary_shifts(timed("[0.15]one[1.00]", "[0.30]one[1.15]"), PLAIN)
    assert shifts == [150, 150]
    assert score([timed("[0.15]one[1.00]", "[0.30]one[1.16]")]).near == 0.5


def test_texts_without_words_have_no_times() -> None:
    silent = Segment(0.0, 1.0, "?!")
    assert boundary_shifts(Answer("", "", (silent,), (Segment(0, 1, "one"),)), PLAIN) == []
    assert score([Answer("a", "a", (silent,), ())]).n_boundaries == 0


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, two clips, and data whose answers are what the model says."""
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoint = copy_checkpoint(folder / "checkpoint", SampleShape(n_layer=2, enc_n_layer=3, n_inject=2))
    convert(plan_conversion(checkpoint, "f32"), folder / "model.gguf")
    lines = []
    with load(folder / "model.gguf", n_ctx=300) as model:
        for n, prompt in enumerate(("Transcribe the audio.", "What?\nHow?")):
            soundfile.write(folder / f"{n}.wav", synthetic(1.5 + n, 16_000, seed=n), 16_000)
            answer = model.generate(prompt, folder / f"{n}.wav", max_new_tokens=24).text
            texts = [{"role": "user", "message_type": "text", "content": part} for part in prompt.split("\n")]
            audio = {"role": "user", "message_type": "audio", "content": f"{n}.wav"}
            lines.append([audio, *texts, {"role": "assistant", "message_type": "text", "content": answer}])
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"conversation": line}) for line in lines))
    return folder


def evaluate(folder: Path, data: Path, *options: object) -> tuple[object, ...]:
    return ("evaluate", data, "-m", folder / "model.gguf", "--ctx", 300, "--max-new-tokens", 24, *options)


def cut_off(*arguments: object) -> str:
    """What a command prints on stdout that says that answers were cut off."""
    done = auricle(*arguments)
    assert done.returncode == 9, done.stderr
    assert re.search(r"\d of \d answers were cut off; see --max-new-tokens", done.stderr)
    return done.stdout


def test_a_model_that_is_always_right(folder: Path) -> None:
    facts = json.loads(cut_off(*evaluate(folder, folder / "data.jsonl", "--json")))
    assert facts["scores"].keys() == Scores.__dataclass_fields__.keys()
    assert facts["scores"]["exact"] == 1
    assert not facts["scores"]["wer"]
    assert [row["prompt"] for row in facts["rows"]] == ["Transcribe the audio.", "What?\nHow?"]
    assert [row["audio_seconds"] for row in facts["rows"]] == [1.5, 2.5]
    assert all(row["reference"] == row["hypothesis"] for row in facts["rows"])
    assert facts["cut_off"] == sum(row["finish_reason"] == "length" for row in facts["rows"])


def test_a_model_that_is_not(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for line in lines:
        line["conversation"][0]["content"] = str(folder / line["conversation"][0]["content"])
        line["conversation"][-1]["content"] = "[0.10]one[0.50][0.60]two[0.90]"
    more = {"role": "user", "message_type": "text", "content": "And?"}
    lines[1]["conversation"] += [more, lines[1]["conversation"][-1]]
    data.write_text("\n".join(map(json.dumps, lines)))
    said = cut_off(*evaluate(folder, data))
    assert "boundaries of words" in said
    assert "1 later exchanges were not asked" in said
    assert "no punctuation" in said
    facts = json.loads(cut_off(*evaluate(folder, data, "--json", "--limit", 1, "--keep-case")))
    assert len(facts["rows"]) == 1
    assert facts["scores"]["n_words"] == 2
    assert facts["scores"]["wer"] >= 1
    assert facts["scores"]["matched"] == 0
    assert facts["spelling"] == {"lower": False, "punctuation": False}


def test_data_that_cannot_be_asked(folder: Path, tmp_path: Path) -> None:
    audio = {"role": "user", "message_type": "audio", "content": str(tmp_path / "absent.wav")}
    text = {"role": "user", "message_type": "text", "content": "What?"}
    answer = {"role": "assistant", "message_type": "text", "content": "one"}
    data = tmp_path / "data.jsonl"
    for status, message, turns in (
        (4, "data.jsonl, line 1: .*absent.wav", [audio, text, answer]),
        (2, "line 1: no question of the user", [audio, answer]),
        (2, "line 1: a system message", [text | {"role": "system"}, text, answer]),
    ):
        data.write_text(json.dumps({"conversation": turns}))
        fail(status, message, *evaluate(folder, data))
    fail(2, "absent.jsonl cannot be read", *evaluate(folder, tmp_path / "absent.jsonl"))


def test_without_jiwer(folder: Path) -> None:
    with patch.dict(sys.modules, {"jiwer": None}):
        done = auricle(*evaluate(folder, folder / "data.jsonl"))
    assert done.returncode == 2
    assert "pip install 'auricle[evaluate]'" in done.stderr
