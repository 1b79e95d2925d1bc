"""Is everything right on this card: the cases of the tests on the device itself, as steps that many processes share.

The cases of the linear kernels and of the ops, every product of the 4B shape, step attention a thousand times, the
golden recordings for four types, and the model in the box; those that pytest knows run under pytest, item by item. In a
rehearsal it is a few of each on the stand-in.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from card_device import Gpu
from card_kernels import BYTE_ERROR, HALF_ERROR, check_steps
from card_steps import Journal, Step, last_lines
from checkout import ROOT

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import Model
from auricle.engine.backends import find_backend
from auricle.engine.backends.backend import Backend
from auricle.engine.gguf import open_gguf
from auricle.engine.models.moss_audio import token_count
from auricle.engine.session import Heard
from auricle.kernels.formats import F16, F32, Q8_0, Format
from auricle.kernels.gpu import cache, kv_attention, rope
from auricle.tools.stages import drop_padding, mean_divergence, read_stages, row_cosines, trace_stages

PYTEST_SUITES = ("gpu_cases_rows.py", "gpu_cases_sampling.py", "gpu_cases_conv.py", "test_cuda_backend.py")
GOLDEN_TYPES = ("q8_0", "q4_k", "f16", "f32")
GOLDEN_CLIP, GOLDEN_PROMPT = "jfk_3s", "Transcribe the audio."
DEMO = ROOT / "tools/demo/digits.gguf"
DEMO_CLIPS = ("george", "jackson", "yweweler")
LEAST_COSINE, MOST_DIVERGENCE = 0.999, 1e-3  # as the README promises for rounded activations
FRAMES = 400  # of a window
REHEARSED = ("linear Q4_Kx13 k768 n1", "gated Q4_K Q4_K n1", "best Q6_K n1", "decode Q8_0", "argmax", "add-2x3",
             "linears-1x256", "rms_norm-1x8", "kv_attention-1x8of2x32-after-40")  # fmt: skip


def case_steps(gpu: Gpu, golden: Path | None, shared: Path) -> Iterator[tuple[str, Step]]:
    """All but what pytest runs; what takes long first, so that the rest fills up the other processes."""
    for type_name in GOLDEN_TYPES[:1] if gpu.rehearsal else GOLDEN_TYPES:
        if golden:
            yield f"golden {type_name}", partial(check_golden, gpu, golden, type_name)
    if golden:
        yield "demo cuda", partial(check_demo, gpu, golden, shared)
    for fmt in (F16, Q8_0, F32):
        yield f"step attention 1000 times {fmt}", partial(repeat_attention, gpu, fmt)
    if not gpu.rehearsal:
        yield "model", partial(check_model, gpu)
    yield "large channel", check_large_channel
    yield from check_steps(gpu)
    yield from linear_steps(gpu)
    yield from op_steps(gpu)


def model_backend(gpu: Gpu) -> Backend:
    """Of models; in a rehearsal one that is no interpreter."""
    return find_backend("cpu") if gpu.rehearsal else gpu.backend()


def linear_steps(gpu: Gpu) -> Iterator[tuple[str, Step]]:
    """Of `gpu_cases_linear.py`, with the limits of `test_gpu_linear.py`."""
    from gpu_cases_linear import CASES
    from test_gpu_linear import limit

    for name, run in CASES.items():
        if not gpu.rehearsal or any(name.startswith(word) for word in REHEARSED):
            yield f"linear: {name}", partial(judge, run, limit(name) or 0.0)


def judge(run: Callable[[], float], limit: float) -> dict[str, Any]:
    error = float(run())
    return {"ok": error <= limit, "error": error, "limit": limit}


def op_steps(gpu: Gpu) -> Iterator[tuple[str, Step]]:
    """Every op of the backend against the reference; of the published shapes all but the products, which have steps of
    their own."""
    import cuda_worker
    from op_cases import MODEL_CASES, tolerance

    backend = gpu.backend()
    for name, check in cuda_worker.op_checks(backend).items():
        if not gpu.rehearsal or name in REHEARSED:
            yield f"op: {name}", partial(judge, check, BYTE_ERROR if backend.rounds else HALF_ERROR)
    for case in [] if gpu.rehearsal else MODEL_CASES:
        graph = case.graph()
        if not {"linear", "linears", "gated_linear"} & {node.op for node in graph.nodes}:
            run = partial(cuda_worker.error_of, case, backend, F32, F16 if graph.leaves_of("state") else F32)
            yield f"op: {case.name}", partial(judge, run, max(HALF_ERROR, tolerance(case, {})))


def check_large_channel() -> dict[str, Any]:
    """A residual stream with a channel of 1e5."""
    import cuda_worker

    found = cuda_worker.run_large()
    return {"ok": all(r["rest"] <= HALF_ERROR and r["channel"] <= 1e-6 for r in found.values()), "errors": found}


# Step attention.


def repeat_attention(gpu: Gpu, fmt: Format, n_head: int = 32, n_kv_head: int = 8, d: int = 128) -> dict[str, Any]:
    """A thousand tokens, each with other numbers: attention that stores its row itself against the kernels apart. All
    results and both caches must have the same bits."""
    n, n_ctx = (3, 8) if gpu.rehearsal else (1000, 1024)
    n_head, n_kv_head, d = (2, 1, 64) if gpu.rehearsal else (n_head, n_kv_head, d)
    generator = torch.Generator(gpu.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=gpu.device)

    caches = [[empty_cache(gpu, n_ctx, n_kv_head, d, fmt) for _ in "kv"] for _ in range(2)]
    n_bytes = kv_attention.kv_attention_scratch_bytes(1, n_head, d)
    scratch = torch.full((n_bytes // 4,), torch.nan, device=gpu.device)
    q_gain, k_gain, frequencies = random(d), random(d), rope.rope_frequencies(d, 1e6).to(gpu.device)
    outs, turned = [torch.empty(1, n_head, d, device=gpu.device) for _ in range(2)], random(1, n_head, d)
    different = torch.zeros((), dtype=torch.int64, device=gpu.device)
    for i in range(n):
        position = torch.full((1,), i, dtype=torch.int32, device=gpu.device)
        q, k, v = (3 * random(1, heads, d) for heads in (n_head, n_kv_head, n_kv_head))
        operands = (q, k, v, q_gain, k_gain, 1e-6, frequencies)
        for out in (*outs, scratch, turned):
            out.fill_(torch.nan)
        kv_attention.step_attention(*operands, *caches[0], position, outs[0], scratch)
        scratch.fill_(torch.nan)
        rope.norm_rope_store(*operands, position, turned, *caches[1])
        kv_attention.kv_attention(turned, *caches[1], position, outs[1], scratch)
        different += (outs[0].view(torch.int32) != outs[1].view(torch.int32)).any() | ~outs[0].isfinite().all()
    planes = [[p.view(torch.uint8) for c in pair for p in (c.codes, c.scales) if p is not None] for pair in caches]
    same_cache = all(torch.equal(a, b) for a, b in zip(*planes, strict=True))
    return {"ok": int(different) == 0 and same_cache, "steps": n, "different": int(different), "same_cache": same_cache}


def empty_cache(gpu: Gpu, n_ctx: int, n_kv_head: int, d: int, fmt: Format) -> cache.GpuCache:
    shapes = cache.cache_planes(n_ctx, n_kv_head, d, fmt)
    planes = [torch.zeros(shape, dtype=getattr(torch, kind), device=gpu.device) for shape, kind in shapes]
    for plane in planes:
        plane.fill_(torch.nan if plane.is_floating_point() else 77)
    return cache.GpuCache(*planes)


# Models.


def check_model(gpu: Gpu) -> dict[str, Any]:
    """A small model from sound to tokens, and recorded steps against the plain loop, likeliest and drawn."""
    import cuda_worker

    base = gpu.forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        result = cuda_worker.run_model(Path(folder))
    forced, answers = result["forced"], result["answers"]
    steps_same = all(ahead == plain for ahead, plain in (result["greedy"], result["drawn"]))
    ok = forced["wrong"] == 0 and forced["clear"] > 5 and steps_same and answers[0][0] == answers[1][0]
    peak = result["peak"] - base
    return {"ok": ok, "forced": forced, "steps_same": steps_same, "planned": result["planned"], "peak": peak}


def open_model(path: Path, backend: Backend, n_ctx: int, kv_type: str | None) -> Model:
    return Model(open_gguf(path), backend, n_ctx=n_ctx, kv_type=kv_type, poison=True)


def check_golden(gpu: Gpu, golden: Path, type_name: str) -> dict[str, Any]:
    """Every stage of the recording, and logits along the official answer, beside the reference on the same file; and
    how far both are from what the official code computed."""
    want, metadata = read_stages(golden / f"{GOLDEN_CLIP}.safetensors")
    ids = want["generated_ids"].tolist()[: 2 if gpu.rehearsal else None]
    with tempfile.TemporaryDirectory() as folder:
        path = golden / f"{type_name}.gguf"
        if not path.exists():
            path = Path(folder) / f"{type_name}.gguf"
            convert(plan_conversion(golden / "checkpoint", type_name), path)
        traces = []
        for backend in (model_backend(gpu), find_backend("reference")):
            with open_model(path, backend, 512, "f32") as model:
                traces.append(trace_golden(model, golden, list(want), ids))
        pieces = replace(model_backend(gpu), prefill_chunk=7, window_batch=1)  # of few tokens
        with open_model(path, pieces, 512, "f32") as model:
            chunked = trace_golden(model, golden, ["logits"], [])
    got, reference = traces
    stages = compare_traces(got, reference, want)
    result: dict[str, Any] = {"stages": stages, "official_text": metadata.get("generated_text")}
    result["divergence"] = mean_divergence(got["forced"], reference["forced"])
    result |= compare_clear(got["forced"], reference["forced"])
    result["same_tokens_as_reference"] = count_same(got["answer"], reference["answer"])
    result["same_tokens_as_official"] = count_same(got["answer"], ids)
    result["tokens"] = len(ids)
    worst = min(stage["cosine"] for stage in stages.values())
    ok = worst >= LEAST_COSINE and result["divergence"] <= MOST_DIVERGENCE and result["wrong"] == 0
    result["chunked_cosine"] = float(row_cosines(chunked["logits"], reference["logits"]).min())
    ok &= result["chunked_cosine"] >= LEAST_COSINE
    return {"ok": ok, "worst_cosine": worst, **result}


def trace_golden(model: Model, golden: Path, names: list[str], ids: list[int]) -> dict[str, Any]:
    """Stages of the prompt by name; `forced`: logits after each token of `ids`; `answer`: as many greedy tokens."""
    samples = np.load(golden / f"{GOLDEN_CLIP}.npy")
    heard: Heard = model.listen(samples, 16_000)
    prompt = model.build_prompt(GOLDEN_PROMPT, heard)
    stages = trace_stages(model, heard, prompt, [n for n in names if n not in ("input_ids", "generated_ids")])
    stages["input_ids"] = prompt.ids
    if ids:
        rows = model.runtime.encode(heard.mels)
        steps = [model.runtime.prefill(prompt, rows, len(ids) + 1).copy()]
        steps += [model.runtime.decode(token, len(prompt.ids) + i).copy() for i, token in enumerate(ids)]
        stages["forced"] = np.stack(steps)
        result = model.generate(GOLDEN_PROMPT, samples, sample_rate=16_000, max_new_tokens=len(ids))
        stages["answer"] = list(result.token_ids)
    return stages


def compare_traces(got: dict[str, Any], reference: dict[str, Any], want: dict[str, np.ndarray]) -> dict[str, Any]:
    """By stage: the least cosine of a row to the reference's and to the official one, and the relative error."""
    assert np.array_equal(got["input_ids"], want["input_ids"]), "other tokens than the official prompt"
    n_frames = want["mel"].shape[1]
    lengths = [token_count(min(FRAMES, n_frames - start)) for start in range(0, n_frames, FRAMES)]
    found = {}
    for name in [n for n in want if n not in ("input_ids", "generated_ids")]:
        a, b, c = (drop_padding(side[name], lengths) for side in (got, reference, want))
        a, b, c = (x.T for x in (a, b, c)) if name == "mel" else (a, b, c)
        assert np.isfinite(a).all(), f"{name} is not finite"
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        official = float(row_cosines(a, c).min())
        found[name] = {"cosine": float(row_cosines(a, b).min()), "error": error, "official_cosine": official}
    return found


