"""Kernels of the CUDA backend and the sizes of requests: which variants are compiled, as Triton's own keys say.

Programs are bound, on a stand-in for a card, and nothing is compiled or started.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="GPU kernels are written in Triton, which is there for Linux on x86-64 only")

from auricle.engine.backends.backend import Backend
from auricle.engine.backends.cuda import make_backend
from auricle.engine.backends.cuda_warm import NoDevice, warm
from auricle.engine.executor import Program
from auricle.engine.models.moss_audio import MossAudioConfig, read_moss_audio, token_count
from auricle.engine.runtime import draft_program, row_stages
from auricle.engine.weights import Weight
from auricle.kernels.formats import F16
from auricle.tools.synth import PlannedFile, plan_synth, write_synth
from stand_in import StandIn, StandInDriver

PRODUCTS = {"matmul", "matvec", "matvec_gated", "matvec_three"}  # a few variants of these are the point


@pytest.fixture(scope="module")
def model() -> PlannedFile:
    return PlannedFile("tiny", "q4_k")


@pytest.fixture(autouse=True)
def fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture(scope="module")
def backend() -> Backend:
    return make_backend(StandIn())


def variants(model: PlannedFile, backend: Backend, n_slots: int, *keys: tuple) -> dict[str, set[str]]:
    """Of each kernel, the variants that binding the programs of these keys asks for."""
    config, device = read_moss_audio(model), NoDevice()
    chosen = replace(backend, device=device)

    def weight(name: str) -> object:
        info = model.tensors[name]
        return device.place(Weight(name, info.format, info.shape, None))

    names = [f"kv.{n}.{part}" for n in range(config.decoder.num_layers) for part in "kv"]
    caches = device.caches(names, (n_slots, config.decoder.num_kv_heads, config.decoder.head_dim), F16)
    with StandInDriver(90, compiles=False) as driver:
        for key in keys:
            stages = row_stages(config) if key[0] == "encoder" else ["logits"][: key[2] != "none"]
            Program(draft_program(config, chosen, n_slots, key, stages), weight, caches)
    return driver.variants


def prompt_key(backend: Backend, n_tokens: int) -> tuple:
    return ("decoder", backend.padded(n_tokens), "last", True)


def clip_key(config: MossAudioConfig, n_windows: int, last_frames: int) -> tuple:
    n_rows = (n_windows - 1) * token_count(config.encoder.window_frames) + token_count(last_frames)
    return ("encoder", n_windows, config.encoder.window_frames, n_rows)


def test_prompts_of_two_lengths_ask_for_the_same_kernels(model: PlannedFile, backend: Backend) -> None:
    assert variants(model, backend, 512, prompt_key(backend, 300)) == variants(
        model, backend, 1792, prompt_key(backend, 390)
    )


def test_clips_of_two_lengths_ask_for_the_same_kernels(model: PlannedFile, backend: Backend) -> None:
    config = read_moss_audio(model)
    one, other = (variants(model, backend, 512, clip_key(config, *size)) for size in ((4, 333), (5, 90)))
    assert one == other


def test_only_products_have_variants_by_token_count(model: PlannedFile, backend: Backend) -> None:
    config = read_moss_audio(model)
    sizes = [1, 20, 64, 65, 128, 200, 256, 511, 512]
    clips = [("encoder", 1, 8 * n, n) for n in (17, 20, 25)]  # shorter than a window, no mat-vecs
    for keys in ([prompt_key(backend, n) for n in sizes], [clip_key(config, n, 200) for n in range(1, 9)] + clips):
        found = [variants(model, backend, 512, key) for key in keys]
        for kernel in found[0].keys() - PRODUCTS:
            assert all(f[kernel] == found[0][kernel] for f in found), kernel


def test_steps_ask_for_the_same_kernels_at_any_length_of_the_cache(model: PlannedFile, backend: Backend) -> None:
    lengths = (256, 512, 1024, 4096, 8448)
    found = [variants(model, backend, n, ("decoder", 1, "all", False)) for n in lengths]
    assert all(f == found[0] for f in found)


def test_warming_up_covers_every_size_of_a_request(model: PlannedFile, backend: Backend) -> None:
    config, calls = read_moss_audio(model), []
    with StandInDriver(90, compiles=False) as driver:
        warm(model, config, backend, F16, lambda done, total: calls.append((done, total)))
    assert {"_draw", "_penalise", "_advance", "_attend_split", "_attend_many", "matmul"} <= driver.variants.keys()
    assert driver.started == []
    keys = [("decoder", n, "last", True) for n in range(64, 513, 64)]
    keys += [
        ("decoder", 512, "none", True),
        ("decoder", 1, "all", False),
        *(clip_key(config, n, 133) for n in range(1, 9)),
    ]
    for kernel, needed in variants(model, backend, 768, *keys).items():
        assert needed <= driver.variants[kernel], kernel


def test_the_command_makes_a_card_ready_for_a_file_or_the_usual_shapes(
    tmp_path: Path, backend: Backend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from auricle.tools.cli import warmup

    path = tmp_path / "tiny.gguf"
    write_synth(plan_synth("tiny", "q4_k"), path)
    monkeypatch.setattr(warmup, "USUAL", (("tiny", "q4_k"),))
    found = []
    for model in (path, None):
        with StandInDriver(90, compiles=False) as driver:
            warmup.warm_card(backend, model, None)
        found.append(driver.variants)
        assert "kernels for stand-in ready after" in capsys.readouterr().err
    assert found[0] == found[1]
    assert found[0]["_attend_split"]


def test_compiling_is_said_once_and_only_when_it_takes_time(caplog: pytest.LogCaptureFixture) -> None:
    from auricle.engine.backends.cuda_memory import tell_compiling, tell_compiling_once

    tell_compiling_once.cache_clear()
    caplog.set_level(logging.INFO, "auricle.backends")
    tell_compiling(4, 4)
    assert not caplog.records
    for done in range(4):
        tell_compiling(done, 4)
    (record,) = caplog.records
    assert "auricle warmup" in record.getMessage()
    assert "\n" not in record.getMessage()
