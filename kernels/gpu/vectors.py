"""What a thread does by itself, in the machine's own words: it loads 16 bytes, and multiplies bytes four at a time.

In tiles of one number a thread and register, nothing has to be passed around between threads, whatever a version of
Triton thinks of how a tile should lie. Each has a plain form for Triton's interpreter, with the same result to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_four(words, at):
    """Four 32-bit words, uint32, from `words + at` on, which is a multiple of 16 bytes."""
    place = (words + at).to(tl.pointer_type(tl.uint32))
    if INTERPRETED:
        return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    return tl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [place.to(tl.int64)],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_two(words, at):
    """Two 32-bit words, uint32, from `words + at` on, which is a multiple of 8 bytes."""
    place = (words + at).to(tl.pointer_type(tl.uint32))
    if INTERPRETED:
        return tl.load(place), tl.load(place + 1)
    return tl.inline_asm_elementwise(
        "ld.global.v2.b32 {$0, $1}, [$2];",
        "=r,=r,l",
        [place.to(tl.int64)],
        dtype=(tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_one(words, at):
    """A 32-bit word, uint32, at `words + at`."""
    place = (words + at).to(tl.pointer_type(tl.uint32))
    if INTERPRETED:
        return tl.load(place)
    return tl.inline_asm_elementwise(
        "ld.global.b32 $0, [$1];", "=r,l", [place.to(tl.int64)], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def rotate(word, right):
    """A word, its bits `right` places further down; those that fall out come in at the top."""
    if INTERPRETED:
        return (word >> right) | (word << ((32 - right) & 31))
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $1, $2;", "=r,r,r", [word, right], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def add_dot(total, codes, values, SIGNED: tl.constexpr):
    """total + the four products of the bytes in two words: `codes`, signed or not, and `values`, signed."""
    if INTERPRETED:
        shift = tl.arange(0, 4)[None, None, :] * 8
        wide_codes = codes.to(tl.int32, bitcast=True)[:, :, None]
        wide_values = values.to(tl.int32, bitcast=True)[:, :, None]
        left = (wide_codes << (24 - shift)) >> 24 if SIGNED else (wide_codes >> shift) & 255
        return total + tl.sum(left * ((wide_values << (24 - shift)) >> 24), 2)
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;" if SIGNED else "dp4a.u32.s32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [codes, values, total],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def as_float(word):
    """The bits of a word as a float32."""
    return word.to(tl.float32, bitcast=True)


@triton.jit
def low_half(word):
    """The half in the low 16 bits of a word, as float32."""
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word):
    """The half in the high 16 bits of a word, as float32."""
    return low_half(word >> 16)