def compare_clear(got: np.ndarray, want: np.ndarray) -> dict[str, int]:
    """Rows where the reference's margin is over twice the error, and those of them with another likeliest token."""
    error = np.abs(got - want).max(-1)
    second, first = np.sort(want, -1)[:, -2:].T
    clear = first - second > 2 * error
    return {"clear": int(clear.sum()), "wrong": int((clear & (got.argmax(-1) != want.argmax(-1))).sum())}


def count_same(a: list[int], b: list[int]) -> int:
    """Tokens until the first that differs."""
    pairs = list(zip(a, b, strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def check_demo(gpu: Gpu, golden: Path, shared: Path) -> dict[str, Any]:
    """The model in the box: its tokens on the card, on the processor and by the reference."""
    clips = [np.load(golden / f"{name}.npy") for name in DEMO_CLIPS[: 1 if gpu.rehearsal else None]]
    backends = {"card": model_backend(gpu), "reference": find_backend("reference")}
    if not gpu.rehearsal:
        backends["cpu"] = find_backend("cpu")
    n_new, answers = 4 if gpu.rehearsal else 64, {}
    for name, backend in backends.items():
        with open_model(DEMO, backend, 2048, None) as model:
            results = [model.generate(audio=c, sample_rate=16_000, max_new_tokens=n_new) for c in clips]
            answers[name] = [list(r.token_ids) for r in results]
            texts = [r.text for r in results]
    same = {name: answer == answers["card"] for name, answer in answers.items()}
    (shared / "demo.json").write_text(json.dumps(answers))
    return {"ok": all(same.values()), "same": same, "texts": texts}


# Pytest.


class Shared:
    """A pytest plug-in: items are steps, whoever claims one runs it."""

    def __init__(self, journal: Journal, words: tuple[str, ...] = ()) -> None:
        self._journal, self._failure, self._words = journal, "", words
        self._skipped = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if not self._words or any(word in item.nodeid for word in self._words)]

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        self._failure, self._skipped = "", False
        return None if self._journal.claim(item.nodeid) else True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            self._skipped = True
        if report.failed:
            self._failure = last_lines(str(report.longrepr))
        if report.when == "teardown":
            note = {"failure": self._failure} if self._failure else {"skipped": True} if self._skipped else {}
            self._journal.end(report.nodeid, not self._failure, note)
            if self._failure and torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where the card is lost to this process
                gc.collect()


def run_pytest(journal: Journal, rehearsal: bool) -> int:
    """The suites that pytest collects; with status 0 also where items have failed."""
    import pytest

    files = [f"{ROOT / 'tests' / name}" for name in PYTEST_SUITES[: 2 if rehearsal else None]]
    words = ("test_norms[1-2560", "test_argmax[500", "test_kv_store[1-96-F16") if rehearsal else ()
    words = words or ("gpu_cases", "on_a_card", "thousand_steps", "planned_one")
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT), "-q", *files]
    options += [] if rehearsal else ["--card"]
    code = pytest.main(options, plugins=[Shared(journal, words)])
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED) else code
