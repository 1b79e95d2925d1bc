"""The kernels of `linear.py` as cases to compile without a GPU: each type, in the configurations of real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from ..formats import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Format
from . import tune
from .activations import COLS, padded_cols, prepare_few, record_words
from .few import CHUNK, Picker
from .linear import pieces_of, pitch_of
from .matmul import matmul, prepare
from .matvec import matvec, matvec_gated, matvec_three
from .static import Case
from .tiles import TILES
from .tune import PASS, WARP, Config, ahead_of, lanes_of
from .units import UNITS, Unit

D_MODEL, D_FF, N_VOCAB = 2560, 9728, 151936  # of the 4B model
ROWS = "i32:16"  # matrices whose rows are multiples of 16, as those of all models are

FLOATS = dict.fromkeys(("x", "gain"), "*fp32") | {"eps": "fp32"}


def static_cases(capability: tuple[int, int] = (8, 9)) -> Iterator[Case]:
    """As products are cut on such a processor."""
    pick = partial(tune.pick, capability=capability)
    for fmt in (F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K):
        for n_tokens in (1, 2, 4, 8):
            yield matvec_case(fmt, n_tokens, pick)
        for n_tokens in (32, 64, 512):
            yield matmul_case(fmt, n_tokens, pick)
        if fmt.length > 1:
            yield matvec_case(fmt, 1, pick, exact=True)
            for n_tokens in (1, 8):
                yield gated_case(fmt, n_tokens, pick)
    for n_tokens in (1, 8):
        yield three_case((Q4_K, Q4_K, Q6_K), n_tokens, pick)
        yield three_case((Q8_0, Q8_0, Q8_0), n_tokens, pick)
    for fmt in (Q4_K, Q6_K):
        yield best_case(fmt, pick)
    for fmt in (Q4_K, Q6_K, Q8_0):
        yield matmul_case(fmt, 512, pick, gated=True)
    for n_cols in (D_MODEL, D_FF):
        yield prepare_case(n_cols)
    for norm in ("none", "rms", "layer"):
        yield prepare_few_case(D_FF if norm == "none" else D_MODEL, norm)


def _config(cut: Config, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(cut).items() if key not in ("warps", "stages")} | more


def _in_flight(cut: Config, n_cols: int, *formats: Format) -> int:
    """Bytes of weights that a thread has on their way at once, of the type with the fewest."""
    found = []
    for fmt in formats:
        unit = UNITS[fmt].unit.weights
        rows = cut.rows * lanes_of(cut, unit) / (cut.warps * WARP)  # of a thread
        found.append(rows * ahead_of(cut, unit, n_cols) * unit * fmt.bits_per_weight / 8)
    return int(min(found))


def _share(fmt: Format, cut: Config, n_cols: int, *, exact: bool = False, number: str = "") -> dict[str, Any]:
    """What a mat-vec kernel must know of a matrix, under the names of its arguments."""
    kind = UNITS[fmt]
    unit = kind.matrix(n_cols, exact)
    pitch = record_words(n_cols) if unit.rounded else padded_cols(n_cols)
    shared = {"LOAD": kind.load, "DECODE": kind.decode, "UNIT": unit, "PITCH": pitch}
    shared |= {"LANES": lanes_of(cut, unit.weights), "AHEAD": ahead_of(cut, unit.weights, n_cols)}
    return {name + number: value for name, value in shared.items()}


def _few(cut: Config, n_tokens: int, n_cols: int) -> dict[str, Any]:
    passes = -(-n_tokens // PASS)
    return {"N_COLS": n_cols, "PASSES": passes, "TOKENS": min(n_tokens, PASS), "ROWS": cut.rows}


def _x(unit: Unit) -> str:
    return "*i32" if unit.rounded else "*fp32"


def _work(cut: Config, n_tokens: int, n_cols: int, *units: Unit) -> dict[str, Any]:
    """What a thread does: weights of its rows, and products of four of them with a token, steps that are not full
    included."""
    padded = [n_cols + -n_cols % (unit.weights * lanes_of(cut, unit.weights)) for unit in units]
    threads = cut.warps * WARP
    if not all(unit.rounded for unit in units):
        return {}
    return {
        "n_weights": cut.rows * n_cols * len(units) / threads,
        "dots": cut.rows * sum(padded) * n_tokens // (4 * threads),
    }


def matvec_case(fmt: Format, n_tokens: int, pick: Picker, *, exact: bool = False) -> Case:
    """ffn.down with a residual."""
    cut = pick("matvec", fmt.name, n_tokens, D_MODEL, D_FF)
    constants = _share(fmt, cut, D_FF, exact=exact) | _few(cut, n_tokens, D_FF) | {"GELU": False}
    constants |= dict.fromkeys(("bias", "best_value", "best_index"))
    unit = constants["UNIT"]
    signature = {"x": _x(unit), "w": "*i32", "residual": "*fp32", "out": "*fp32", "n_rows": ROWS, "n_tokens": "i32"}
    config = _config(cut, tokens=n_tokens, in_flight=_in_flight(cut, D_FF, fmt))
    work = _work(cut, n_tokens, D_FF, unit)
    name = "matvec_exact" if exact else "matvec"
    return Case(name, fmt.name, config, matvec, signature, constants, cut.warps, 1, ("w",), ("x",), **work)


def best_case(fmt: Format, pick: Picker) -> Case:
    """lm_head, of which only the likeliest token is wanted."""
    cut = pick("matvec", fmt.name, 1, N_VOCAB, D_MODEL)
    constants = _share(fmt, cut, D_MODEL) | _few(cut, 1, D_MODEL) | {"GELU": False}
    constants |= dict.fromkeys(("bias", "residual", "out"))
    signature = {
        "x": "*i32",
        "w": "*i32",
        "best_value": "*fp32",
        "best_index": "*i32",
        "n_rows": ROWS,
        "n_tokens": "i32",
    }
    work, config = _work(cut, 1, D_MODEL, constants["UNIT"]), _config(cut, in_flight=_in_flight(cut, D_MODEL, fmt))
    return Case("matvec_best", fmt.name, config, matvec, signature, constants, cut.warps, 1, ("w",), ("x",), **work)


def three_case(types: tuple[Format, Format, Format], n_tokens: int, pick: Picker) -> Case:
    """q|k|v."""
    widest = max(types, key=lambda fmt: UNITS[fmt].unit.weights)
    cut = pick("matvec", widest.name, n_tokens, 4096, D_MODEL)
    signature: dict[str, str] = {"n_tokens": "i32"}
    constants = dict.fromkeys(("bias0", "bias1", "bias2")) | _few(cut, n_tokens, D_MODEL)
    for i, fmt in enumerate(types):
        signature |= {f"x{i}": "*i32", f"w{i}": "*i32", f"out{i}": "*fp32", f"n{i}": ROWS}
        constants |= _share(fmt, cut, D_MODEL, number=str(i))
    name = "+".join(fmt.name for fmt in types)
    config = _config(cut, tokens=n_tokens, in_flight=_in_flight(cut, D_MODEL, *types))
    work = _work(cut, n_tokens, D_MODEL, *(constants[f"UNIT{i}"] for i in range(3)))
    weights, xs = ("w0", "w1", "w2"), ("x0", "x1", "x2")
    return Case("matvec_three", name, config, matvec_three, signature, constants, cut.warps, 1, weights, xs, **work)


def gated_case(fmt: Format, n_tokens: int, pick: Picker) -> Case:
    """gate|up of the feed-forward part."""
    cut = pick("matvec", fmt.name, n_tokens, D_FF, D_MODEL)
    signature = {"x0": "*i32", "x1": "*i32", "gate": "*i32", "up": "*i32", "out": "*fp32"}
    signature |= {"n_rows": ROWS, "n_tokens": "i32"}
    constants = _few(cut, n_tokens, D_MODEL)
    for i in range(2):
        constants |= _share(fmt, cut, D_MODEL, number=str(i))
    weights, xs = ("gate", "up"), ("x0", "x1")
    config = _config(cut, tokens=n_tokens, in_flight=_in_flight(cut, D_MODEL, fmt))
    work = _work(cut, n_tokens, D_MODEL, constants["UNIT0"], constants["UNIT1"])
    return Case("matvec_gated", fmt.name, config, matvec_gated, signature, constants, cut.warps, 1, weights, xs, **work)


def prepare_few_case(n_cols: int, norm: str) -> Case:
    """Tokens of a mat-vec, rounded."""
    padded = padded_cols(n_cols)
    chunk = CHUNK if norm == "none" else 1 << (padded // COLS.value - 1).bit_length()
    signature = {"x": "*fp32", "records": "*i32", "n_tokens": "i32"}
    constants = {"floats": None, "N_COLS": n_cols, "PADDED": padded, "NORM": norm, "CHUNK": chunk}
    if norm == "none":
        constants |= {"gain": None, "eps": 0.0}
    else:
        signature |= {"gain": "*fp32", "eps": "fp32"}
    if norm == "layer":
        signature["shift"] = "*fp32"
    else:
        constants["shift"] = None
    config = {"cols": n_cols, "norm": norm}
    return Case("prepare_few", "F32", config, prepare_few, signature, constants, 4 if norm == "none" else 8, 1)


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
