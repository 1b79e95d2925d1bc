"""The engine against a second, independent model: random small shapes against PyTorch parts of transformers.

Nothing here needs the shared material: the checkpoints, prompts and sounds are made up.
"""

from __future__ import annotations

import tracemalloc
from functools import cache

import numpy as np
import pytest

from auricle.engine import AuricleError, load
from auricle.engine.gguf import Typed, boolean, f32, i32, i32s, open_gguf, string, u32
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.models.config import ModelError
from auricle.engine.models.moss_audio import MAX_WINDOW, read_moss_audio
from auricle.kernels.formats import F16
from auricle.tools.sample import SampleShape
from auricle.tools.stages import drop_padding, trace_stages, window_lengths
from checkpoints import build_f32
from sounds import synthetic

oracle = pytest.importorskip("auricle.tools.oracle.model", reason="needs transformers (the test extra)")

SHAPES = {
    "plain": SampleShape(),
    "one-kv-head": SampleShape(n_head=8, n_kv_head=1, d_head=32, d_model=96, taps=(3, 0, 1), n_inject=2, n_window=20),
    "kv-eighth": SampleShape(n_head=8, n_kv_head=2, d_head=16, d_model=64, n_window=100, taps=(2,), n_layer=2),
    "mha-tied": SampleShape(n_head=4, n_kv_head=4, d_head=64, d_model=128, tied=True, taps=(1, 3)),
    "projected": SampleShape(enc_d_model=96, enc_n_head=3, enc_d_out=80, d_adapter=56, n_layer=4, d_ff=72),
    "no-taps": SampleShape(taps=(), n_inject=0, n_mels=80),
}
CLIPS = {  # seconds of each clip of a request
    "full-and-tail": (8.73,),
    "short": (0.61,),
    "exact": (4.0,),
    "two": (5.2, 1.004),
    "one-frame": (0.0101,),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """Gives the checkpoint folder and the F32 file of a shape, made once."""
    return cache(lambda name: build_f32(tmp_path_factory.mktemp(name), SHAPES[name], seed=list(SHAPES).index(name)))


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_engine_agrees_with_pytorch(built, shape: str, clips: str) -> None:
    backend = ["reference", "cpu"][(list(SHAPES).index(shape) + list(CLIPS).index(clips)) % 2]
    checkpoint, path = built(shape)
    sounds = [synthetic(seconds, 16_000, seed=i) for i, seconds in enumerate(CLIPS[clips])]
    with load(path, backend=backend, n_ctx=400, kv_type="f32", poison=True) as model:
        if SHAPES[shape].n_mels == 80:
            assert model.file.tensors["audio.mel_filters"].shape == (201, 80)
        heard = model.listen(sounds)
        prompt = model.build_prompt("What do you hear?", heard)
        mask = prompt.audio_rows >= 0
        want = oracle.load_oracle(checkpoint).run(heard.mels, prompt.ids, mask, n_new=12)
        got = trace_stages(model, heard, prompt, want.keys() - {"generated_ids"})
        generated = greedy(model, prompt, model.runtime.encode(heard.mels), 12)
        lengths = window_lengths(model.config.encoder, [mel.shape[1] for mel in heard.mels])
    assert got.keys() == want.keys() - {"generated_ids"}
    for name, value in got.items():
        a, b = (drop_padding(x, lengths) for x in (value, want[name]))
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= 1e-4 * max(1, np.abs(b).max()), name
    assert generated == want["generated_ids"].tolist()


def greedy(model, prompt, rows, n_new: int) -> list[int]:
    """Greedy ids without any rule that ends an answer."""
    logits, ids = model.runtime.prefill(prompt, rows), []
    for i in range(n_new):
        ids.append(int(logits.argmax()))
        logits = model.runtime.decode(ids[-1], len(prompt.ids) + i)
    return ids


def rewritten(source, target, change) -> None:
    """Writes `source` again after `change(metadata, tensors)`; tensors are {name: (shape, format, bytes)}."""
    with open_gguf(source) as file:
        metadata = dict(file.types)
        tensors = {name: (t.shape, t.format, file.data(name)) for name, t in file.tensors.items()}
        change(metadata, tensors)
        layout = plan_layout(metadata, [(name, shape, fmt) for name, (shape, fmt, _) in tensors.items()])
        with GGUFWriter(target, layout) as writer:
            for name, (_, _, data) in tensors.items():
                writer.write(name, data)


PUBLISHED = (
    "general.architecture",
    "general.name",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
)
OWN_KEYS = ("moss_audio.enc.n_window", "moss_audio.time_markers")


def keep_published(metadata: dict, tensors: dict) -> None:
    """Leaves only the keys that published files have, and drops merges that begin with '#' as their converter does."""
    for key in list(metadata):
        if key in OWN_KEYS or not (key in PUBLISHED or key.startswith("moss_audio.")):
            del metadata[key]
    merges = metadata["tokenizer.ggml.merges"]
    kept = [m for m in merges.value if not m.startswith("#")]
    assert len(kept) < len(merges.value), "the sample's merges have one that begins with '#'"
    metadata["tokenizer.ggml.merges"] = Typed(merges.type, kept, merges.item)


def test_a_file_with_published_keys_only_runs_with_the_defaults(built, tmp_path) -> None:
    _, path = built("plain")
    rewritten(path, tmp_path / "published.gguf", keep_published)
    sound = synthetic(5.0, 16_000)
    answers = []
    for name in (path, tmp_path / "published.gguf"):
        with load(name, n_ctx=300) as model:
            assert model.config.encoder.n_window == 200
            assert model.time_markers
            answers.append(model.generate("## What do you hear?", sound, max_new_tokens=8))
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].prompt_tokens == answers[1].prompt_tokens


