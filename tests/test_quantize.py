"""The encoders: error no worse than llama.cpp's, decodable by anybody, right at the edges."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from auricle.kernels.dequantize import dequantize, unpack_planes, unpack_scales_k4
from auricle.kernels.formats import BF16, BY_NAME, F16, F32, FORMATS, IQ4_NL, IQ4_XS, Q4_K, Q6_K, Q8_0, Format
from auricle.kernels.quantize import QuantizationError, pack_planes, pack_scales_k4, quantize

KINDS = ("gaussian", "student", "outliers")

# Root-mean-square errors in millionths of llama.cpp's encoder on `tensor(kind)`: plain for each kind, then weighted by
# `importance()` for each kind, given to it as well. Measured by calling ggml_quantize_chunk of llama-cpp-python 0.3.36
# through ctypes and decoding with the gguf package.
PEER = {
    "Q4_0": (1716.322, 4372.858, 3124.244, 1469.790, 4000.716, 2965.499),
    "Q4_1": (1559.074, 3359.189, 2333.275, 1157.096, 2585.909, 1766.480),
    "Q5_0": (854.221, 2203.621, 1692.017, 728.668, 2048.764, 1591.110),
    "Q5_1": (755.326, 1620.050, 1087.671, 562.439, 1259.344, 862.703),
    "Q8_0": (107.154, 277.642, 217.282, 107.660, 274.375, 216.396),
    "Q2_K": (5946.625, 12087.111, 6968.678, 4246.941, 8609.184, 5382.286),
    "Q3_K": (3009.765, 6459.017, 3961.773, 2512.454, 5744.659, 3443.506),
    "Q4_K": (1422.830, 3112.412, 2125.113, 1179.585, 2694.306, 1840.989),
    "Q5_K": (721.238, 1570.022, 1058.003, 607.185, 1416.891, 934.170),
    "Q6_K": (356.863, 846.990, 621.793, 306.617, 765.830, 556.707),
    "IQ4_NL": (1523.237, 3447.863, 2556.543, 1322.401, 3040.135, 2330.374),
    "IQ4_XS": (1534.066, 3486.116, 2599.155, 1340.663, 3109.336, 2414.187),
}

plain_numbers = (F32, F16, BF16)
block_formats = [fmt for fmt in FORMATS if fmt not in plain_numbers]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)
every_block_format = pytest.mark.parametrize("fmt", block_formats, ids=repr)
every_kind = pytest.mark.parametrize("kind", KINDS)


def tensor(kind: str) -> np.ndarray:
    """RandomState's streams are frozen, so that the bounds above stay those of the same weights."""
    rng = np.random.RandomState(KINDS.index(kind))
    shape = (32, 1024)
    x = rng.standard_t(3, shape) if kind == "student" else rng.standard_normal(shape)
    if kind == "outliers":
        x *= np.where(rng.random_sample(shape) < 0.002, 20, 1)
    return (x * 0.02).astype(np.float32)


def importance() -> np.ndarray:
    return np.exp(1.5 * np.random.RandomState(7).standard_normal(1024)).astype(np.float32)


def oracle(data: np.ndarray, fmt: Format) -> np.ndarray:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(np.ascontiguousarray(data), GGMLQuantizationType(fmt.id))


def encode_loudly(x: np.ndarray, fmt: Format) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return quantize(x, fmt)


def rmse(x: np.ndarray, decoded: np.ndarray, weights: np.ndarray | None = None) -> float:
    misses = (decoded.astype(np.float64) - x) ** 2
    return float(np.sqrt(misses.mean() if weights is None else (misses * weights).mean() / weights.mean()))


@every_kind
@every_block_format
def test_error_is_no_worse_than_the_peers(fmt: Format, kind: str) -> None:
    x, weights = tensor(kind), importance()
    plain, weighted = PEER[fmt.name][KINDS.index(kind)], PEER[fmt.name][KINDS.index(kind) + 3]
    assert rmse(x, oracle(quantize(x, fmt), fmt)) * 1e6 <= plain
    assert rmse(x, oracle(quantize(x, fmt, weights), fmt), weights) * 1e6 <= weighted


@every_kind
@every_format
def test_both_decoders_agree(fmt: Format, kind: str) -> None:
    data = quantize(tensor(kind), fmt)
    np.testing.assert_array_equal(dequantize(data, fmt), oracle(data, fmt))


