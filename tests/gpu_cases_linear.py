"""Cases of the linear kernels, run by Triton's interpreter in a process of their own: see test_gpu_linear.py.

    TRITON_INTERPRET=1 python tests/gpu_cases_linear.py
    python tests/gpu_cases_linear.py --card          # on the GPU of this machine

prints a line of JSON for each case: its name and its relative error (norm) against float64, or what went wrong.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Format
from auricle.kernels.gpu.activations import padded_cols, record_words
from auricle.kernels.gpu.linear import Best, Norm, best_programs, gated_linear, linear, scratch_bytes
from auricle.kernels.gpu.matmul import decode_run
from auricle.kernels.gpu.tiles import TILES, by_piece, by_row
from auricle.kernels.gpu.tune import FEW, Config
from auricle.kernels.gpu.weights import DeviceWeight, device_weight
from gpu_device import DEVICE

EPS = 1e-6
CASES: dict[str, Callable[[], float]] = {}


def case(run: Callable[[], float], name: str) -> None:
    assert name not in CASES, name
    CASES[name] = run


def pick(kernel: str, format_name: str, n_tokens: int, n_rows: int, n_cols: int) -> Config:
    """Small tiles, so that a case has several programs, a last one that is not full, and few enough for a test."""
    if kernel == "matvec":
        return Config(rows=16, cols=256, tokens=8, warps=4, stages=2)
    return Config(rows=32, cols=128, tokens=32 if n_tokens > 16 else 16, warps=4, stages=1)


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def random_rows(rng: np.random.Generator, fmt: Format, n_rows: int, n_cols: int) -> np.ndarray:
    """Any bytes, but scales that are small numbers: uint8 [n_rows, row_bytes]."""
    if fmt.length == 1:
        x = rng.standard_normal((n_rows, n_cols)).astype(np.float32)
        if fmt is F32:
            return x.view(np.uint8)
        return (x.astype(np.float16) if fmt is F16 else (x.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
    rows = rng.integers(0, 256, (n_rows, fmt.row_bytes(n_cols)), dtype=np.uint8)
    blocks = rows.view(fmt.layout)
    for field in {"d", "dmin"} & set(fmt.layout.names):
        blocks[field] = rng.standard_normal(blocks[field].shape) * 0.01
    return rows


def make(rng: np.random.Generator, fmt: Format, n_rows: int, n_cols: int) -> tuple[DeviceWeight, np.ndarray]:
    """A weight, and what it means in float64."""
    rows = random_rows(rng, fmt, n_rows, n_cols)
    return device_weight(rows, fmt, DEVICE), dequantize(rows, fmt).astype(np.float64)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan, device=DEVICE)


def poisoned_scratch(n_tokens: int, n_cols: int) -> torch.Tensor:
    return torch.full(
        (scratch_bytes(n_tokens, n_cols),), 255, dtype=torch.uint8, device=DEVICE
    )  # NaN as f16 and float32


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).to(DEVICE)


def error(got: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got.double().cpu().numpy() - wanted) / np.linalg.norm(wanted))


def normed(x: np.ndarray, kind: str, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * gain + shift
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * gain if kind == "rms" else x


def meant(scratch: torch.Tensor, wanted: np.ndarray) -> np.ndarray:
    """The tokens that lie rounded in the scratch of a product, float64, after a look at each number of their records.

    `wanted` [n, n_cols]: what was rounded."""
    n, n_cols = wanted.shape
    words = scratch.numpy().view(np.int32)[: n * record_words(n_cols)].reshape(n, -1, 24)
    codes = words[:, :, :16].copy().view(np.int8).reshape(n, -1, 2, 32).astype(np.int64)
    scales, products = (words[:, :, i : i + 2].copy().view(np.float32).astype(np.float64) for i in (16, 18))
    assert np.array_equal(words[:, :, 20:].reshape(n, -1, 2, 2), codes.reshape(n, -1, 2, 2, 16).sum(-1) * -32)
    assert np.allclose(products, scales * codes.sum(-1), rtol=1e-6, atol=0)
    padded = np.zeros((n, padded_cols(n_cols)))
    padded[:, :n_cols] = wanted
    off = np.abs(codes * scales[..., None] - padded.reshape(codes.shape))
    assert (off <= 0.5001 * scales[..., None]).all(), f"{(off / scales[..., None]).max()} of a step"
    assert (np.abs(codes).max(-1) == 127)[padded.reshape(codes.shape).any(-1)].all(), "a scale is too large"
    return (codes * scales[..., None]).reshape(n, -1)[:, :n_cols]


def is_rounded(fmt: Format, n_tokens: int, exact: bool) -> bool:
    return n_tokens <= FEW and not exact and fmt.length > 1


def run_linear(
    name: str,
    parts: list[tuple[Format, int]],
    n_tokens: int,
    n_cols: int,
    *,
    norm: str = "none",
    bias: bool = False,
    residual: bool = False,
    gelu: bool = False,
    large: bool = False,
    exact: bool = False,
) -> float:
    """`parts`: type and rows of each weight. `large`: a channel of x of 1e5, as residual streams have."""
    rng = rng_of(name)
    x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32) + (2 if norm == "layer" else 0)
    if large:
        x[:, 3] = 1e5
    gain, shift = (rng.standard_normal(n_cols).astype(np.float32) for _ in range(2))
    weights, meanings = zip(*(make(rng, fmt, n, n_cols) for fmt, n in parts), strict=True)
    biases = [rng.standard_normal(n).astype(np.float32) if bias else None for _, n in parts]
    added = rng.standard_normal((n_tokens, parts[0][1])).astype(np.float32) if residual else None
    how = Norm(norm, tensor(gain), tensor(shift) if norm == "layer" else None, EPS) if norm != "none" else None
    runs = []
    for _ in range(2):
        outs, scratch = [poisoned(n_tokens, n) for _, n in parts], poisoned_scratch(n_tokens, n_cols)
        linear(
            tensor(x),
            weights,
            [tensor(b) if bias else None for b in biases],
            outs,
            norm=how,
            residual=tensor(added) if residual else None,
            epilogue="gelu" if gelu else "none",
            scratch=scratch,
            exact=exact,
            pick=pick,
        )
        runs.append(outs)
        if n_tokens not in (1, 17):
            break
    tokens = normed(x, norm, gain, shift)
    rounded = meant(scratch, tokens) if any(is_rounded(fmt, n_tokens, exact) for fmt, _ in parts) else tokens
    wanted = []
    for (fmt, _), w, b in zip(parts, meanings, biases, strict=True):
        y = (rounded if is_rounded(fmt, n_tokens, exact) else tokens) @ w.T + (b if bias else 0)
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) if gelu else y
        wanted.append(y + added if residual else y)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[-1], strict=True)), "two runs give different bits"
    return max(error(y, w) for y, w in zip(runs[0], wanted, strict=True))


def add_linear(*parts: tuple[Format, int], n_tokens: int, n_cols: int, **options: object) -> None:
    kinds = "+".join(f"{fmt}x{n}" for fmt, n in parts)
    name = " ".join(["linear", kinds, f"k{n_cols}", f"n{n_tokens}", *(f"{k}={v}" for k, v in options.items())])
    case(lambda: run_linear(name, list(parts), n_tokens, n_cols, **options), name)


def run_gated(
    name: str, gate: Format, up: Format, n_tokens: int, n_rows: int, n_cols: int, norm: str, exact: bool
) -> float:
    rng = rng_of(name)
    x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
    gain = rng.standard_normal(n_cols).astype(np.float32)
    (g, g64), (u, u64) = make(rng, gate, n_rows, n_cols), make(rng, up, n_rows, n_cols)
    x64, out, scratch = normed(x, norm, gain, gain), poisoned(n_tokens, n_rows), poisoned_scratch(n_tokens, n_cols)
    how = Norm("rms", tensor(gain), None, EPS) if norm == "rms" else None
    gated_linear(tensor(x), g, u, out, norm=how, scratch=scratch, exact=exact, pick=pick)
    rounded = [is_rounded(fmt, n_tokens, exact) for fmt in (gate, up)]
    x8 = meant(scratch, x64) if any(rounded) else x64
    gates, ups = ((x8 if r else x64) @ w.T for r, w in zip(rounded, (g64, u64), strict=True))
    return error(out, gates / (1 + np.exp(-gates)) * ups)


def run_alone(name: str, fmt: Format, how: str, exact: bool) -> float:
    """A row has the same bits whatever other tokens are there: alone, among few, in either pass of many."""
    rng, n_cols, n_rows = rng_of(name), 256, 17
    x = tensor(rng.standard_normal((FEW, n_cols)) * np.exp(rng.standard_normal((FEW, 1))))
    gain = tensor(rng.standard_normal(n_cols))
    weights = [make(rng, fmt, n_rows, n_cols)[0] for _ in range(2 if how == "gated" else 1)]
    norm = None if how == "plain" else Norm("rms", gain, None, EPS)

    def product(rows: slice) -> torch.Tensor:
        tokens = x[rows].contiguous()
        out, scratch = poisoned(len(tokens), n_rows), poisoned_scratch(len(tokens), n_cols)
        shared = {"norm": norm, "scratch": scratch, "exact": exact, "pick": pick_by_tokens}
        if how == "gated":
            gated_linear(tokens, *weights, out, **shared)
        else:
            linear(tokens, weights, [None], [out], **shared)
        return out

    together = product(slice(FEW))
    assert bool(torch.isfinite(together).all())
    for rows in (slice(9, 10), slice(3, 5), slice(10, 13)):
        assert torch.equal(product(rows), together[rows]), f"tokens {rows.start} to {rows.stop - 1} have other bits"
    return 0.0


def pick_by_tokens(kernel: str, format_name: str, n_tokens: int, n_rows: int, n_cols: int) -> Config:
    """Everything but the columns changes with the tokens, as it may in a tuned table."""
    n = min(n_tokens, 8)
    return Config(rows=8 if n == 1 else 32, cols=256, tokens=n, warps=4 if n < 4 else 2, stages=1 + n % 2)


def run_unsound(name: str, exact: bool) -> float:
    """A value that is not finite is seen in every output of its token, and in no other."""
    rng, n_cols = rng_of(name), 512
    x = rng.standard_normal((2, n_cols)).astype(np.float32)
    x[1, 77] = math.inf
    out, weight = poisoned(2, 9), make(rng, Q4_K, 9, n_cols)[0]
    linear(tensor(x), [weight], [None], [out], scratch=poisoned_scratch(2, n_cols), exact=exact, pick=pick)
    assert bool(torch.isfinite(out[0]).all())
    assert not bool(torch.isfinite(out[1]).any())
    return 0.0


def run_best(name: str, fmt: Format, n_tokens: int, n_rows: int, n_cols: int) -> float:
    """The largest output, of several equal ones the first; rows that do not exist never win."""
    rng = rng_of(name)
    x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
    rows = random_rows(rng, fmt, n_rows, n_cols)
    rows[n_rows // 2 :] = rows[: n_rows - n_rows // 2]
    weight = device_weight(rows, fmt, DEVICE)
    logits = x.astype(np.float64) @ dequantize(rows, fmt).astype(np.float64).T
    n = best_programs(weight, n_tokens, pick)
    best = Best(poisoned(n, n_tokens), torch.full((n, n_tokens), -1, dtype=torch.int32, device=DEVICE))
    scratch = poisoned_scratch(n_tokens, n_cols)
    linear(tensor(x), [weight], [None], [None], best=best, scratch=scratch, exact=True, pick=pick)
    first = best.values.argmax(0)
    found = best.indices[first, torch.arange(n_tokens, device=DEVICE)]
    assert found.tolist() == logits[:, : n_rows // 2].argmax(1).tolist(), f"{found=}"
    return error(best.values.max(0).values, logits.max(1))


def run_shapes() -> float:
    """The largest error over shapes that hypothesis thinks of."""
    errors = []

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from([F16, Q8_0, Q4_K]), st.sampled_from([1, 2, 3, 17]), st.integers(1, 40), st.integers(1, 3))
    def check(fmt: Format, n_tokens: int, n_rows: int, n_blocks: int) -> None:
        n_cols = n_blocks * fmt.length if fmt.length == 32 else n_blocks * 256 if fmt.length == 256 else n_blocks * 23
        errors.append(run_linear("any shape", [(fmt, n_rows)], n_tokens, n_cols))

    check()
    return max(errors)


@triton.jit
def decode_tile(w, out, DECODE: tl.constexpr, SHAPE: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Every weight of every piece: float32 from the codes, and the f16 of the mat-mat, as [2, ROWS, columns]."""
    RUNS: tl.constexpr = SHAPE.runs
    PER_WORD: tl.constexpr = SHAPE.per_word
    words = w + by_row(tl.arange(0, ROWS) * SHAPE.stride)
    piece = by_piece(tl.arange(0, PIECES))
    codes, scales, minima = DECODE(words, piece, SHAPE.planes)
    n_cols: tl.constexpr = PIECES * SHAPE.weights
    row = by_row(tl.arange(0, ROWS) * n_cols)
    column = piece // 2 * (2 * SHAPE.weights) + piece % 2 * SHAPE.next_piece
    run: tl.constexpr = 4 * SHAPE.per_word
    for r in tl.static_range(RUNS):
        for e in tl.static_range(PER_WORD):
            weight = codes[r * PER_WORD + e]
            if len(scales) > 0:
                weight = weight * 2.0 ** (0 - SHAPE.code_shift * e - SHAPE.run_shift * r) * scales[r]
            if len(minima) > 0:
                weight -= minima[r]
            at = column + r * SHAPE.next_run + tl.arange(0, 4)[None, None, :] * SHAPE.per_word + e
            tl.store(out + row + at, weight)
        half = decode_run(codes, scales, minima, r, SHAPE, ROWS, PIECES * run)
        inner = tl.arange(0, PIECES * run)
        p = inner // run
        at = p // 2 * (2 * SHAPE.weights) + p % 2 * SHAPE.next_piece + r * SHAPE.next_run + inner % run
        tl.store(out + ROWS * n_cols + tl.arange(0, ROWS)[:, None] * n_cols + at[None, :], half.to(tl.float32))


