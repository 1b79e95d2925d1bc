"""Convolutions on tensor cores: factors in half precision, sums in float32, bias and GELU before anything is written.

A convolution is a matrix product over taps and channels, and the matrix of its input is never made: tiles of it are
picked where the input lies. Between convolutions of a stack an image is f16 [n, width, height, pitch], where a pixel's
channels lie side by side and are padded with zeros to whole steps of a product. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import launch
from .static import Case

PIXELS, CHANNELS, DEPTH = 128, 128, 64  # of a tile of a product; the first convolution of few channels takes SHALLOW
SHALLOW = 16
WARPS, STAGES = 8, 3
ORDER_WARPS = 4
HALF = 2  # bytes
LARGEST: tl.constexpr = tl.constexpr(65504.0)  # f16


@triton.jit
def order_weights(w, out, C_IN: tl.constexpr, PITCH: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (c_out, TAPS). w [c_out, C_IN, TAPS] -> out f16 [c_out, TAPS, PITCH], with zeros from C_IN on."""
    row, tap = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    values = tl.load(w + (row * C_IN + channel) * TAPS + tap, mask=channel < C_IN, other=0.0)
    tl.store(out + (row * TAPS + tap) * PITCH + channel, values.to(tl.float16), mask=channel < PITCH)


@triton.jit
def gelu(x):
    """x * Phi(x) to 1e-7 of x, with few registers: erf by Abramowitz and Stegun, Handbook of Mathematical Functions,
    7.1.26, of which one minus it is small where x is large."""
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * size)
    rest = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return tl.maximum(x, 0.0) - 0.5 * size * rest * tl.exp(-0.5 * x * x)


