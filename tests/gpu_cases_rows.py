"""The GPU kernels between the matrices, interpreted on the CPU and compared with the reference backend.

pytest collects this file only by name, in a process whose TRITON_INTERPRET is 1: `test_gpu_rows.py` does that. On the
GPU of a machine they run with `pytest --card tests/gpu_cases_rows.py`. Whatever a kernel writes to, and every slot of a
cache that nobody has written, is NaN before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auricle.engine.backends.reference import DEFINITIONS
from auricle.engine.kv_cache import CacheTensor
from auricle.engine.weights import as_tensor
from auricle.kernels.formats import BY_NAME, F16, F32, Q8_0, Format
from auricle.kernels.gpu import cache, kv_attention, norms, rope, rows, window_attention
from auricle.kernels.gpu.cache import GpuCache
from auricle.kernels.gpu.weights import device_weight
from auricle.kernels.quantize import quantize
from gpu_device import DEVICE, same

HALF = 2e-3  # relative error (norm) where factors are rounded to float16
EXACT = 2e-6  # and where all is float32
TYPES = [F32, F16, Q8_0]


def on_processor(define: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*operands: object, **attributes: object) -> torch.Tensor:
        return define(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in operands), **attributes)

    return call


REFERENCE = {name: on_processor(define) for name, define in DEFINITIONS.items()}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).to(DEVICE)


def nans(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, device=DEVICE)


def integers(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over that of what is wanted; NaN where anything is."""
    got, wanted = got.cpu(), wanted.cpu()
    return ((got - wanted).double().norm() / wanted.double().norm()).item()


def empty_cache(n_ctx: int, n_kv_head: int, d: int, fmt: Format) -> GpuCache:
    planes = [
        torch.zeros(shape, dtype=getattr(torch, name), device=DEVICE)
        for shape, name in cache.cache_planes(n_ctx, n_kv_head, d, fmt)
    ]
    for plane in planes:
        plane.fill_(torch.nan if plane.is_floating_point() else 77)
    return GpuCache(*planes)


def split_blocks(kept: CacheTensor) -> GpuCache:
    """A cache of the reference as a GPU keeps it."""
    if kept.format is not Q8_0:
        return GpuCache(kept.data.to(DEVICE))
    blocks = kept.data.numpy().view(Q8_0.layout)
    codes = np.ascontiguousarray(blocks["qs"]).view(np.int8).reshape(kept.shape)
    scales = np.ascontiguousarray(blocks["d"]).reshape(*kept.shape[:2], -1)
    return GpuCache(*(torch.from_numpy(plane).to(DEVICE) for plane in (codes, scales)))


def filled_cache(n_ctx: int, n_kv_head: int, d: int, fmt: Format, n: int, seed: int) -> CacheTensor:
    """n slots hold something; in the others every number, or every scale, is NaN."""
    kept = CacheTensor((n_ctx, n_kv_head, d), fmt)
    kept.data.view(torch.uint8).fill_(0xFF)
    kept.write(torch.arange(n, dtype=torch.int32), random(n, n_kv_head, d, seed=seed).cpu())
    return kept


# Attention.


@pytest.mark.parametrize(
    ("n_tokens", "n_head", "d", "lengths"),
    [(1, 2, 64, [1]), (13, 1, 64, [13, 1, 7]), (50, 2, 64, [50, 33]), (64, 1, 128, [64]), (70, 1, 80, [65, 3])],
)
def test_window_attention(n_tokens: int, n_head: int, d: int, lengths: list[int]) -> None:
    q, k, v = (random(len(lengths), n_tokens, n_head, d, seed=seed) for seed in range(3))
    lengths_ = integers(lengths)
    wanted = REFERENCE["window_attention"](q, k, v, lengths_)
    for n, length in enumerate(lengths):
        k[n, length:], v[n, length:] = torch.nan, torch.nan
    out = nans(*q.shape)
    window_attention.window_attention(q, k, v, lengths_, out)
    assert error(out, wanted) < HALF


def test_an_empty_window_is_finite() -> None:
    q, out = random(2, 5, 1, 64), nans(2, 5, 1, 64)
    window_attention.window_attention(q, q, q, integers([0, 5]), out)
    assert (out[0] == 0).all()
    assert out.isfinite().all()