def run_decode(name: str, fmt: Format) -> float:
    """Tiles are exact: float32 to the bit, and f16 is that, rounded once."""
    pieces, rows = 16, 8
    n_cols = pieces * TILES[fmt].shape.weights
    weight, meaning = make(rng_of(name), fmt, rows, n_cols)
    out = poisoned(2, rows, n_cols)
    decode_tile[(1,)](weight.words, out, weight.tile.decode, weight.shape, rows, pieces)
    assert np.array_equal(out[0].cpu().numpy(), meaning.astype(np.float32)), "float32 differs"
    assert np.array_equal(out[1].cpu().numpy(), meaning.astype(np.float16).astype(np.float32)), "f16 differs"
    return 0.0


def add_cases() -> None:
    for fmt in TILES:
        name = f"decode {fmt}"
        case(lambda name=name, fmt=fmt: run_decode(name, fmt), name)
    # A few tokens: each type, each power of two and others, rows that do not fill the last program, columns that do not
    # fill a step, odd numbers of blocks.
    few = (1, 2, 3, 4, 5, 7, 8, 9)
    for n_tokens, fmt in zip(few, (Q4_K, Q6_K, Q5_K, Q8_0, F16, BF16, F32, Q4_0), strict=True):
        add_linear((fmt, 17), n_tokens=n_tokens, n_cols=768 if n_tokens <= 4 else 256)
        add_linear((fmt, 9), n_tokens=1, n_cols=max(96, fmt.length))
        if fmt.length > 1:
            add_linear((fmt, 9), n_tokens=1, n_cols=512, exact=True)
    add_linear((Q4_K, 9), n_tokens=16, n_cols=256)
    add_linear((F16, 9), n_tokens=2, n_cols=75)
    add_linear((F32, 9), n_tokens=1, n_cols=29)
    add_linear((Q4_K, 13), n_tokens=2, n_cols=512, norm="rms", large=True)
    add_linear((Q4_K, 13), n_tokens=2, n_cols=512, norm="rms", large=True, exact=True)
    add_linear((Q6_K, 8), n_tokens=1, n_cols=512, norm="rms", residual=True)
    add_linear((Q8_0, 8), n_tokens=2, n_cols=96, norm="layer", bias=True, gelu=True)
    add_linear((Q8_0, 8), n_tokens=1, n_cols=1280, bias=True, residual=True)
    add_linear((Q4_K, 17), (Q4_K, 5), (Q6_K, 9), n_tokens=1, n_cols=512, norm="rms")
    add_linear((Q8_0, 9), (F16, 5), n_tokens=3, n_cols=160, norm="layer", bias=True)
    add_linear((Q8_0, 9), (F16, 5), (Q4_0, 5), (BF16, 5), n_tokens=2, n_cols=64)
    # Many tokens.
    counts = (17, 20, 33, 64, 33, 20, 17, 33)
    for n_tokens, fmt in zip(counts, TILES, strict=True):
        add_linear((fmt, 41), n_tokens=n_tokens, n_cols=512 if fmt.length > 32 else 768)
    for fmt in (F16, Q8_0, Q4_0):
        add_linear((fmt, 9), n_tokens=17, n_cols=96)
    add_linear((F16, 9), n_tokens=17, n_cols=75, bias=True)
    add_linear((Q4_K, 9), n_tokens=257, n_cols=256)
    add_linear((Q4_K, 33), n_tokens=17, n_cols=512, large=True)
    add_linear((Q4_K, 33), n_tokens=17, n_cols=512, norm="rms", large=True, residual=True)
    add_linear((Q8_0, 33), n_tokens=17, n_cols=160, norm="layer", bias=True, gelu=True)
    add_linear((Q4_K, 33), (Q4_K, 5), (Q6_K, 9), n_tokens=17, n_cols=512, norm="rms")
    for gate, up, n_tokens, exact in (
        (Q4_K, Q4_K, 1, False),
        (Q4_K, Q4_K, 1, True),
        (Q4_K, Q6_K, 3, False),
        (Q8_0, F16, 2, False),
        (Q8_0, F16, 17, False),
        (Q4_K, Q5_K, 20, False),
    ):
        name = f"gated {gate} {up} n{n_tokens} exact={exact}"
        case(lambda n=name, g=gate, u=up, t=n_tokens, e=exact: run_gated(n, g, u, t, 21, 512, "rms", e), name)
    for fmt in TILES:
        name = f"alone {fmt} plain"
        case(lambda n=name, f=fmt: run_alone(n, f, "plain", False), name)
    for fmt, how, exact in (
        (Q4_K, "gated", False),
        (Q6_K, "normed", False),
        (Q8_0, "gated", False),
        (Q4_K, "normed", True),
    ):
        name = f"alone {fmt} {how} exact={exact}"
        case(lambda n=name, f=fmt, h=how, e=exact: run_alone(n, f, h, e), name)
    for exact in (False, True):
        name = f"unsound exact={exact}"
        case(lambda n=name, e=exact: run_unsound(n, e), name)
    case(run_shapes, "any shape")
    for fmt, n_tokens in ((Q6_K, 1), (Q4_K, 4)):
        name = f"best {fmt} n{n_tokens}"
        case(lambda n=name, f=fmt, t=n_tokens: run_best(n, f, t, 42, 256), name)


add_cases()

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--card"]
    for name, run in CASES.items():
        if words and not any(word in name for word in words):
            continue
        start = time.perf_counter()
        try:
            result = {"error": run()}
        except AssertionError as failure:
            result = {"failure": str(failure)}
        print(json.dumps({"case": name, **result, "seconds": round(time.perf_counter() - start, 2)}), flush=True)