@triton.jit
def planar_products(
    x,
    w,
    image,
    top,
    left,
    channel,
    height,
    width,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Of x float32 [n, C_IN, height, width] with w float32 [C_OUT, C_IN, SIDE, SIDE], as they are in a graph."""
    LENGTH: tl.constexpr = C_IN * SIDE * SIDE
    sums = tl.zeros((image.shape[0], channel.shape[0]), tl.float32)
    start = x + image.to(tl.int64)[:, None] * (C_IN * height * width)
    for first in range(0, LENGTH, DEPTH):
        k = first + tl.arange(0, DEPTH)
        tap = k % (SIDE * SIDE)
        y, z = top[:, None] + (tap // SIDE)[None, :], left[:, None] + (tap % SIDE)[None, :]
        inside = (k < LENGTH)[None, :] & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        at = (k // (SIDE * SIDE))[None, :] * (height * width) + y * width + z
        a = tl.load(start + at, mask=inside, other=0.0).to(tl.float16)
        exists = (k < LENGTH)[:, None] & (channel < C_OUT)[None, :]
        b = tl.load(w + channel[None, :] * LENGTH + k[:, None], mask=exists, other=0.0).to(tl.float16)
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def stacked_products(
    x,
    w,
    image,
    top,
    left,
    channel,
    height,
    width,
    PITCH: tl.constexpr,
    C_OUT: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Of x f16 [n, width, height, PITCH] with w f16 [C_OUT, SIDE, SIDE, PITCH]. A step of a product is within one tap,
    so that where it is, and whether a pixel has it, is the same for all its channels."""
    STEPS: tl.constexpr = PITCH // DEPTH
    depth = tl.arange(0, DEPTH)
    first = (image.to(tl.int64) * width + left) * height + top  # of each pixel; it may lie outside
    pixels = x + first[:, None] * PITCH + depth[None, :]
    rows = w + tl.minimum(channel, C_OUT - 1)[None, :] * (SIDE * SIDE * PITCH) + depth[:, None]
    sums = tl.zeros((image.shape[0], channel.shape[0]), tl.float32)
    for step in range(SIDE * SIDE * STEPS):
        tap, start = step // STEPS, step % STEPS * DEPTH
        down, right = tap // SIDE, tap % SIDE
        y, z = top + down, left + right
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        a = tl.load(pixels + ((right * height + down) * PITCH + start), mask=inside[:, None], other=0.0)
        b = tl.load(rows + (tap * PITCH + start))
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def halve(y, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The columns of y [ROWS, COLS] in two halves."""
    HALVES: tl.constexpr = (ROWS, 2, COLS // 2)
    return tl.split(tl.permute(tl.reshape(y, HALVES), (0, 2, 1)))


@triton.jit
def finish(
    y, bias, out, at, exists, channel, to_channel, C_OUT: tl.constexpr, WRITTEN: tl.constexpr, GELU: tl.constexpr
):
    """What follows a product, and its writing."""
    y += tl.load(bias + channel, mask=channel < C_OUT, other=0.0)[None, :]
    if GELU:
        y = gelu(y)
    y = tl.where((channel < C_OUT)[None, :], y, 0.0)
    if out.dtype.element_ty == tl.float16:
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    inside = exists[:, None] & (channel < WRITTEN)[None, :]
    tl.store(out + at[:, None] + (channel * to_channel)[None, :], y.to(out.dtype.element_ty), mask=inside)


SIZES = ["n_pixels", "height", "width", "out_height", "out_width", "to_image", "to_row", "to_column"]


@triton.jit(do_not_specialize=SIZES)
def convolve(
    x,
    w,
    bias,
    out,
    n_pixels,
    height,
    width,
    out_height,
    out_width,
    to_image,
    to_channel,
    to_row,
    to_column,
    PRODUCTS: tl.constexpr,
    IN: tl.constexpr,
    C_OUT: tl.constexpr,
    WRITTEN: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    GELU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of pixels and channels a program; programs that share pixels follow each other.

    `PRODUCTS`: one of the two above, and `IN` its channels or pitch. `WRITTEN`: channels of the result, zeros from
    C_OUT on. `to_...`: distances in the result, which has any order of axes; pixels are taken down columns.
    """
    tiles: tl.constexpr = (WRITTEN + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    pixel = program // tiles * PIXELS + tl.arange(0, PIXELS)
    channel = program % tiles * CHANNELS + tl.arange(0, CHANNELS)
    exists = pixel < n_pixels
    pixel = tl.minimum(pixel, n_pixels - 1)
    row, column = pixel % out_height, pixel // out_height % out_width
    image = pixel // (out_height * out_width)
    top, left = row * STRIDE - PADDING, column * STRIDE - PADDING
    y = PRODUCTS(x, w, image, top, left, channel, height, width, IN, C_OUT, SIDE, DEPTH)
    at = image.to(tl.int64) * to_image + row * to_row + column * to_column
    channel = program % tiles * CHANNELS + tl.arange(0, CHANNELS // 4)  # a quarter at a time: all take many registers
    low, high = halve(y, PIXELS, CHANNELS)
    for part in tl.static_range(2):
        first, second = halve(high if part else low, PIXELS, CHANNELS // 2)
        here = channel + part * (CHANNELS // 2)
        finish(first, bias, out, at, exists, here, to_channel, C_OUT, WRITTEN, GELU)
        finish(second, bias, out, at, exists, here + CHANNELS // 4, to_channel, C_OUT, WRITTEN, GELU)


@dataclass(frozen=True)
class Place:
    """Where a result goes: `shape` [n, channels, height, width], and how far apart its numbers are along these axes."""

    memory: torch.Tensor
    shape: tuple[int, ...]
    distances: tuple[int, ...]


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, *, stride: int, padding: int
) -> None:
    """out [n, c_out, h', w'] = x [n, c_in, h, w] convolved with weight [c_out, c_in, side, side], + bias [c_out]; all
    float32, and factors are rounded to f16."""
    place = Place(out, tuple(out.shape), out.stride())
    _launch(x, weight, weight.shape, bias, place, x.shape[2:], stride, padding, planar=True, gelu=False)


def conv_stack(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    scratch: torch.Tensor | None,
    *,
    stride: int,
    padding: int,
) -> None:
    """out = gelu(conv2d(... gelu(conv2d(x)))): x float32 [n, c_in, h, w]; out float32 [n, c_out, h', w'] with any
    strides; scratch uint8, `stack_scratch_bytes` of it. What is between is f16, and ends at 65504."""
    shapes = [tuple(weight.shape) for weight in weights]
    sizes = image_sizes(x.shape[2:], shapes, stride, padding)
    images, ordered = _split_scratch(x.shape[0], shapes, sizes, scratch)
    for i, weight in enumerate(weights):
        if i > 0:
            _order(weight, ordered[i - 1])
        if i + 1 < len(weights):
            place = _pixel_place(images[i], x.shape[0], pitch_of(shapes[i][0]), sizes[i + 1])
        else:
            place = Place(out, tuple(out.shape), out.stride())
        source, factors = (images[i - 1], ordered[i - 1]) if i else (x, weight)
        _launch(source, factors, shapes[i], biases[i], place, sizes[i], stride, padding, planar=i == 0, gelu=True)


def stack_scratch_bytes(
    n: int, sizes: Sequence[int], shapes: Sequence[tuple[int, ...]], stride: int, padding: int
) -> int:
    """Of `conv_stack` for n images of height and width `sizes` and weights of these shapes."""
    return sum(_part_bytes(n, shapes, image_sizes(sizes, shapes, stride, padding)))


def image_sizes(
    sizes: Sequence[int], shapes: Sequence[tuple[int, ...]], stride: int, padding: int
) -> list[tuple[int, int]]:
    """Height and width of the input of each convolution, and of the last one's result."""
    height, width = sizes
    found = [(height, width)]
    for shape in shapes:
        height, width = ((size + 2 * padding - shape[2]) // stride + 1 for size in (height, width))
        found.append((height, width))
    return found


def pitch_of(n_channels: int) -> int:
    """Channels that a pixel has between convolutions."""
    return triton.cdiv(n_channels, DEPTH) * DEPTH


def _part_bytes(n: int, shapes: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Of the images between the convolutions, then of the weights of all but the first in the order of pixels."""
    images = [HALF * n * math.prod(size) * pitch_of(shape[0]) for size, shape in zip(sizes[1:-1], shapes, strict=False)]
    return images + [HALF * c_out * side * side * pitch_of(c_in) for c_out, c_in, side, _ in shapes[1:]]


def _split_scratch(
    n: int, shapes: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, int]], scratch: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    parts = _part_bytes(n, shapes, sizes)
    if not parts:
        return [], []
    assert scratch is not None, f"{sum(parts)} bytes of scratch are needed"
    assert scratch.numel() >= sum(parts), f"{scratch.numel()=} {sum(parts)=}"
    ends = list(accumulate(parts))
    halves = [scratch[end - size : end].view(torch.float16) for end, size in zip(ends, parts, strict=True)]
    return halves[: len(shapes) - 1], halves[len(shapes) - 1 :]


def _pixel_place(memory: torch.Tensor, n: int, pitch: int, size: tuple[int, int]) -> Place:
    height, width = size
    return Place(memory, (n, pitch, height, width), (width * height * pitch, 1, pitch, height * pitch))


def _order(weight: torch.Tensor, out: torch.Tensor) -> None:
    c_out, c_in, side, _ = weight.shape
    pitch = pitch_of(c_in)
    block = triton.next_power_of_2(pitch)
    launch(order_weights, (c_out, side * side), weight, out, c_in, pitch, side * side, block, num_warps=ORDER_WARPS)


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    shape: Sequence[int],
    bias: torch.Tensor,
    place: Place,
    size: Sequence[int],
    stride: int,
    padding: int,
    *,
    planar: bool,
    gelu: bool,
) -> None:
    """`shape`: of the weight in the file; `size`: height and width of the input."""
    (c_out, c_in, side, _), (n, written, height, width) = shape, place.shape
    n_pixels = n * height * width
    launch(
        convolve,
        (triton.cdiv(n_pixels, PIXELS) * triton.cdiv(written, CHANNELS),),
        x,
        w,
        bias,
        place.memory,
        n_pixels,
        *size,
        height,
        width,
        *place.distances,
        PRODUCTS=planar_products if planar else stacked_products,
        IN=c_in if planar else pitch_of(c_in),
        C_OUT=c_out,
        WRITTEN=written,
        SIDE=side,
        STRIDE=stride,
        PADDING=padding,
        GELU=gelu,
        PIXELS=PIXELS,
        CHANNELS=CHANNELS,
        DEPTH=depth_of(c_in * side * side) if planar else DEPTH,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def depth_of(length: int) -> int:
    """Of a step of a product that is so long: one step, if it can."""
    return min(DEPTH, max(SHALLOW, triton.next_power_of_2(length)))


def static_cases() -> Iterator[Case]:
    """The stem of the 4B model: one channel to 480, twice 480 to 480, and the last result goes to rows of a matrix."""
    c, side, windows = 480, 3, 8
    numbers = dict.fromkeys(("height", "width", "out_height", "out_width", "to_image", "to_row", "to_column"), "i32")
    numbers["n_pixels"] = "i32"
    tile = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "SIDE": side, "STRIDE": 2, "PADDING": 1, "GELU": True}

    def case(name: str, kind: str, out: str, constants: dict[str, Any]) -> Case:
        signature = {"x": f"*{kind}", "w": f"*{kind}", "bias": "*fp32", "out": f"*{out}"} | numbers
        signature |= {} if "to_channel" in constants else {"to_channel": "i32:16"}
        weights = ("x", "w")
        return Case(name, "F16", {"windows": windows}, convolve, signature, tile | constants, WARPS, STAGES, weights)

    first = {"PRODUCTS": planar_products, "IN": 1, "DEPTH": depth_of(side * side)}
    later = {"PRODUCTS": stacked_products, "IN": pitch_of(c), "DEPTH": DEPTH, "C_OUT": c}
    yield case("conv_first", "fp32", "fp16", first | {"C_OUT": c, "WRITTEN": pitch_of(c), "to_channel": 1})
    yield case("conv_middle", "fp16", "fp16", later | {"WRITTEN": pitch_of(c), "to_channel": 1})
    yield case("conv_last", "fp16", "fp32", later | {"WRITTEN": c})
    constants = {"C_IN": c, "PITCH": pitch_of(c), "TAPS": side * side, "BLOCK": triton.next_power_of_2(pitch_of(c))}
    yield Case("order_weights", "F16", {}, order_weights, {"w": "*fp32", "out": "*fp16"}, constants, ORDER_WARPS, 1)
