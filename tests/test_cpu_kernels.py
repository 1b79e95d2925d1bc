"""Compiled kernels of the CPU against float64 numpy: tile decoders, products with quantised weights, what lies between.

Results and work space are filled with NaN before, weights can not be written, shapes fit nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

numba = pytest.importorskip("numba")
import torch  # noqa: E402, F401  before the first parallel kernel, so that both can share a thread pool

from auricle.kernels.cpu import activations, attention, matmul, matvec, norms, plain, tiles  # noqa: E402
from auricle.kernels.cpu.jit import specialise  # noqa: E402
from auricle.kernels.cpu.simd import store, store_bytes  # noqa: E402
from auricle.kernels.dequantize import dequantize  # noqa: E402
from auricle.kernels.formats import BF16, F16, F32, Q8_0, Format  # noqa: E402
from auricle.kernels.quantize import quantize  # noqa: E402

TYPES = list(tiles.TILES)
types = pytest.mark.parametrize("fmt", TYPES, ids=lambda f: f.name)
ORDER = [0, 2, 1, 3, 4, 6, 5, 7]  # where codes have the groups of 32 of a tile
FEW = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    numba.set_num_threads(1)


def with_threads(make: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """What is made with one thread and with two."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba has one thread here")
    made = []
    for n in (1, 2):
        numba.set_num_threads(n)
        made.append(make())
    return made


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def nans(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def weights(n_out: int, k: int, fmt: Format) -> np.ndarray:
    data = quantize(normal(n_out, k, seed=1), fmt)
    data.flags.writeable = False
    return data


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the norm of what is expected."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# Tile decoders.


def unpack(blocks, n_bytes, codes, scales, minima):
    for tile in range(blocks.shape[0] // n_bytes):
        c0, c1, c2, c3, s, m = decode(blocks, tile * n_bytes)
        store_bytes(codes, tile * 256, c0)
        store_bytes(codes, tile * 256 + 64, c1)
        store_bytes(codes, tile * 256 + 128, c2)
        store_bytes(codes, tile * 256 + 192, c3)
        store(scales, tile * 16, s)
        store(minima, tile * 16, m)


decode = None  # given by `specialise`
UNPACK = {fmt: specialise(unpack, fmt.name, decode=tile.decode) for fmt, tile in tiles.TILES.items()}


def unpacked(data: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, 256], scales and minima [n, 16] of tiles uint8 [n, n_bytes]."""
    n = len(data)
    codes, scales, minima = np.full((n, 256), 255, np.uint8), nans(n, 16), nans(n, 16)
    UNPACK[fmt](data.reshape(-1), tiles.TILES[fmt].n_bytes, codes.reshape(-1), scales.reshape(-1), minima.reshape(-1))
    return codes.reshape(n, 8, 32)[:, ORDER].reshape(n, 256), scales, minima


def random_tiles(fmt: Format, n: int, scale: float | None = None) -> np.ndarray:
    """Tiles of random bytes: any finite half as their scales, or `scale`."""
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (n, tiles.TILES[fmt].n_bytes), dtype=np.int64).astype(np.uint8)
    blocks = data.view(fmt.layout)
    for name in {"d", "dmin"} & set(blocks.dtype.names):
        halves = rng.integers(0, 65536, blocks.shape, dtype=np.int64).astype(np.uint16).view(np.float16)
        halves[~np.isfinite(halves)] = 65504
        halves[:2] = [[6e-8], [-0.0]]
        blocks[name] = halves if scale is None else scale
    data.flags.writeable = False
    return data


@types
def test_tiles_of_whole_numbers_are_exact(fmt: Format) -> None:
    codes, scales, minima = unpacked(random_tiles(fmt, 50, scale=1.0), fmt)
    assert codes.max() == (255 if tiles.TILES[fmt].wide else {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}[fmt.name])
    got = np.repeat(scales, 16, axis=1) * codes - np.repeat(minima, 16, axis=1)
    np.testing.assert_array_equal(got, dequantize(random_tiles(fmt, 50, scale=1.0), fmt))


@types
def test_tiles_with_any_scale(fmt: Format) -> None:
    data = random_tiles(fmt, 500)
    codes, scales, minima = (part.astype(np.float64) for part in unpacked(data, fmt))
    products, minima = np.repeat(scales, 16, axis=1) * codes, np.repeat(minima, 16, axis=1)
    error = np.abs(products - minima - dequantize(data, fmt))
    assert (error <= 2.0**-23 * (np.abs(products) + np.abs(minima)) + 1e-44).all()


# Activations.


def encode_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, k = x.shape
    codes, scales, sums = np.full((n, k), 255, np.uint8), nans(n, k // 16), nans(n, k // 16)
    activations.encode_rows(x, codes, scales, sums)
    return codes, scales, sums


def encode_groups(x: np.ndarray, fine: bool) -> tuple[np.ndarray, ...]:
    n, k = x.shape
    m = matmul.padded(n)
    code_sums = np.full((k // 16, m), -1, np.int32)
    made = (np.full((k // 32, m, 32), 255, np.uint8), *nans(2, k // 32, m), nans(k // 16, m), code_sums)
    activations.encode_groups(x, fine, *made)
    return made


def taken_rows(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What encoded rows stand for, in the order of x."""
    n, k = codes.shape
    ordered = codes.view(np.int8).reshape(n, k // 256, 8, 32)[:, :, ORDER].reshape(n, k)
    return ordered * np.repeat(scales.astype(np.float64), 16, axis=1)


def taken_groups(codes: np.ndarray, half_scales: np.ndarray, n: int) -> np.ndarray:
    k = len(codes) * 32
    scales = half_scales.astype(np.float64).reshape(k // 32, 2, -1, 1).swapaxes(1, 2)
    values = codes.view(np.int8).reshape(k // 32, -1, 2, 16) * scales
    return values.transpose(1, 0, 2, 3).reshape(-1, k // 256, 8, 32)[:n, :, ORDER].reshape(n, k)


def hard_activations(n: int, k: int) -> np.ndarray:
    x = normal(n, k) * np.exp2(normal(n, 1, seed=4) * 20)
    x[0, :64] = 0
    x[1, 5] = 1e30
    x[2] = 0
    return x


def test_rounded_rows() -> None:
    x = hard_activations(5, 768)
    codes, scales, sums = encode_rows(x)
    taken, bound = taken_rows(codes, scales), np.repeat(scales, 16, axis=1)
    assert codes.view(np.int8).min() >= -127
    assert (np.abs(taken - x) <= 0.500001 * bound).all()
    np.testing.assert_allclose(scales, np.abs(x.reshape(5, 48, 16)).max(axis=2) / 127, rtol=2e-7)
    np.testing.assert_allclose(sums, taken.reshape(5, 48, 16).sum(axis=2), rtol=1e-6, atol=0)
    assert not taken[2].any()


@pytest.mark.parametrize("fine", [False, True])
def test_rounded_groups(fine: bool) -> None:
    x = hard_activations(5, 768)
    codes, scales, sums, half_scales, code_sums = encode_groups(x, fine)
    taken, length = taken_groups(codes, half_scales, 5), 16 if fine else 32
    bound = np.repeat(np.abs(x.reshape(5, -1, length)).max(axis=2) / 127, length, axis=1)
    assert (np.abs(taken - x) <= 0.500001 * bound).all()
    halves = taken.reshape(5, 3, 8, 2, 16)[:, :, ORDER].sum(axis=-1).reshape(5, 48)  # in the order of tiles
    np.testing.assert_allclose((half_scales * code_sums)[:, :5].T, halves, rtol=1e-6, atol=0)
    if not fine:
        np.testing.assert_array_equal(half_scales[::2], scales)
        np.testing.assert_array_equal(half_scales[1::2], scales)
        np.testing.assert_allclose(sums[:, :5].T, halves.reshape(5, 24, 2).sum(axis=2), rtol=1e-6, atol=0)
    for part in (codes, half_scales, code_sums):
        assert not part[:, 5:].any(), "tokens that fill up a block are zero"


# Products.


def multiply_one(data: np.ndarray, fmt: Format, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scales, sums = encode_rows(x)
    out = nans(len(data))
    matvec.ONE[fmt](data, codes.reshape(-1), scales.reshape(-1), sums.reshape(-1), out)
    return out[None], taken_rows(codes, scales)


def multiply_few(data: np.ndarray, fmt: Format, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scales, sums = encode_rows(x)
    out = nans(len(x), len(data))
    matvec.FEW[fmt](data, len(x), codes.reshape(-1), scales.reshape(-1), sums.reshape(-1), out.reshape(-1))
    return out, taken_rows(codes, scales)


def multiply_many(data: np.ndarray, fmt: Format, x: np.ndarray, spare: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`spare`: columns of `out` that lie beyond those of the product."""
    fine = tiles.TILES[fmt].group == 16
    n, m = len(x), matmul.padded(len(x))
    codes, scales, sums, half_scales, code_sums = encode_groups(x, fine)
    out, work = nans(n, len(data) + spare), np.full((2, matmul.work_bytes(n)), 255, np.uint8)
    used = (half_scales, code_sums) if fine else (scales, sums)
    flat = [part.reshape(-1) for part in (codes, *used)]
    matmul.KERNELS[fmt](data, n, m, *flat, work, out.reshape(-1), len(data) + spare)
    assert np.isnan(out[:, len(data) :]).all()
    return out[:, : len(data)], taken_groups(codes, half_scales, n)


Multiply = Callable[[np.ndarray, Format, np.ndarray], tuple[np.ndarray, np.ndarray]]


def check_product(multiply: Multiply, fmt: Format, n: int, n_out: int, k: int) -> None:
    """Relative to the size that such products have: a single one may happen to be near zero."""
    data, x = weights(n_out, k, fmt), normal(n, k)
    got, taken = multiply(data, fmt, x)
    matrix = dequantize(data, fmt).astype(np.float64).T
    size = np.linalg.norm(x) * np.linalg.norm(matrix) / math.sqrt(k)
    assert np.linalg.norm(got - taken @ matrix) <= 2e-6 * size
    assert np.linalg.norm(got - x @ matrix) <= 0.01 * (1 + 2 / math.sqrt(got.size)) * size


@types
@pytest.mark.parametrize(("n_out", "k"), [(1, 256), (33, 2560), (70, 2304)])
def test_one_token(fmt: Format, n_out: int, k: int) -> None:
    check_product(multiply_one, fmt, 1, n_out, k)


@types
@pytest.mark.parametrize("n", range(1, matvec.MAX_TOKENS + 1))
def test_few_tokens(fmt: Format, n: int) -> None:
    check_product(multiply_few, fmt, n, 15 + n, 256 * n)


@types
@pytest.mark.parametrize("n", [*range(1, 10), 16, 33, 64, 257])
def test_many_tokens(fmt: Format, n: int) -> None:
    check_product(multiply_many, fmt, n, [1, 15, 33, 70, 129][n % 5], [256, 512, 2560, 2304][n % 4])


@FEW
@given(st.sampled_from(TYPES), st.integers(1, 40), st.integers(1, 140), st.integers(1, 11))
def test_many_tokens_of_any_shape(fmt: Format, n: int, n_out: int, n_tiles: int) -> None:
    check_product(multiply_many, fmt, n, n_out, 256 * n_tiles)


def test_columns_beyond_the_product_are_left_alone() -> None:
    multiply_many(weights(21, 256, Q8_0), Q8_0, normal(9, 256), spare=30)


@types
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_seen_in_all_results_of_its_token(fmt: Format, bad: float) -> None:
    data, x = weights(17, 512, fmt), normal(3, 512)
    x[1, 300] = bad
    for multiply in (multiply_few, multiply_many):
        got, _ = multiply(data, fmt, x)
        assert np.isnan(got[1]).all()
        assert np.isfinite(got[[0, 2]]).all()
    assert np.isnan(multiply_one(data, fmt, x[1:2])[0]).all()


@types
def test_zeros_give_zeros(fmt: Format) -> None:
    data, x = weights(17, 512, fmt), np.zeros((2, 512), np.float32)
    for multiply in (multiply_few, multiply_many):
        assert not multiply(data, fmt, x)[0].any()
    assert not multiply_one(data, fmt, x[:1])[0].any()


@types
def test_threads_do_not_change_a_bit_of_products(fmt: Format) -> None:
    data, x = weights(200, 2304, fmt), normal(13, 2304)
    for multiply, tokens in ((multiply_one, x[:1]), (multiply_few, x[:5]), (multiply_many, x)):
        one, two = with_threads(lambda m=multiply, t=tokens: m(data, fmt, t)[0])
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("fmt", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize(("n", "n_out", "k"), [(1, 1, 32), (3, 33, 96), (8, 19, 2560)])
def test_plain_numbers(fmt: Format, n: int, n_out: int, k: int) -> None:
    data, x, out = weights(n_out, k, fmt), normal(n, k), nans(n, n_out)
    plain.KERNELS[fmt](data, x.reshape(-1), n, out.reshape(-1))
    assert distance(out, x.astype(np.float64) @ dequantize(data, fmt).astype(np.float64).T) <= 1e-6


# Between the matrices.


def normalised(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("d", [1, 7, 16, 33, 100, 2560])
def test_rms_norm(d: int, parallel: bool) -> None:
    a, b, weight, eps = normal(5, d), normal(5, d, seed=1), normal(d), np.float32(1e-6)
    out, total = nans(5, d), nans(5, d)
    norms.RMS_NORM[parallel](a.reshape(-1), weight, eps, out.reshape(-1))
    np.testing.assert_allclose(out, normalised(a, weight, 1e-6), rtol=1e-6)
    out.fill(np.nan)
    flat = [part.reshape(-1) for part in (total, out)]
    norms.ADD_RMS_NORM[parallel](a.reshape(-1), b.reshape(-1), weight, eps, *flat)
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_allclose(out, normalised(a + b, weight, 1e-6), rtol=1e-6)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("n_head", "d"), [(1, 2), (3, 6), (5, 34), (2, 128)])
def test_norm_rope(n_head: int, d: int, parallel: bool) -> None:
    positions = np.array([0, 1, 2, 77, 40000], np.int32)
    x, weight, eps, out = normal(5, n_head, d), normal(d), np.float32(1e-6), nans(5, n_head, d)
    frequencies = (1e6 ** -(np.arange(d // 2) / (d // 2))).astype(np.float32)
    norms.NORM_ROPE[parallel](x.reshape(-1), weight, eps, positions, frequencies, n_head, out.reshape(-1))
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = np.split(normalised(x, weight, 1e-6), 2, axis=-1)
    np.testing.assert_allclose(out, np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1), atol=3e-6)


@pytest.mark.parametrize("parallel", [False, True])
def test_gate(parallel: bool) -> None:
    gates, ups = normal(4, 60) * 30, normal(4, 37)
    before = gates.copy()
    norms.GATE[parallel](gates.reshape(-1), 7, 60, ups.reshape(-1), 4, 37)
    wide = before[:, 7:44].astype(np.float64)
    np.testing.assert_allclose(gates[:, 7:44], wide / (1 + np.exp(-wide)) * ups, rtol=1e-6)
    np.testing.assert_array_equal(gates[:, :7], before[:, :7])
    np.testing.assert_array_equal(gates[:, 44:], before[:, 44:])


# Attention.


def attend(
    fmt: Format, group: int, n_kv_head: int, d: int, positions: list[int], n_ctx: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes, and float64 numpy. Slots that nobody may see are NaN."""
    n_head, n, n_slots = group * n_kv_head, len(positions), max(positions) + 1
    q, scale = normal(n, n_head, d), np.float32(1 / math.sqrt(d))
    caches, decoded = [], []
    for seed in (1, 2):
        rows = quantize(normal(n_slots * n_kv_head, d, seed=seed) * 2, fmt)
        cache = np.full((n_ctx, n_kv_head, rows.shape[1]), 255, np.uint8)
        cache[:n_slots] = rows.reshape(n_slots, n_kv_head, -1)
        caches.append(cache.reshape(-1))
        decoded.append(dequantize(rows, fmt).reshape(n_slots, n_kv_head, d).astype(np.float64))
    stride = -(-n_ctx // 16) * 16
    out, scores, where = nans(n, n_head, d), nans(n_head * stride), np.array(positions, np.int32)
    width = fmt.row_bytes(d)
    attention.KERNELS[fmt](
        q.reshape(-1), n_head, d, *caches, n_kv_head, width, where, scale, scores, stride, out.reshape(-1)
    )
    keys, values = (np.repeat(part, group, axis=1) for part in decoded)
    weights = np.einsum("thd,shd->ths", q.astype(np.float64), keys) / math.sqrt(d)
    weights[np.broadcast_to(np.arange(n_slots) > where[:, None, None], weights.shape)] = -np.inf
    weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return out, np.einsum("ths,shd->thd", weights, values)


@pytest.mark.parametrize("fmt", list(attention.KERNELS), ids=lambda f: f.name)
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_attention(fmt: Format, group: int) -> None:
    for d, n, n_slots in ((64, 1, 1), (128, 1, 300), (32, 8, 33), (64, 3, 16)):
        got, expected = attend(fmt, group, 2, d, list(range(n_slots - n if n_slots > n else 0, n_slots)), n_slots + 5)
        assert distance(got, expected) <= 1e-6


@FEW
@given(
    st.sampled_from([F32, F16]),
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from([16, 48, 64]),
    st.lists(st.integers(0, 100), min_size=1, max_size=8),
)
def test_attention_of_any_shape(fmt: Format, group: int, n_kv_head: int, d: int, positions: list[int]) -> None:
    got, expected = attend(fmt, group, n_kv_head, d, positions, max(positions) + 1)
    assert distance(got, expected) <= 1e-6


def test_threads_do_not_change_a_bit_of_attention() -> None:
    one, two = with_threads(lambda: attend(F16, 4, 4, 64, [90, 91], 100)[0])
    np.testing.assert_array_equal(one, two)