@every_kind
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_same_bytes_as_the_gguf_package(name: str, kind: str) -> None:
    x = tensor(kind)
    theirs = gguf.quants.quantize(x, GGMLQuantizationType[name])
    np.testing.assert_array_equal(quantize(x, BY_NAME[name]), np.ascontiguousarray(theirs).view(np.uint8))


@every_kind
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_error_is_less_than_the_gguf_packages(name: str, kind: str) -> None:
    x, fmt = tensor(kind), BY_NAME[name]
    theirs = gguf.quants.quantize(x, GGMLQuantizationType[name])
    assert rmse(x, oracle(quantize(x, fmt), fmt)) < rmse(x, oracle(theirs, fmt))


@every_block_format
def test_zeros_stay_zeros(fmt: Format) -> None:
    x = tensor("gaussian")[:2, :512].copy()
    x[0, :256] = 0
    decoded = dequantize(encode_loudly(x, fmt), fmt)
    assert not decoded[0, :256].any()
    assert decoded[0, 256:].any()
    assert not dequantize(encode_loudly(np.zeros((3, 256), np.float32), fmt), fmt).any()


@every_block_format
@pytest.mark.parametrize("value", [0.5, -0.5, 1e-3, -7.0, 1234.0])
def test_constant_rows(fmt: Format, value: float) -> None:
    x = np.full((1, 512), value, np.float32)
    coarse = abs(value) < 0.01  # the scale is a subnormal half, the level one of few
    np.testing.assert_allclose(dequantize(encode_loudly(x, fmt), fmt), x, rtol=2e-2 if coarse else 2e-3)


@every_block_format
@pytest.mark.parametrize("value", [50.0, -50.0])
def test_one_outlier_keeps_its_size(fmt: Format, value: float) -> None:
    x = tensor("gaussian")[:1, :512].copy()
    x[0, 100] = value
    decoded = dequantize(encode_loudly(x, fmt), fmt)
    assert decoded[0, 100] == pytest.approx(
        value, rel=0.05 if fmt in (IQ4_NL, IQ4_XS) else 2e-3
    )  # their table has no 0
    assert rmse(x[0, 256:], decoded[0, 256:]) < 0.01  # the other super-block takes no harm


@every_format
@pytest.mark.parametrize("value", [7e4, 1e8, -3e38, 3.4028235e38])
def test_what_does_not_fit_saturates(fmt: Format, value: float) -> None:
    x = tensor("gaussian")[:1, :512].copy()
    x[0, 37] = value
    decoded = dequantize(encode_loudly(x, fmt), fmt)
    assert np.isfinite(decoded).all()
    assert decoded[0, 37] * np.sign(value) >= min(abs(value), 6e4) * 0.99


@pytest.mark.parametrize("fmt", [fmt for fmt in block_formats if fmt is not Q8_0], ids=repr)
@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_small_weights_keep_their_precision(fmt: Format, size: float) -> None:
    """Though the super-block's scale is then a subnormal half of few bits."""
    usual, small = tensor("gaussian"), tensor("gaussian") * np.float32(size / 0.02)
    loss = rmse(usual, dequantize(quantize(usual, fmt), fmt)) / 0.02
    assert rmse(small, dequantize(encode_loudly(small, fmt), fmt)) < 1.05 * loss * size


@every_block_format
@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e-8, 1e-40])
def test_tiny_weights_lose_no_more_than_the_smallest_half(fmt: Format, size: float) -> None:
    x = tensor("gaussian") * np.float32(size / 0.02)
    assert rmse(x, dequantize(encode_loudly(x, fmt), fmt)) <= rmse(x, np.zeros_like(x)) + 2.0**-24


@every_block_format
def test_encoding_again_loses_little(fmt: Format) -> None:
    x = tensor("student")
    once = dequantize(quantize(x, fmt), fmt)
    twice = dequantize(quantize(once, fmt), fmt)
    assert rmse(once, twice) < 0.25 * rmse(x, once)


@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threads", [1, 2])
def test_not_finite_is_refused_with_its_place(fmt: Format, value: float, threads: int) -> None:
    x = np.zeros((700, 512), np.float32)  # several slabs
    x[650, 300] = x[699, 2] = value
    with pytest.raises(QuantizationError, match=r"^weight at row 650, column 300 is -?(nan|inf); ") as caught:
        quantize(x, fmt, threads=threads)
    assert (caught.value.row, caught.value.column) == (650, 300)