def without(name: str):
    return lambda metadata, tensors: tensors.pop(name)


def setting(key: str, value: int | Typed):
    return lambda metadata, tensors: metadata.update({key: value if isinstance(value, Typed) else u32(value)})


def halved(name: str):
    def change(metadata: dict, tensors: dict) -> None:
        shape, _, data = tensors[name]
        tensors[name] = (shape, F16, data.view("<f4").astype("<f2").view(np.uint8))

    return change


def widened(name: str):
    def change(metadata: dict, tensors: dict) -> None:
        (n,), fmt, data = tensors[name]
        tensors[name] = ((2 * n,), fmt, np.tile(data, 2))

    return change


def other_mels(metadata: dict, tensors: dict) -> None:
    metadata["moss_audio.enc.num_mel_bins"] = u32(120)
    (n_out, n_in), fmt, data = tensors["enc.stem_proj.weight"]
    narrow = data.view("<f4").reshape(n_out, n_in)[:, : n_in // 16 * 15]
    tensors["enc.stem_proj.weight"] = (narrow.shape, fmt, np.ascontiguousarray(narrow).view(np.uint8))
    del tensors["audio.mel_filters"]


def reshaped(metadata: dict, tensors: dict) -> None:
    shape, fmt, data = tensors["llm.blk.0.ffn.up.weight"]
    tensors["llm.blk.0.ffn.up.weight"] = (shape[::-1], fmt, data.reshape(shape[1], -1))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("enc.blk.1.attn.q.weight"), "tensor enc.blk.1.attn.q.weight is missing"),
        (reshaped, r"llm.blk.0.ffn.up.weight is \[256, 256\]|llm.blk.0.ffn.up.weight is"),
        (setting("moss_audio.enc.n_window", 25), "n_window is 25"),
        (setting("moss_audio.deepstack.tap.1", 4), "taps .4. lie outside"),
        (setting("moss_audio.deepstack.tap.1", 0), "repeat a layer"),
        (setting("moss_audio.llm.vocab_size", 600), "tensor llm.embed.weight is"),
        (setting("moss_audio.llm.num_kv_heads", 3), "is not 3 KV heads times n"),
        (setting("moss_audio.enc.d_model", 0), "moss_audio.enc.d_model is 0; it must be positive"),
        (setting("moss_audio.deepstack.num_inject_layers", i32(-1)), "num_inject_layers is -1"),
        (halved("audio.mel_filters"), "audio.mel_filters is F16; it must be F32"),
        (widened("audio.mel_window"), r"audio.mel_window is \[800\]; the keys ask for \[400\]"),
        (other_mels, "tensor audio.mel_filters is missing, for other than 128 bins"),
        (lambda m, t: m.pop("moss_audio.llm.head_dim"), "lacks moss_audio.llm.head_dim"),
        (lambda m, t: m.update({"general.architecture": string("whisper")}), "architecture is 'whisper'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_file_that_cannot_be_run_says_why(built, tmp_path, change, complaint: str) -> None:
    _, path = built("projected")
    rewritten(path, tmp_path / "bad.gguf", change)
    with pytest.raises(AuricleError, match=complaint) as caught:
        load(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value)


MEBIBYTE = 1 << 20
BOMBS: dict[str, dict[str, int | Typed]] = {
    "a wide encoder": {"enc.d_model": 1 << 30},
    "a long window": {"enc.n_window": 1 << 20, "enc.max_source_positions": 1 << 31},
    "the longest window": {"enc.n_window": MAX_WINDOW, "enc.max_source_positions": 1 << 31, "enc.d_model": 1 << 31},
    "many mels": {"enc.num_mel_bins": 1 << 31},
    "many channels": {"enc.downsample_hidden_size": 1 << 31},
    "a wide projection": {"enc.output_dim": 1 << 31},
    "a large vocabulary": {"llm.vocab_size": 1 << 31},
    "a wide decoder": {"llm.hidden_size": 1 << 31, "llm.head_dim": 1 << 31},
    "many layers": {"enc.encoder_layers": 1 << 31},
    "as many layers as tensors": {"llm.num_layers": 60},
    "many taps": {"deepstack.num_taps": 1 << 31},
    "a long context": {"llm.max_position_embeddings": (1 << 32) - 1},
    "a text for a size": {"enc.d_model": string("256")},
    "a list for a size": {"llm.num_layers": i32s([2])},
    "a bool for a size": {"enc.n_window": boolean(True)},
    "no number": {"llm.rms_norm_eps": f32(float("nan"))},
    "an endless number": {"llm.rope_theta": f32(float("inf"))},
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_sizes_are_compared_with_the_tensors_before_anything_is_made(built, tmp_path, bomb: str) -> None:
    _, path = built("plain")
    changes = {f"moss_audio.{k}": v if isinstance(v, Typed) else u32(v) for k, v in BOMBS[bomb].items()}
    rewritten(path, tmp_path / "bad.gguf", lambda metadata, tensors: metadata.update(changes))
    with open_gguf(tmp_path / "bad.gguf") as file:
        tracemalloc.start()
        try:
            with pytest.raises(AuricleError) as caught:
                read_moss_audio(file)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 4 * MEBIBYTE, f"{peak:,} bytes for {caught.value}"


def test_vocabulary_and_embedding_must_agree(built, tmp_path) -> None:
    def shorten(metadata: dict, tensors: dict) -> None:
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            typed = metadata[key]
            metadata[key] = Typed(typed.type, typed.value[:-3], typed.item)

    _, path = built("plain")
    rewritten(path, tmp_path / "bad.gguf", shorten)
    with pytest.raises(ModelError, match="509 tokens but 512 embedding rows"):
        load(tmp_path / "bad.gguf")
