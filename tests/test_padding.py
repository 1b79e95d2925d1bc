"""The last piece of a prompt is padded, so that prompts of many lengths share a program, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.engine.prompts import Prompt
from auricle.engine.session import Model
from auricle.tools.sample import write_checkpoint

BACKENDS = ["reference", "cpu"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padding")
    convert(plan_conversion(write_checkpoint(folder / "checkpoint"), "f32"), folder / "model.gguf")
    return folder / "model.gguf"


@pytest.fixture(params=BACKENDS)
def model(path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(path, backend=request.param, n_ctx=64, kv_type="f32", poison=True) as model:
        yield model


def prompt_of(n: int, n_audio: int = 3) -> Prompt:
    rng = np.random.default_rng(n)
    index = np.full(n, -1, np.int32)
    index[2 : 2 + n_audio] = np.arange(n_audio)
    return Prompt(rng.integers(0, 200, n).astype(np.int32), index)


def rows_of(model: Model, n: int = 3) -> list[torch.Tensor]:
    c = model.config
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, c.decoder.hidden_size, generator=generator) for _ in range(c.n_rows)]


def step_to(model: Model, step: int, chunk: int = 512) -> None:
    model.runtime.backend = replace(model.backend, prefill_step=step, prefill_chunk=chunk)


def poison_caches(model: Model) -> None:
    for cache in model.runtime.caches.values():
        cache.data.view(torch.uint8).fill_(0xFF)


@pytest.mark.parametrize(("n", "chunk"), [(6, 512), (11, 512), (16, 512), (27, 16)])
def test_a_padded_prompt_is_the_same_prompt(model: Model, n: int, chunk: int) -> None:
    rows, results = rows_of(model), []
    for step in (1, 8):
        step_to(model, step, chunk)
        poison_caches(model)
        logits = model.runtime.prefill(prompt_of(n), rows).copy()
        kept = [cache.read(64).clone() for cache in model.runtime.caches.values()]
        following = model.runtime.decode(7, n).copy()
        results.append((logits, [k[:n] for k in kept], following))
        assert all(k[:n].isfinite().all() and k[n:].isnan().all() for k in kept)
    (logits, kept, following), (same_logits, same_kept, same_following) = results
    np.testing.assert_allclose(same_logits, logits, atol=1e-4)
    np.testing.assert_allclose(same_following, following, atol=1e-4)
    for a, b in zip(kept, same_kept, strict=True):
        np.testing.assert_allclose(b.numpy(), a.numpy(), atol=1e-5)


def test_prompts_of_nearly_one_length_share_a_program(model: Model) -> None:
    step_to(model, 8)
    rows, counts = rows_of(model), []
    for n in (17, 9, 12, 16, 19):
        model.runtime.prefill(prompt_of(n), rows)
        counts.append(len(model.runtime._programs))
    assert counts == [1, 2, 2, 2, 2]


def test_traces_have_the_rows_of_the_prompt_alone(model: Model) -> None:
    rows, stages, traces = rows_of(model), ["llm.embed", "llm.blk.1", "llm.inject.0", "logits"], []
    for step in (1, 8):
        step_to(model, step, chunk=16)
        plain = model.runtime.trace_decoder(prompt_of(21), rows, stages, {})
        feed = {"llm.blk.1": plain["llm.blk.1"]}
        traces.append(
            plain
            | {f"{k}, fed": v for k, v in model.runtime.trace_decoder(prompt_of(21), rows, ["logits"], feed).items()}
        )
    for name, value in traces[0].items():
        assert len(value) == len(traces[1][name]) == 21
        np.testing.assert_allclose(traces[1][name], value, atol=1e-4, err_msg=name)


def test_a_prompt_may_fill_the_context(model: Model) -> None:
    """Padding needs no slots."""
    step_to(model, 48)
    logits = model.runtime.prefill(prompt_of(63), rows_of(model))
    assert np.isfinite(logits).all()
    assert np.isfinite(model.runtime.decode(3, 63)).all()


def test_observers_see_no_padding(path: Path) -> None:
    from auricle.engine.runtime import Runtime

    with load(path, backend="reference", n_ctx=64) as model:
        sums: dict[str, torch.Tensor] = {}
        runtime = Runtime(model.file, model.config, model.backend, n_ctx=64, kv_format=model.kv_format, observers=sums)
        runtime.prefill(prompt_of(11), rows_of(model))
    assert sums
    assert {int(s[-1]) for s in sums.values()} <= {11, 1}  # the head meets the last token alone