@every_block_format
def test_importance_lowers_the_weighted_error(fmt: Format) -> None:
    x, weights = tensor("gaussian"), importance()
    plain, weighted = (rmse(x, dequantize(quantize(x, fmt, w), fmt), weights) for w in (None, weights))
    assert weighted == plain if fmt is Q8_0 else weighted < 0.95 * plain


def test_one_column_can_have_all_the_importance() -> None:
    x = tensor("gaussian")
    weights = np.zeros(1024, np.float32)
    weights[5] = 1
    decoded = dequantize(quantize(x, Q4_K, weights), Q4_K)
    plain = dequantize(quantize(x, Q4_K), Q4_K)
    assert rmse(x[:, 5], decoded[:, 5]) < 0.1 * rmse(x[:, 5], plain[:, 5])
    assert rmse(x, decoded) < 0.01


@pytest.mark.parametrize("fmt", [Q4_K, Q6_K, IQ4_NL], ids=repr)
def test_the_unit_of_importance_does_not_matter(fmt: Format) -> None:
    x, weights = tensor("gaussian")[:4], importance()
    np.testing.assert_array_equal(quantize(x, fmt, weights), quantize(x, fmt, weights * np.float32(2**30)))
    alike = quantize(x, fmt)
    np.testing.assert_array_equal(quantize(x, fmt, np.full(1024, 3, np.float32)), alike)
    np.testing.assert_array_equal(quantize(x, fmt, np.zeros(1024, np.float32)), alike)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_importance_is_refused(value: float) -> None:
    weights = importance()
    weights[77] = value
    with pytest.raises(QuantizationError, match=r"^importance of column 77 is "):
        quantize(tensor("gaussian"), Q4_K, weights)


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    n_rows=st.integers(0, 5),
    n_blocks=st.integers(0, 5),
    threads=st.integers(1, 3),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_independent(fmt: Format, n_rows: int, n_blocks: int, threads: int, weighted: bool, seed: int) -> None:
    n_cols = n_blocks * fmt.length
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_cols)).astype(np.float32)
    weights = rng.random(n_cols, dtype=np.float32) if weighted else None
    data = quantize(x, fmt, weights, threads)
    assert data.dtype == np.uint8
    assert data.shape == (n_rows, fmt.row_bytes(n_cols))
    for row in range(n_rows):
        np.testing.assert_array_equal(data[row : row + 1], quantize(x[row : row + 1], fmt, weights))
    if x.size:
        assert rmse(x, oracle(data, fmt)) < 0.35


@every_format
def test_slabs_and_threads_do_not_show(fmt: Format) -> None:
    x = np.tile(tensor("student"), (9, 1))  # more than one slab
    data = quantize(x, fmt, importance(), threads=2)
    np.testing.assert_array_equal(data, np.tile(quantize(x[:32], fmt, importance()), (9, 1)))


def test_views_are_encoded_as_their_copies() -> None:
    x = tensor("gaussian")
    x.flags.writeable = False
    np.testing.assert_array_equal(quantize(x[::2, :512], Q4_K), quantize(x[::2, :512].copy(), Q4_K))
    np.testing.assert_array_equal(quantize(x.T[:256], Q8_0), quantize(x.T[:256].copy(), Q8_0))


def test_rows_must_fill_blocks() -> None:
    with pytest.raises(AssertionError, match="128 columns do not fill blocks of 256"):
        quantize(np.zeros((1, 128), np.float32), Q4_K)


@pytest.mark.parametrize(("width", "bits"), [(16, 4), (32, 4), (64, 4), (32, 2), (32, 1), (8, 4), (4, 2)])
def test_packing_is_the_inverse_of_unpacking(width: int, bits: int) -> None:
    packed = np.random.default_rng(0).integers(0, 256, (5, 2 * width), dtype=np.uint8)
    np.testing.assert_array_equal(pack_planes(unpack_planes(packed, width, bits), width, bits), packed)
    scales = packed.reshape(-1)[:24].reshape(2, 12)
    np.testing.assert_array_equal(pack_scales_k4(*unpack_scales_k4(scales)), scales)


def test_the_compiler_is_loaded_on_first_use_only() -> None:
    program = (
        "import sys; import numpy as np; from auricle.kernels.quantize import quantize; "
        "from auricle.kernels.formats import Q4_0, Q8_0; "
        "quantize(np.ones((1, 32), 'f4'), Q8_0); assert 'numba' not in sys.modules; "
        "quantize(np.ones((1, 32), 'f4'), Q4_0); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