def attend(n_tokens: int, start: int, n_head: int, n_kv_head: int, d: int, fmt: Format, n_ctx: int) -> tuple:
    """The kernel's result and the reference's, for tokens at start, start + 1 …"""
    q = 2 * random(n_tokens, n_head, d)
    keys, values = (filled_cache(n_ctx, n_kv_head, d, fmt, start + n_tokens, seed) for seed in (1, 2))
    positions = integers(range(start, start + n_tokens))
    scratch = nans(kv_attention.kv_attention_scratch_bytes(n_tokens, n_head, d) // 4)
    out = nans(*q.shape)
    kv_attention.kv_attention(q, split_blocks(keys), split_blocks(values), positions, out, scratch)
    return out, REFERENCE["kv_attention"](q, keys, values, positions)


@pytest.mark.parametrize(
    ("n_tokens", "start", "n_head", "n_kv_head", "d", "n_ctx", "fmt"),
    [
        (1, 0, 2, 2, 64, 64, F16),  # the first token
        (1, 255, 8, 2, 128, 300, F16),  # a whole step of slots ends here
        (1, 255, 2, 1, 128, 300, Q8_0),
        (1, 70, 4, 2, 64, 600, F32),  # more splits than there is past
        (2, 64, 2, 1, 128, 300, F32),
        (3, 30, 4, 1, 64, 100, Q8_0),
        (5, 126, 2, 2, 64, 256, F16),  # some tokens do not see the last step
        (8, 300, 4, 1, 64, 400, Q8_0),
    ],
)
def test_attention_of_few(
    n_tokens: int, start: int, n_head: int, n_kv_head: int, d: int, n_ctx: int, fmt: Format
) -> None:
    out, wanted = attend(n_tokens, start, n_head, n_kv_head, d, fmt, n_ctx)
    assert error(out, wanted) < (EXACT if fmt is F32 else HALF)


@pytest.mark.parametrize(
    ("n_tokens", "start", "n_head", "n_kv_head", "d", "fmt"),
    [
        (9, 0, 2, 2, 64, F16),
        (16, 55, 4, 2, 64, Q8_0),
        (33, 0, 2, 1, 128, F32),
        (64, 100, 4, 1, 64, F16),
        (67, 1, 2, 2, 128, Q8_0),
        (257, 3, 1, 1, 64, F16),
    ],
)
def test_attention_of_many(n_tokens: int, start: int, n_head: int, n_kv_head: int, d: int, fmt: Format) -> None:
    out, wanted = attend(n_tokens, start, n_head, n_kv_head, d, fmt, start + n_tokens + 9)
    assert error(out, wanted) < (EXACT if fmt is F32 else HALF)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    n_tokens=st.integers(1, 12),
    start=st.integers(0, 150),
    n_kv_head=st.integers(1, 2),
    group=st.integers(1, 4),
    d=st.sampled_from([16, 32, 48, 64, 80]),
)
def test_attention_of_any_shape(n_tokens: int, start: int, n_kv_head: int, group: int, d: int) -> None:
    out, wanted = attend(n_tokens, start, group * n_kv_head, n_kv_head, d, F16, start + n_tokens)
    assert error(out, wanted) < HALF


def test_attention_gives_the_same_bits_again() -> None:
    (first, _), (second, _) = (attend(2, 200, 2, 1, 64, F16, 400) for _ in range(2))
    assert torch.equal(first, second)


# The cache.


