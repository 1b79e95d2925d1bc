"""Weights that are NaN or infinite: one line that names one of them, from every command that runs a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.engine.finite import blame, check_logits, find_non_finite
from auricle.engine.gguf import open_gguf
from auricle.engine.models.config import ModelError
from auricle.engine.sampling import NonFiniteError
from auricle.kernels.formats import F32
from auricle.tools.bench import run_round
from auricle.tools.imatrix import collect_importance
from auricle.tools.sample import SampleShape, write_checkpoint
from sounds import JFK, synthetic

SHAPE = SampleShape(
    n_layer=2, enc_n_layer=2, taps=(0,), n_inject=1, enc_d_model=256, enc_d_out=256, d_adapter=256
)  # fmt: skip
SOUND = synthetic(1.2, 16_000)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finite")
    write_checkpoint(folder / "checkpoint", SHAPE)
    for recipe in ("f32", "q4_k"):
        convert(plan_conversion(folder / "checkpoint", recipe), folder / f"{recipe}.gguf")
    return {recipe: folder / f"{recipe}.gguf" for recipe in ("f32", "q4_k")}


def spoil(path: Path, target: Path, tensor: str, value: float, at: float) -> Path:
    """A copy in which one number of a tensor, or one scale of a block, is `value`; `at`: how far into it, 0 to 1."""
    shutil.copy(path, target)
    with open_gguf(path) as file:
        info = file.tensors[tensor]
    fmt = info.format
    kind = np.float32 if fmt is F32 else np.float16
    field = 0 if fmt.length == 1 else fmt.offset("d")
    block = int(at * (info.nbytes // fmt.block_bytes - 1))
    with target.open("r+b") as file:
        file.seek(info.offset + block * fmt.block_bytes + field)
        file.write(kind(value).tobytes())
    return target


PLACES = [
    "enc.conv1.weight", "enc.blk.0.attn.q.weight", "enc.blk.1.ffn.fc2.bias", "adapter.up.weight",
    "deepstack.0.down.weight", "llm.blk.0.attn.q.weight", "llm.blk.0.attn.k_norm.weight", "llm.blk.1.ffn.down.weight",
    "llm.blk.1.ffn_norm.weight", "audio.mel_filters",
]  # fmt: skip


@pytest.mark.parametrize("tensor", PLACES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_weight_is_named(paths: dict[str, Path], tmp_path: Path, tensor: str, value: float) -> None:
    for recipe, backend in (("f32", "reference"), ("q4_k", "cpu")):
        bad = spoil(paths[recipe], tmp_path / f"{recipe}.gguf", tensor, value, 0.5)
        with load(bad, backend=backend, n_ctx=400) as model, pytest.raises(ModelError) as caught:
            model.generate("What?", SOUND, max_new_tokens=4, temperature=1.0)
        assert str(caught.value).startswith(f"{bad}: tensor {tensor} holds NaN or infinite numbers; ")


def test_commands_that_run_a_model_otherwise(paths: dict[str, Path], tmp_path: Path) -> None:
    bad = spoil(paths["f32"], tmp_path / "bad.gguf", "llm.blk.0.attn.q.weight", np.nan, 0.1)
    with load(bad, n_ctx=400) as model:
        with pytest.raises(ModelError, match=r"tensor llm\.blk\.0\.attn\.q\.weight holds NaN"):
            run_round(model, JFK)
        with pytest.raises(ModelError, match=r"tensor llm\.blk\.0\.attn\.q\.weight holds NaN"):
            collect_importance(model, [str(JFK)])


def test_one_logit_is_enough() -> None:
    check_logits(np.zeros(9, np.float32))
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFiniteError, match="1 of 9 logits"):
            check_logits(np.array([0] * 8 + [value], np.float32))


def test_sound_weights_are_not_blamed(paths: dict[str, Path]) -> None:
    with open_gguf(paths["q4_k"]) as file:
        assert find_non_finite(file) is None
        assert "every weight is" in str(blame(file, NonFiniteError("logit 3 is nan")))
