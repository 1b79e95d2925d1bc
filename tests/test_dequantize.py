"""The decoders and the table of formats against the `gguf` package, bit for bit."""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import BF16, BY_ID, BY_NAME, F16, F32, FORMATS, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Format

# IEEE half bits: +-0, smallest and largest subnormal, smallest normal, 1, -1, largest, +-inf, quiet and signalling NaN
SPECIAL_HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFD01]

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


def oracle(data: np.ndarray, fmt: Format) -> np.ndarray:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(np.ascontiguousarray(data), GGMLQuantizationType(fmt.id))


def decode_loudly(data: np.ndarray, fmt: Format) -> np.ndarray:
    """Our decoder, with every warning an error: it must deal with its own infinities."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dequantize(data, fmt)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert np.all(same | (np.isnan(ours) & np.isnan(theirs)))


def random_blocks(fmt: Format, n_rows: int, n_blocks: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_rows, n_blocks * fmt.block_bytes), dtype=np.uint8)


def half_fields(fmt: Format) -> list[str]:
    return [name for name in fmt.layout.names or () if fmt.layout[name] == np.dtype("<f2")]


@every_format
def test_sizes_and_ids_are_those_of_the_gguf_package(fmt: Format) -> None:
    theirs = GGMLQuantizationType(fmt.id)
    assert theirs.name == fmt.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (fmt.length, fmt.block_bytes)
    assert BY_ID[fmt.id] is BY_NAME[fmt.name] is fmt


def test_ids_and_names_are_unique() -> None:
    assert len(BY_ID) == len(BY_NAME) == len(FORMATS) == 15


@pytest.mark.parametrize(
    ("fmt", "field", "offset"),
    [(Q4_K, "qs", 16), (Q4_K, "dmin", 2), (Q5_K, "qs", 48), (Q6_K, "d", 208), (Q8_0, "qs", 2)],
    ids=str,
)
def test_field_offsets(fmt: Format, field: str, offset: int) -> None:
    assert fmt.offset(field) == offset


def test_rows_must_fill_blocks() -> None:
    with pytest.raises(AssertionError, match="48 columns do not fill blocks of 32"):
        Q4_0.row_bytes(48)
    with pytest.raises(AssertionError, match="blocks of 18 bytes"):
        dequantize(np.zeros((2, 17), np.uint8), Q4_0)


@every_format
def test_random_bytes(fmt: Format) -> None:
    data = random_blocks(fmt, 64, 40)
    assert_same_bits(decode_loudly(data, fmt), oracle(data, fmt))


@every_format
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F], ids=hex)
def test_uniform_bytes(fmt: Format, byte: int) -> None:
    data = np.full((3, 5 * fmt.block_bytes), byte, np.uint8)
    assert_same_bits(decode_loudly(data, fmt), oracle(data, fmt))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if half_fields(f)], ids=repr)
def test_special_scales(fmt: Format) -> None:
    fields = half_fields(fmt)
    n = len(SPECIAL_HALVES)
    data = random_blocks(fmt, n, n, seed=1)
    blocks = data.view(fmt.layout)  # [n, n]: the first field's value by row, the second's by column
    halves = np.array(SPECIAL_HALVES, np.uint16).view(np.float16)
    for field, values in zip(fields, (halves[:, None], halves[None, :]), strict=False):
        blocks[field].view(np.uint16)[...] = values.view(np.uint16)
    blocks[0, -1] = np.zeros((), fmt.layout)
    decoded = decode_loudly(data, fmt)
    assert_same_bits(decoded, oracle(data, fmt))
    assert np.isnan(decoded).any()
    assert np.isinf(decoded).any()


@pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=repr)
def test_special_plain_numbers(fmt: Format) -> None:
    words = np.array([0, 1, 0x007F, 0x0080, 0x7C00, 0x7F80, 0x7FC0, 0x7F81], np.uint16)
    words = np.concatenate([words, words | 0x8000])
    data = np.repeat(words, fmt.block_bytes // 2).view(np.uint8)[None]
    assert_same_bits(decode_loudly(data, fmt), oracle(data, fmt))


@every_format
def test_any_number_of_dimensions(fmt: Format) -> None:
    data = random_blocks(fmt, 2 * 3, 4, seed=2)
    flat = dequantize(data, fmt)
    assert_same_bits(dequantize(data.reshape(2, 3, -1), fmt), flat.reshape(2, 3, -1))
    assert_same_bits(dequantize(data[0], fmt), flat[0])
    assert dequantize(data[:0], fmt).shape == (0, 4 * fmt.length)


@every_format
def test_strided_and_unaligned_views(fmt: Format) -> None:
    width = 4 * fmt.block_bytes
    storage = random_blocks(fmt, 6, 5, seed=3)
    storage = np.concatenate([storage, storage], axis=1)
    view = storage[::2, 1 : 1 + width]
    view.flags.writeable = False
    assert_same_bits(dequantize(view, fmt), oracle(view, fmt))
    assert_same_bits(dequantize(view[::-1], fmt), oracle(view[::-1], fmt))
