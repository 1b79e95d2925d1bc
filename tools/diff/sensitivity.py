"""What quantising each tensor costs: in a file that exists, and in each type the tensor could have.

Two things are measured for every matrix. Its *error*: |(W - W') x| over |W x|, for rows x that the matrix really meets
when the reference answers the request. Its *damage*: the mean Kullback-Leibler divergence of the logits, in nats, when
this matrix alone is taken from the other file and all the rest of the network is the reference's. Divergence is
quadratic in small errors, so the damage of another type follows from the ratio of squared errors, and damages of
different tensors add up; `total` says how nearly they do.

With the probe "tensor" each matrix has a run of its own, of all that comes after it. With "layer" there is a run for
each layer and one for each role (all `attn.q`, …), and a matrix gets its part of both: damages in proportion to squared
errors, scaled until layers and roles have the sums that were measured. That is a quarter of the work on a 4B model.

Positions are those of the prompt and of the reference's greedy answer, at most `network.MAX_POSITIONS` of them.

The report is one JSON object:

    format, version     "auricle.sensitivity", 1
    model               of the reference: path, name, and fingerprint (`convert.budget.fingerprint`)
    measured            how: file (whose types are judged), backend, probe, seconds of each clip, prompt, n_tokens,
                        n_positions, method (a sentence)
    total               kl: of all matrices of the file at once; sum: of the damages of each alone; bytes
    tensors             a list, most damage first, of objects:
        name, shape, type, bytes    in the file
        error           of its output, relative
        kl              its damage in nats; `share` of the sum
        types           {type: {bytes, error, kl}} for each candidate, without importance; a type whose blocks the rows
                        do not fill is replaced as in `convert.recipes`

Knows weights and logits. Does not know what is done about it (`convert.budget`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from ...convert.budget import CANDIDATES, FORMAT, VERSION, fingerprint, measured_names
from ...convert.recipes import fit_rows
from ...convert.threads import count_cores
from ...engine import Model
from ...engine.outputs import write_text
from ...engine.weights import Weight, load_weight
from ...kernels.dequantize import dequantize
from ...kernels.formats import Q4_K, Format
from ...kernels.quantize import quantize
from ..cells import cell
from .network import Network
from .request import DiffError, Request

SLAB_WEIGHTS = 1 << 22
OWN = "own"
PROBE = Q4_K  # where the file has the reference's own weights, and so nothing can be learnt from it
N_ROUNDS = 30  # of fitting layers and roles
N_SHOWN = 20  # in a terminal

Probe = Literal["tensor", "layer"]
Progress = Callable[[str, int, int], None]
ROUNDING, RUNNING = "rounding", "running"  # tensors; runs of the network
METHODS = {
    "tensor": "divergence with each matrix alone replaced; other types by the ratio of squared output errors",
    "layer": "divergence with each layer and each role replaced, shared out by squared output errors; other types by "
    "their ratio",
}


def measure(
    model: Model,
    reference: Model,
    request: Request,
    *,
    probe: Probe = "tensor",
    candidates: Sequence[Format] = CANDIDATES,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """The report on the types of `model`, against `reference`, which does the computing.

    Raises DiffError where the two are not of one shape.
    """
    shapes = {name: tensor.shape for name, tensor in reference.file.tensors.items()}
    wrong = next(
        (n for n, s in shapes.items() if n not in model.file.tensors or model.file.tensors[n].shape != s), None
    )
    if wrong:
        raise DiffError(f"{model.file.path} has no {wrong} of the reference's shape; compare files of one model")
    network = Network(reference, request)
    names = [name for name in measured_names(shapes) if name in network.uses]
    own = {name: load_weight(model.file, name) for name in names}
    errors: dict[str, dict[str, float]] = {}
    for n, name in enumerate(names):
        weight = load_weight(reference.file, name)
        formats = [fit_rows(f, weight.shape[-1]) for f in (*candidates, PROBE)]
        errors[name] = round_off(weight, network.inputs(name), formats, own[name])
        progress(ROUNDING, n + 1, len(names))
    damage = _probe(network, own, errors, probe, progress)
    whole = {name: own[name] for name in names if errors[name][OWN] > 0}
    total = network.divergence(whole) if whole else 0.0
    rows = [_describe(own[name], errors[name], damage[name], candidates) for name in names]
    return _document(model, network, request, probe, rows, total)


def _probe(
    network: Network,
    own: Mapping[str, Weight],
    errors: Mapping[str, Mapping[str, float]],
    probe: Probe,
    progress: Progress,
) -> dict[str, float]:
    """The damage of each matrix over its squared error."""

    def pick(name: str) -> tuple[Weight, float]:
        """What is put in the matrix's place, and its squared error."""
        if errors[name][OWN] > 0:
            return own[name], errors[name][OWN]
        weight = load_weight(network.model.file, name)
        fmt = fit_rows(PROBE, weight.shape[-1])
        return encode(weight, fmt), errors[name][fmt.name]

    groups = make_groups(list(own), probe)
    found, put = {}, {}
    for n, (key, members) in enumerate(groups.items()):
        picked = {name: pick(name) for name in members}
        put |= {name: error for name, (_, error) in picked.items()}
        found[key] = network.divergence({name: weight for name, (weight, _) in picked.items()})
        progress(RUNNING, n + 1, len(groups))
    damage = share_out(found, groups, put)
    return {name: damage[name] / put[name] if put[name] else 0.0 for name in own}


