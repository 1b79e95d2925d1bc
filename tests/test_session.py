"""The Python library as a caller meets it: streams, turns, options, and files that open but cannot be run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import AuricleError, GenerateOptions, Model, load
from auricle.engine.gguf import Typed, boolean, f32, i32, open_gguf, string, strings, u32
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.prompts import PromptError
from auricle.engine.turns import Turn, TurnError
from auricle.tools.cli.main import run
from auricle.tools.sample import SampleShape, write_checkpoint
from sounds import JFK, synthetic

SOUND = synthetic(1.2, 16_000)
SHAPE = SampleShape(n_layer=2, enc_n_layer=3, taps=(0, 1), n_inject=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    write_checkpoint(folder / "checkpoint", SHAPE)
    convert(plan_conversion(folder / "checkpoint", "f32"), folder / "model.gguf")
    return folder / "model.gguf"


@pytest.fixture
def model(path: Path):
    with load(path, n_ctx=400, poison=True) as model:
        yield model


def test_the_pieces_are_the_text(model: Model) -> None:
    stream = model.stream("What?", SOUND, max_new_tokens=20, temperature=1.0, seed=3)
    assert "".join(stream) == stream.result.text
    again = model.generate("What?", SOUND, max_new_tokens=20, temperature=1.0, seed=3)
    assert again.token_ids == stream.result.token_ids


def test_every_kind_of_source_gives_the_same(model: Model) -> None:
    sources = [JFK, str(JFK), JFK.read_bytes(), JFK.open("rb"), [JFK]]
    results = [model.generate(audio=source, max_new_tokens=4) for source in sources]
    assert len({r.token_ids for r in results}) == 1
    assert {r.audio_seconds for r in results} == {11.0}


def test_the_newest_answer_of_a_thread_has_the_turn(model: Model) -> None:
    want = model.generate("What?", SOUND, max_new_tokens=10).token_ids
    first, second = model.stream(audio=JFK, max_new_tokens=10), model.stream("What?", SOUND, max_new_tokens=10)
    next(first)
    next(second)
    with pytest.raises(TurnError, match="this answer is over"):
        next(first)
    list(second)
    assert second.result.token_ids == want
    with pytest.raises(TurnError, match="no result"):
        _ = first.result


def test_streams_wait_for_nothing_until_they_are_read(model: Model) -> None:
    streams = [model.stream("What?", SOUND, max_new_tokens=10) for _ in range(2)]
    assert len({"".join(stream) for stream in streams}) == 1
    assert streams[0].result.token_ids == streams[1].result.token_ids


def test_an_abandoned_stream_and_a_closed_model(path: Path) -> None:
    model = load(path, n_ctx=200)
    abandoned = model.stream("What?", max_new_tokens=50)
    next(iter(abandoned))
    assert model.generate("What?", max_new_tokens=3).finish_reason in ("length", "stop")
    model.close()
    with pytest.raises(TurnError, match="this answer is over"):
        list(abandoned)
    with pytest.raises(TurnError, match="the model is closed"):
        model.generate("What?")


def test_a_stop_string_ends_the_answer(model: Model) -> None:
    whole = model.generate("What?", SOUND, max_new_tokens=30)
    cut = whole.text[4:6]
    stopped = model.generate("What?", SOUND, max_new_tokens=30, stop=cut)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(cut)]


def test_the_context_bounds_an_answer(path: Path) -> None:
    with load(path, n_ctx=400) as model:
        n_prompt = model.generate("What?", max_new_tokens=1).prompt_tokens
    with load(path, n_ctx=n_prompt + 2) as model:
        result = model.generate("What?", max_new_tokens=50)
        assert len(result.token_ids) <= 2
    with load(path, n_ctx=n_prompt) as model, pytest.raises(AuricleError, match=f"the context holds {n_prompt}"):
        model.generate("What?")


def test_a_think_block_is_split_off(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    think, end, im_end = (model.tokenizer.id_of(t) for t in ("<think>", "</think>", "<|im_end|>"))
    script = [think, *model.tokenizer.encode("hm"), end, *model.tokenizer.encode("\n\nyes"), im_end]

    def one_hot(step: int) -> np.ndarray:
        logits = np.zeros(model.tokenizer.n_tokens, np.float32)
        logits[script[step]] = 1
        return logits

    n_prompt = len(model.build_prompt("What?", model.listen(None)).ids)
    monkeypatch.setattr(model.runtime, "prefill", lambda *_: one_hot(0))
    monkeypatch.setattr(model.runtime, "decode", lambda token, position: one_hot(position - n_prompt + 1))
    result = model.generate("What?")
    assert (result.reasoning, result.text, result.finish_reason) == ("hm", "yes", "stop")


BAD_OPTIONS = [
    {"max_new_tokens": 0}, {"max_new_tokens": "5"}, {"max_new_tokens": True}, {"temperature": "hot"},
    {"temperature": -1}, {"temperature": math.nan}, {"top_k": 2.5}, {"top_p": 0}, {"min_p": 2},
    {"repetition_penalty": 0}, {"seed": -1},
    {"stop": [""]}, {"stop": [3]}, {"stop": 3}, {"time_markers": "no"}, {"beam": 4}, {"parse_special": "no"},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_options_out_of_range(model: Model, options: dict) -> None:
    with pytest.raises(AuricleError) as caught:
        model.stream("What?", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [None, b"What?", 5, ["What?"]], ids=str)
def test_a_prompt_is_a_text(model: Model, prompt: object) -> None:
    with pytest.raises(PromptError, match=f"of type {type(prompt).__name__}; it must be a text"):
        model.stream(prompt)
    with pytest.raises(PromptError, match="must be a text"):
        model.plan([1.0], prompt)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_ctx": 0},
        {"n_ctx": 2.5},
        {"n_ctx": True},
        {"threads": "2"},
        {"kv_type": ""},
        {"memory": "4GiB"},
        {"memory": 0},
    ],
)
def test_settings_out_of_range(path: Path, settings: dict) -> None:
    with pytest.raises(AuricleError):
        load(path, **settings)
    with pytest.raises(AuricleError, match="at most"):
        load(path, threads=100_000)


@pytest.mark.parametrize("clips", [[-5.0], [math.nan], [1e30]], ids=str)
def test_plans_of_impossible_clips(model: Model, clips: list[float]) -> None:
    with pytest.raises(AuricleError, match="it must be from"):
        model.plan(clips)
    with pytest.raises(AuricleError, match="max_new_tokens"):
        model.plan([], max_new_tokens=-5)


HOSTILE = {
    "moss_audio.audio_start_id": (u32(10**6), i32(-3)),
    "moss_audio.eos_token_id": (string("end"), u32(70_000)),
    "moss_audio.time_markers": (string("false"),),
    "moss_audio.enc.encoder_layers": (u32(3_000_000),),
    "moss_audio.enc.n_window": (u32(1 << 30),),
    "moss_audio.enc.downsample_rate": (u32(4),),
    "moss_audio.enc.layer_norm_eps": (f32(math.inf), f32(math.nan)),
    "moss_audio.llm.rope_theta": (f32(-1.0),),
    "moss_audio.llm.max_position_embeddings": (u32(4_000_000_000),),
    "tokenizer.ggml.model": (string("t5"),),
    "tokenizer.ggml.tokens": (strings(["a"]),),
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(k, v) for k, values in HOSTILE.items() for v in values],
    ids=lambda x: str(getattr(x, "value", x)),
)
def test_a_file_whose_keys_cannot_be_meant(path: Path, tmp_path: Path, key: str, value: Typed) -> None:
    rewrite(path, tmp_path / "bad.gguf", {key: value})
    with pytest.raises(AuricleError) as caught:
        load(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value)


def test_markers_off_in_the_file(path: Path, tmp_path: Path) -> None:
    rewrite(path, tmp_path / "off.gguf", {"moss_audio.time_markers": boolean(False)})
    with load(path) as with_markers, load(tmp_path / "off.gguf") as without:
        heard = without.listen(JFK)
        n_digits = len(with_markers.build_prompt("x", heard).ids) - len(without.build_prompt("x", heard).ids)
    assert n_digits == len("246810")


ASSUMED = {
    "moss_audio.enc.n_window": 200, "moss_audio.time_markers": True, "tokenizer.ggml.pre": "qwen2",
}  # fmt: skip


def test_what_a_file_does_not_say_is_named_once(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(path, tmp_path / "terse.gguf", dict.fromkeys(ASSUMED))
    for _ in range(2):
        with load(tmp_path / "terse.gguf") as model:
            assert model.assumed == ASSUMED
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path / 'terse.gguf'} does not say")
    assert all(f"{key} = {value}" in line for key, value in ASSUMED.items())
    rewrite(path, tmp_path / "window.gguf", {"moss_audio.enc.n_window": None})
    with load(tmp_path / "window.gguf") as model:
        assert model.assumed == {"moss_audio.enc.n_window": 200}
    with load(path) as model:
        assert model.assumed == {}


def test_assumptions_are_marked(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terse = tmp_path / "terse.gguf"
    rewrite(path, terse, dict.fromkeys(ASSUMED))
    pages = {}
    for command in (("inspect", terse), ("plan", "-m", terse, "--ctx", "300")):
        for form in ((), ("--json",)):
            with patch.object(sys, "argv", ["auricle", *map(str, command), *form]), pytest.raises(SystemExit) as end:
                run()
            assert not end.value.code
            pages[command[0], *form] = capsys.readouterr().out
    for command in ("inspect", "plan"):
        assert json.loads(pages[command, "--json"])["assumed"] == ASSUMED
        assert "moss_audio.enc.n_window" in pages[(command,)]
    assert "200 (assumed; the file does not say)" in pages[("inspect",)]
    assert "assumed: moss_audio.enc.n_window = 200, which the file does not say" in pages[("plan",)]


@pytest.mark.parametrize(("seconds", "limit"), [(0, 1024), (11, 1134), (600, 7024)])
def test_an_answer_may_be_longer_the_longer_the_audio(model: Model, seconds: float, limit: int) -> None:
    assert GenerateOptions().limit(seconds) == limit
    assert GenerateOptions(max_new_tokens=5).limit(seconds) == 5


def test_the_limit_is_what_a_stream_and_a_plan_take(path: Path) -> None:
    with load(path) as model:
        asked = []
        model.runtime.prefill = lambda prompt, rows, n_new, kind: (
            asked.append(n_new) or np.eye(1, 1024, 0, np.float32)[0]
        )
        model.runtime.steps = lambda *_: iter(())
        next(model.stream(audio=JFK), None)
        assert asked == [1024 + 110]
        plans = [model.plan([11.0], max_new_tokens=n).kv_cache for n in (None, 1134, 1135)]
        assert plans[0] == plans[1] < plans[2]


def test_the_first_step_comes_before_any_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compiled for it, and said about that, does not land inside the answer."""
    steps, decode = [], model.runtime.decode
    monkeypatch.setattr(model.runtime, "decode", lambda *a: steps.append(1) or decode(*a))
    counts = []
    for _ in range(2):
        steps.clear()
        tokens = model.stream("What?", SOUND, max_new_tokens=10)._pieces.gi_frame.f_locals["self"]
        turn = Turn()
        next(tokens._tokens(turn, tokens._read(turn)[0]))
        counts.append(len(steps))
        model.end(turn)
    assert counts == [1, 0]


def rewrite(source: Path, target: Path, changes: dict[str, Typed | None]) -> None:
    """Copies a file with other metadata; without the keys that become None."""
    with open_gguf(source) as file:
        types = {key: value for key, value in (file.types | changes).items() if value is not None}
        layout = plan_layout(types, [(t.name, t.shape, t.format) for t in file.tensors.values()])
        with GGUFWriter(target, layout) as writer:
            for name in file.tensors:
                writer.write(name, file.data(name))
