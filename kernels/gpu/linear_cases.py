"""The kernels of `linear.py` as cases to compile without a GPU: each type, in the configurations of real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from ..formats import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Format
from . import tune
from .linear import Picker, few_pieces_of, pieces_of, pitch_of
from .matmul import matmul, prepare
from .matvec import matvec, matvec_gated, matvec_three
from .static import Case
from .tiles import TILES
from .tune import Config

D_MODEL, D_FF, N_VOCAB = 2560, 9728, 151936  # of the 4B model
ROWS = "i32:16"  # matrices whose rows are multiples of 16, as those of all models are

FLOATS = dict.fromkeys(("x", "gain"), "*fp32") | {"eps": "fp32"}


def static_cases(capability: tuple[int, int] = (8, 9)) -> Iterator[Case]:
    """As products are cut on such a processor."""
    pick = partial(tune.pick, capability=capability)
    for fmt in (F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K):
        for n_tokens in (1, 2, 4, 8):
            yield matvec_case(fmt, n_tokens, pick)
        for n_tokens in (16, 64, 512):
            yield matmul_case(fmt, n_tokens, pick)
    for n_tokens in (1, 4):
        yield three_case((Q4_K, Q4_K, Q6_K), n_tokens, pick)
        yield gated_case(Q4_K, n_tokens, pick)
    yield three_case((Q8_0, Q8_0, Q8_0), 1, pick)
    yield best_case(Q6_K, pick)
    for fmt in (Q4_K, Q6_K, Q8_0):
        yield matmul_case(fmt, 512, pick, gated=True)
    for n_cols in (D_MODEL, D_FF):
        yield prepare_case(n_cols)


def _config(cut: Config, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(cut).items() if key not in ("warps", "stages")} | more


def _numbers(cut: Config, n_tokens: int) -> dict[str, Any]:
    return {"NORM": "rms", "N_COLS": D_MODEL, "TOKENS": n_tokens, "ROWS": cut.rows, "shift": None}


def matvec_case(fmt: Format, n_tokens: int, pick: Picker) -> Case:
    """ffn.down: no norm, a residual."""
    cut, tile = pick("matvec", fmt.name, n_tokens, D_MODEL, D_FF), TILES[fmt]
    signature = {"x": "*fp32", "eps": "fp32", "w": "*i32", "residual": "*fp32", "out": "*fp32", "n_rows": ROWS}
    constants = {"DECODE": tile.decode, "SHAPE": tile.matrix(D_FF), "PIECES": few_pieces_of(fmt, cut), "GELU": False}
    constants |= dict.fromkeys(("gain", "shift", "bias", "best_value", "best_index"))
    constants |= {"NORM": "none", "N_COLS": D_FF, "TOKENS": n_tokens, "ROWS": cut.rows}
    config = _config(cut, tokens=n_tokens)
    return Case("matvec", fmt.name, config, matvec, signature, constants, cut.warps, cut.stages, ("w",))


def best_case(fmt: Format, pick: Picker) -> Case:
    """lm_head, of which only the likeliest token is wanted."""
    cut, tile = pick("matvec", fmt.name, 1, N_VOCAB, D_MODEL), TILES[fmt]
    signature = FLOATS | {"w": "*i32", "best_value": "*fp32", "best_index": "*i32", "n_rows": ROWS}
    constants = {"DECODE": tile.decode, "SHAPE": tile.matrix(D_MODEL), "PIECES": few_pieces_of(fmt, cut), "GELU": False}
    constants |= dict.fromkeys(("bias", "residual", "out")) | _numbers(cut, 1)
    return Case("matvec_best", fmt.name, _config(cut), matvec, signature, constants, cut.warps, cut.stages, ("w",))


def three_case(types: tuple[Format, Format, Format], n_tokens: int, pick: Picker) -> Case:
    """q|k|v after RMSNorm."""
    cut = pick("matvec", types[0].name, n_tokens, 4096, D_MODEL)
    signature, constants = dict(FLOATS), dict.fromkeys(("bias0", "bias1", "bias2")) | _numbers(cut, n_tokens)
    for i, fmt in enumerate(types):
        signature |= {f"w{i}": "*i32", f"out{i}": "*fp32", f"n{i}": ROWS}
        constants |= {f"DECODE{i}": TILES[fmt].decode, f"SHAPE{i}": TILES[fmt].matrix(D_MODEL)}
        constants[f"PIECES{i}"] = few_pieces_of(fmt, cut)
    name, config = "+".join(fmt.name for fmt in types), _config(cut, tokens=n_tokens)
    weights = ("w0", "w1", "w2")
    return Case("matvec_three", name, config, matvec_three, signature, constants, cut.warps, cut.stages, weights)


def gated_case(fmt: Format, n_tokens: int, pick: Picker) -> Case:
    """gate|up of the feed-forward part, after RMSNorm."""
    cut = pick("matvec", fmt.name, n_tokens, D_FF, D_MODEL)
    signature = FLOATS | {"gate": "*i32", "up": "*i32", "out": "*fp32", "n_rows": ROWS}
    constants = _numbers(cut, n_tokens)
    for i in range(2):
        constants |= {f"DECODE{i}": TILES[fmt].decode, f"SHAPE{i}": TILES[fmt].matrix(D_MODEL)}
        constants[f"PIECES{i}"] = few_pieces_of(fmt, cut)
    config, weights = _config(cut, tokens=n_tokens), ("gate", "up")
    return Case("matvec_gated", fmt.name, config, matvec_gated, signature, constants, cut.warps, cut.stages, weights)


def matmul_case(fmt: Format, n_tokens: int, pick: Picker, *, gated: bool = False) -> Case:
    """ffn.down with a residual, or gate|up."""
    n_rows, n_cols = (D_FF, D_MODEL) if gated else (D_MODEL, D_FF)
    kernel = "matmul_gated" if gated else "matmul"
    cut, tile = pick(kernel, fmt.name, n_tokens, n_rows, n_cols), TILES[fmt]
    signature = {"halves": "*fp16", "factors": "*fp32", "w": "*i32", "out": "*fp32", "n_rows": ROWS, "n_tokens": "i32"}
    signature |= {"up": "*i32"} if gated else {"residual": "*fp32"}
    constants: dict[str, Any] = dict.fromkeys(("bias", "residual") if gated else ("bias", "up"))
    constants |= {"DECODE": tile.decode, "SHAPE": tile.matrix(n_cols), "PIECES": pieces_of(fmt, cut)}
    constants |= {"DECODE_UP": None, "SHAPE_UP": None, "PIECES_UP": 0}
    if gated:
        constants |= {f"{name}_UP": constants[name] for name in ("DECODE", "SHAPE", "PIECES")}
    constants |= {"N_COLS": n_cols, "PITCH": pitch_of(n_cols), "GELU": False, "ROWS": cut.rows, "TOKENS": cut.tokens}
    weights = ("w", "up") if gated else ("w",)
    return Case(kernel, fmt.name, _config(cut), matmul, signature, constants, cut.warps, cut.stages, weights)


def prepare_case(n_cols: int) -> Case:
    """RMSNorm of tokens, and their f16."""
    block, warps = 1 << (n_cols - 1).bit_length(), 4
    signature = FLOATS | {"halves": "*fp16", "factors": "*fp32"}
    constants = {"shift": None, "N_COLS": n_cols, "PITCH": pitch_of(n_cols), "NORM": "rms", "BLOCK": block}
    return Case("prepare", "F32", {"cols": n_cols}, prepare, signature, constants, warps, 1)