def encode(weight: Weight, fmt: Format) -> Weight:
    """The same weight in another type."""
    rows = weight.rows()
    step = max(1, SLAB_WEIGHTS // weight.shape[-1])
    parts = [
        quantize(_decode(rows[i : i + step], weight.format), fmt, threads=count_cores())
        for i in range(0, len(rows), step)
    ]
    return Weight(weight.name, fmt, weight.shape, np.concatenate(parts).reshape(*weight.shape[:-1], -1))


def round_off(weight: Weight, inputs: np.ndarray | None, formats: Sequence[Format], own: Weight) -> dict[str, float]:
    """{type: squared error of the output over the squared output}; `OWN` stands for the other file's weight.

    `inputs` [n, n_in]; None counts every weight alike.
    """
    step = max(1, SLAB_WEIGHTS // weight.shape[-1])
    rows, own_rows = weight.rows(), own.rows()
    total, squares = 0.0, dict.fromkeys([OWN, *(f.name for f in formats)], 0.0)
    for i in range(0, len(rows), step):
        w = _decode(rows[i : i + step], weight.format)
        total += _energy(w, inputs)
        squares[OWN] += _energy(_decode(own_rows[i : i + step], own.format) - w, inputs)
        for fmt in dict.fromkeys(formats):
            if fmt is not weight.format:
                squares[fmt.name] += _energy(_decode(quantize(w, fmt, threads=count_cores()), fmt) - w, inputs)
    return {name: value / total if total else 0.0 for name, value in squares.items()}


def _decode(data: np.ndarray, fmt: Format) -> np.ndarray:
    return np.ascontiguousarray(dequantize(np.ascontiguousarray(data), fmt), dtype=np.float32)


def _energy(w: np.ndarray, inputs: np.ndarray | None) -> float:
    y = w if inputs is None else w @ inputs.T
    return float(np.einsum("ij,ij->", y, y, dtype=np.float64))


# Layers and roles.

LAYER, ROLE = ".[all]", ".[each]."  # in keys of groups


def _place(name: str) -> tuple[str, str, str] | None:
    """("llm.blk", "3", "attn.q") of a matrix inside a layer."""
    found = re.fullmatch(r"(.+\.blk)\.(\d+)\.(.+)\.weight", name)
    return found.groups() if found else None


def make_groups(names: Sequence[str], probe: Probe) -> dict[str, list[str]]:
    """Which matrices are replaced together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        place = _place(name) if probe == "layer" else None
        keys = [name] if place is None else [f"{place[0]}.{place[1]}{LAYER}", f"{place[0]}{ROLE}{place[2]}"]
        for key in keys:
            groups.setdefault(key, []).append(name)
    return groups


def share_out(
    found: Mapping[str, float], groups: Mapping[str, Sequence[str]], errors: Mapping[str, float]
) -> dict[str, float]:
    """The damage of each matrix from those of groups: starts from squared errors and scales layers and roles in turn
    (iterative proportional fitting); roles are brought to the layers' sum first."""
    layers, roles = ([key for key in groups if end in key] for end in (LAYER, ROLE))
    measured = dict(found)
    for family in {key.partition(".blk.")[0] for key in layers}:
        inside = [[key for key in kind if key.startswith(f"{family}.blk.")] for kind in (layers, roles)]
        sums = [sum(found[key] for key in kind) for kind in inside]
        measured |= {key: found[key] * sums[0] / sums[1] if sums[1] else 0.0 for key in inside[1]}
    damage = {name: errors[name] for members in groups.values() for name in members}
    for _ in range(N_ROUNDS):
        for key in (*roles, *layers):
            now = sum(damage[name] for name in groups[key])
            for name in groups[key]:
                damage[name] *= measured[key] / now if now else 0.0
    return damage | {name: found[name] for name in damage if name in groups}


# The report.


def _describe(own: Weight, errors: Mapping[str, float], gain: float, candidates: Sequence[Format]) -> dict[str, Any]:
    """`gain`: damage by squared error."""

    def judge(error: float, nbytes: int) -> dict[str, Any]:
        return {"bytes": nbytes, "error": float(np.sqrt(error)), "kl": gain * error}

    fitting = dict.fromkeys(fit_rows(f, own.shape[-1]) for f in candidates)
    types = {f.name: judge(errors[f.name], f.tensor_bytes(own.shape)) for f in fitting}
    about = {"name": own.name, "shape": list(own.shape), "type": own.format.name}
    return about | judge(errors[OWN], own.data.nbytes) | {"types": types}


def _document(
    model: Model, network: Network, request: Request, probe: Probe, rows: list[dict[str, Any]], total: float
) -> dict[str, Any]:
    reference = network.model
    together = sum(row["kl"] for row in rows)
    for row in rows:
        row["share"] = row["kl"] / together if together else 0.0
    rows.sort(key=lambda row: (-row["kl"], row["name"]))
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "path": str(reference.file.path),
            "name": reference.file.get("general.name", str, ""),
            "fingerprint": fingerprint(reference.file),
        },
        "measured": {
            "file": str(model.file.path),
            "backend": reference.backend.name,
            "probe": probe,
            "seconds": [len(clip) / 16_000 for clip in request.clips],
            "prompt": request.prompt,
            "n_tokens": len(network.walk.prompt.ids),
            "n_positions": len(network.positions),
            "method": METHODS[probe],
        },
        "total": {"kl": total, "sum": together, "bytes": sum(row["bytes"] for row in rows)},
        "tensors": rows,
    }


def sensitivity_table(report: Mapping[str, Any]) -> Table:
    """The tensors that do most damage in the file that was judged."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tensor", "type", "bytes", "error added", "KL alone", "share"):
        table.add_column(name, justify="left" if name in ("tensor", "type") else "right", no_wrap=True)
    for row in report["tensors"][:N_SHOWN]:
        numbers = (f"{row['bytes']:,}", f"{row['error']:.1e}", f"{row['kl']:.1e}", f"{row['share']:.1%}")
        table.add_row(cell(row["name"]), cell(row["type"]), *numbers)
    rest = report["tensors"][N_SHOWN:]
    if rest:
        nbytes, kl, share = (sum(row[key] for row in rest) for key in ("bytes", "kl", "share"))
        table.add_row(f"{len(rest)} others", "", f"{nbytes:,}", "", f"{kl:.1e}", f"{share:.1%}")
    total = report["total"]
    table.add_row("all at once", "", f"{total['bytes']:,}", "", f"{total['kl']:.1e}", "")
    return table


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The whole file or none. Raises OutputError when it cannot be written."""
    write_text(path, json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