@pytest.mark.parametrize("fmt", TYPES, ids=str)
@pytest.mark.parametrize(("n_kv_head", "d"), [(2, 64), (3, 128), (1, 96), (9, 32)])
def test_kv_store(n_kv_head: int, d: int, fmt: Format) -> None:
    x = random(3, n_kv_head, d)
    x[1, 0, :32] = 0
    x[2, 0, :32] = torch.linspace(-127, 127, 32, device=DEVICE) / 2  # codes that end in a half
    x[0, -1, 5] = 40000
    positions, stored = integers([4, 5, 6]), empty_cache(9, n_kv_head, d, fmt)
    before = stored.codes.clone()
    cache.kv_store(x, positions, stored)
    kept = CacheTensor((9, n_kv_head, d), fmt)
    kept.write(positions.cpu(), x.cpu())
    wanted = split_blocks(kept)
    assert torch.equal(stored.codes[4:7], wanted.codes[4:7])
    assert stored.scales is None or torch.equal(stored.scales[4:7], wanted.scales[4:7])
    others = [0, 1, 2, 3, 7, 8]
    assert stored.codes[others].equal(before[others]) or stored.codes[others].isnan().all()


# Norms and rotary positions.


@pytest.mark.parametrize(("n_rows", "d"), [(1, 2560), (9, 256), (3, 130), (33, 64), (2, 5000)])
def test_norms(n_rows: int, d: int) -> None:
    x, b, weight, bias = random(n_rows, d), random(n_rows, d, seed=1), random(d, seed=2), random(d, seed=3)
    x[:, d // 2] = 1e5
    out, total = nans(n_rows, d), nans(n_rows, d)
    norms.rms_norm(x, weight, 1e-6, out)
    assert error(out, REFERENCE["rms_norm"](x.double(), weight.double(), eps=1e-6)) < EXACT
    out.fill_(torch.nan)
    norms.layer_norm(x, weight, bias, 1e-5, out)
    assert error(out, REFERENCE["layer_norm"](x.double(), weight.double(), bias.double(), eps=1e-5)) < EXACT
    out.fill_(torch.nan)
    norms.add_rms_norm(x, b, weight, 1e-6, total, out)
    assert torch.equal(total, x + b)
    assert error(out, REFERENCE["rms_norm"]((x + b).double(), weight.double(), eps=1e-6)) < EXACT
    other = torch.arange(d, device=DEVICE) != d // 2
    assert (
        error(out[:, other], REFERENCE["rms_norm"]((x + b).double(), weight.double(), eps=1e-6)[:, other.cpu()]) < EXACT
    )


@pytest.mark.parametrize(("n_head", "d"), [(4, 64), (3, 128), (10, 32), (2, 80)])
def test_rope(n_head: int, d: int) -> None:
    positions = integers([0, 7, 40959])
    x, weight = random(3, n_head, d), random(d, seed=1)
    frequencies = rope.rope_frequencies(d, 1e6).to(DEVICE)
    out = nans(*x.shape)
    rope.rope(x, frequencies, positions, out)
    assert error(out, REFERENCE["rope"](x, positions, theta=1e6)) < EXACT
    out.fill_(torch.nan)
    rope.norm_rope(x, weight, 1e-6, frequencies, positions, out)
    wanted = REFERENCE["rope"](REFERENCE["rms_norm"](x, weight, eps=1e-6), positions, theta=1e6)
    assert error(out, wanted) < EXACT


@pytest.mark.parametrize("fmt", TYPES, ids=str)
@pytest.mark.parametrize(("n_tokens", "n_head", "n_kv_head", "d"), [(1, 8, 2, 128), (2, 10, 5, 64)])
def test_norm_rope_store(n_tokens: int, n_head: int, n_kv_head: int, d: int, fmt: Format) -> None:
    q, k, v = (
        random(n_tokens, n_head, d),
        random(n_tokens, n_kv_head, d, seed=1),
        random(n_tokens, n_kv_head, d, seed=2),
    )
    q_weight, k_weight = random(d, seed=3), random(d, seed=4)
    frequencies, positions = rope.rope_frequencies(d, 1e6).to(DEVICE), integers(range(5, 5 + n_tokens))
    keys, values = (empty_cache(12, n_kv_head, d, fmt) for _ in range(2))
    out = nans(*q.shape)
    rope.norm_rope_store(q, k, v, q_weight, k_weight, 1e-6, frequencies, positions, out, keys, values)

    wanted, turned = nans(*q.shape), nans(*k.shape)
    rope.norm_rope(q, q_weight, 1e-6, frequencies, positions, wanted)
    rope.norm_rope(k, k_weight, 1e-6, frequencies, positions, turned)
    apart = [empty_cache(12, n_kv_head, d, fmt) for _ in range(2)]
    cache.kv_store(turned, positions, apart[0])
    cache.kv_store(v, positions, apart[1])
    assert torch.equal(out, wanted)
    for got, want in zip((keys, values), apart, strict=True):
        assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
        assert got.scales is None or torch.equal(got.scales.view(torch.uint8), want.scales.view(torch.uint8))


@pytest.mark.parametrize(
    ("position", "n_head", "n_kv_head", "d", "n_ctx", "fmt"),
    [
        (0, 2, 2, 64, 64, F16),
        (255, 8, 2, 128, 300, F16),  # the last slot of a step of a split
        (256, 4, 1, 128, 300, Q8_0),  # the first of another split, which sees nothing else
        (70, 4, 2, 80, 600, F32),
        (299, 2, 1, 64, 300, Q8_0),  # the context is full
    ],
)
def test_step_attention(position: int, n_head: int, n_kv_head: int, d: int, n_ctx: int, fmt: Format) -> None:
    q, k, v = (random(1, heads, d, seed=seed) for seed, heads in enumerate((n_head, n_kv_head, n_kv_head)))
    q_weight, k_weight = 2 * random(d, seed=3), random(d, seed=4)
    frequencies, positions = rope.rope_frequencies(d, 1e6).to(DEVICE), integers([position])
    results = []
    for together in (True, False):
        kept = [split_blocks(filled_cache(n_ctx, n_kv_head, d, fmt, position, seed)) for seed in (1, 2)]
        scratch = nans(kv_attention.kv_attention_scratch_bytes(1, n_head, d) // 4)
        operands, out = (q, k, v, q_weight, k_weight, 1e-6, frequencies), nans(*q.shape)
        if together:
            kv_attention.step_attention(*operands, *kept, positions, out, scratch)
        else:
            turned = nans(*q.shape)
            rope.norm_rope_store(*operands, positions, turned, *kept)
            kv_attention.kv_attention(turned, *kept, positions, out, scratch)
        planes = [plane.view(torch.uint8) for c in kept for plane in (c.codes, c.scales) if plane is not None]
        results.append([out, *planes])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


# Rows and elements.


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_get_rows(name: str) -> None:
    table = quantize(random(7, 768).numpy(), BY_NAME[name])
    ids, out = integers([6, -1, 3, 7]), nans(4, 768)
    rows.get_rows(device_weight(table, BY_NAME[name], DEVICE), ids, out)
    wanted = as_tensor(table, BY_NAME[name]).float()
    assert same(out[[0, 2]], wanted[[6, 3]])
    assert (out[[1, 3]] == 0).all()


@pytest.mark.parametrize("d", [64, 1500])
def test_rows_by_index(d: int) -> None:
    x, some, index = random(5, d), random(3, d, seed=1), integers([-1, 2, 0, -1, 1])
    for op in ("put_rows", "add_rows"):
        out = nans(5, d)
        getattr(rows, op)(x, some, index, out)
        assert same(out, REFERENCE[op](x, some, index))
    out = nans(3, d)
    rows.take_rows(x, integers([4, 0, 4]), out)
    assert torch.equal(out, x[[4, 0, 4]])


@pytest.mark.parametrize("shape", [(3, 700), (1, 1), (2, 1024)])
def test_elements(shape: tuple[int, int]) -> None:
    a, b = 6 * random(*shape), random(*shape, seed=1)
    a[0, -1] = -100 if a.numel() > 1 else 1
    pairs = {
        "add": ((a, b), a + b),
        "mul": ((a, b), a * b),
        "silu": ((a,), REFERENCE["silu"](a.double())),
        "gelu": ((a,), REFERENCE["gelu"](a.double())),
        "silu_mul": ((a, b), REFERENCE["silu"](a.double()) * b.cpu()),
    }
    for name, (operands, wanted) in pairs.items():
        out = nans(*shape)
        getattr(rows, name)(*operands, out)
        assert error(out, wanted) < EXACT, name
    out = nans(*shape)
    rows.add(a, b[0], out)
    assert torch.equal(out, a + b[0])
