"""What a block of weights means: one small function a type, from packed blocks to float32.

This is the definition every faster decoder in the project is compared with. Products and sums are taken in
float32 in the order written here, so results are the same to the last bit everywhere. Does not know how a block
is made (`quantize.py`), or where it is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Format,
)

# The sixteen values of IQ4_NL and IQ4_XS, close together near zero where weights are many.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)

Decoder = Callable[[np.ndarray], np.ndarray]
_DECODERS: dict[Format, Decoder] = {}


def dequantize(data: np.ndarray, fmt: Format) -> np.ndarray:
    """Decode rows of packed blocks.

    `data`: uint8 [..., row_bytes], last axis contiguous. Returns float32 [..., n_cols]; for F32 it is a view of
    `data`. A block whose scale is infinite or NaN decodes to infinities and NaN, as its bytes say.
    """
    assert data.dtype == np.uint8, f"{data.dtype=}"
    assert data.shape[-1] % fmt.block_bytes == 0, f"{data.shape=} for blocks of {fmt.block_bytes} bytes"
    blocks = data.view(fmt.layout)  # [..., n_blocks]
    with np.errstate(invalid="ignore"):
        weights = _DECODERS[fmt](blocks)
    return weights.reshape(*data.shape[:-1], blocks.shape[-1] * fmt.length)


def _decodes(fmt: Format) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        _DECODERS[fmt] = decoder
        return decoder

    return register


def unpack_planes(packed: np.ndarray, width: int, bits: int) -> np.ndarray:
    """Split bytes into codes of `bits` bits.

    `packed`: uint8 [..., n]. Every `width` bytes hold 8 / `bits` runs of `width` codes, the first run in the lowest
    bits of all of them, and so on upwards. Returns uint8 [..., n * 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    *outer, n = packed.shape
    runs = packed.reshape(*outer, n // width, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return runs.reshape(*outer, n * 8 // bits)


def unpack_scales_k4(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of Q4_K and Q5_K: uint8 [..., 12] -> two uint8 [..., 8] of six bits each.

    The first four of each are the low six bits of bytes 0-3 and 4-7; the last four have their low nibbles in
    bytes 8-11 and their top two bits in the tops of bytes 0-7.
    """
    first, second, third = (packed[..., i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, minima


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _bits32(words: np.ndarray) -> np.ndarray:
    """uint32 [...] -> uint8 [..., 32], lowest bit first."""
    return (words[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.uint8)


def _scaled(scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """One scale a run of codes: [..., n_sub] and [..., n] -> [..., n_sub, n / n_sub]."""
    return scales[..., None] * _f32(codes).reshape(*scales.shape, codes.shape[-1] // scales.shape[-1])


@_decodes(F32)
def _decode_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks


@_decodes(F16)
def _decode_f16(blocks: np.ndarray) -> np.ndarray:
    return _f32(blocks)


@_decodes(BF16)
def _decode_bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.astype(np.uint32) << 16).view(np.float32)


@_decodes(Q4_0)
def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    codes = unpack_planes(blocks["qs"], 16, 4).astype(np.int8) - 8
    return _f32(blocks["d"])[..., None] * _f32(codes)


@_decodes(Q4_1)
def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    codes = unpack_planes(blocks["qs"], 16, 4)
    return _f32(blocks["d"])[..., None] * _f32(codes) + _f32(blocks["m"])[..., None]


@_decodes(Q5_0)
def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    codes = (unpack_planes(blocks["qs"], 16, 4) | _bits32(blocks["qh"]) << 4).astype(np.int8) - 16
    return _f32(blocks["d"])[..., None] * _f32(codes)


@_decodes(Q5_1)
def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    codes = unpack_planes(blocks["qs"], 16, 4) | _bits32(blocks["qh"]) << 4
    return _f32(blocks["d"])[..., None] * _f32(codes) + _f32(blocks["m"])[..., None]


@_decodes(Q8_0)
def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _f32(blocks["d"])[..., None] * _f32(blocks["qs"])


@_decodes(Q2_K)
def _decode_q2_k(blocks: np.ndarray) -> np.ndarray:
    scales = _f32(blocks["d"])[..., None] * _f32(blocks["scales"] & 15)  # [..., 16]
    minima = _f32(blocks["dmin"])[..., None] * _f32(blocks["scales"] >> 4)
    return _scaled(scales, unpack_planes(blocks["qs"], 32, 2)) - minima[..., None]


@_decodes(Q3_K)
def _decode_q3_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks["scales"]
    six_bits = unpack_planes(packed[..., :8], 8, 4) | unpack_planes(packed[..., 8:], 4, 2) << 4
    scales = _f32(blocks["d"])[..., None] * _f32(six_bits.astype(np.int8) - 32)  # [..., 16]
    codes = unpack_planes(blocks["qs"], 32, 2) | unpack_planes(blocks["hmask"], 32, 1) << 2
    return _scaled(scales, codes.astype(np.int8) - 4)


def _decode_k4(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    scales, minima = unpack_scales_k4(blocks["scales"])  # [..., 8]
    offsets = _f32(blocks["dmin"])[..., None] * _f32(minima)
    return _scaled(_f32(blocks["d"])[..., None] * _f32(scales), codes) - offsets[..., None]


@_decodes(Q4_K)
def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    return _decode_k4(blocks, unpack_planes(blocks["qs"], 32, 4))


@_decodes(Q5_K)
def _decode_q5_k(blocks: np.ndarray) -> np.ndarray:
    return _decode_k4(blocks, unpack_planes(blocks["qs"], 32, 4) | unpack_planes(blocks["qh"], 32, 1) << 4)


@_decodes(Q6_K)
def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    scales = _f32(blocks["d"])[..., None] * _f32(blocks["scales"])  # [..., 16]
    codes = unpack_planes(blocks["ql"], 64, 4) | unpack_planes(blocks["qh"], 32, 2) << 4
    return _scaled(scales, codes.astype(np.int8) - 32)


@_decodes(IQ4_NL)
def _decode_iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _f32(blocks["d"])[..., None] * IQ4_VALUES[unpack_planes(blocks["qs"], 16, 4)]


@_decodes(IQ4_XS)
def _decode_iq4_xs(blocks: np.ndarray) -> np.ndarray:
    low = np.stack([blocks["scales_l"] & 15, blocks["scales_l"] >> 4], axis=-1)  # [..., 4, 2]
    high = blocks["scales_h"][..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3  # [..., 8]
    six_bits = low.reshape(high.shape) | high.astype(np.uint8) << 4
    scales = _f32(blocks["d"])[..., None] * _f32(six_bits.astype(np.int8) - 32)
    return _scaled(scales, IQ4_VALUES[unpack_planes(blocks["qs"], 16, 4)])
