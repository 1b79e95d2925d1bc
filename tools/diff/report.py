"""The results of a diff as a table for a terminal and as a document for programs.

Knows results and text. Does not know how anything was computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
from rich.table import Table

from ...engine import Model
from ...engine.models.moss_audio import clip_windows, part_of, token_count
from ...engine.tokenizer import Tokenizer
from ..cells import cell
from .audit import TensorResult
from .compare import StageResult, TokenResult
from .locate import Outcome
from .request import Request
from .sources import Source
from .walk import Walk

FORMAT, VERSION = "auricle.diff", 1
COLUMNS = ("stage", "", "cos min", "limit", "error", "limit", "worst row", "max abs", "norm", "remarks")
FRAMES_PER_SECOND = 100  # of the mel
N_TENSORS = 12  # in a terminal


# The document.


def document(outcome: Outcome, model: Model, request: Request, source: Source) -> dict[str, Any]:
    """All results as plain data, ready for `json.dumps(…, allow_nan=False)`: see the keys below. An infinite number is
    written as null."""
    return clean(
        {
            "format": FORMAT,
            "version": VERSION,
            "verdict": outcome.verdict.to_dict(),
            "meta": describe(outcome, model, request, source),
            "stages": [_stage(r) for r in outcome.stages],
            "ops": [_stage(r) for r in outcome.ops],
            "tensors": [dataclasses.asdict(t) for t in outcome.tensors],
            "tokens": _tokens(outcome.tokens, model.tokenizer),
        }
    )


def describe(outcome: Outcome, model: Model, request: Request, source: Source) -> dict[str, Any]:
    """What was compared with what. `windows`: audio tokens of each, each token `token_seconds` long; `text_tokens`:
    positions and pieces of the prompt's other tokens."""
    walk = Walk(model, request)
    types: dict[str, Counter[str]] = {}
    for name, tensor in model.file.tensors.items():
        types.setdefault(part_of(name), Counter())[tensor.format.name] += 1
    c = model.config
    frames = c.encoder.window_frames
    slots = walk.prompt.audio_rows >= 0
    texts = [(i, model.tokenizer.decode([walk.prompt.ids[i]], skip_special=False)) for i in np.flatnonzero(~slots)]
    return {
        "mode": outcome.mode,
        "model": {
            "path": str(model.file.path),
            "name": model.file.get("general.name", str, ""),
            "backend": model.backend.name,
            "kv_type": model.kv_format.name.lower(),
            "types": {part: dict(counts) for part, counts in types.items()},
            "encoder_layers": c.encoder.encoder_layers,
            "decoder_layers": c.decoder.num_layers,
            "taps": list(c.taps),
            "n_inject": c.n_inject,
        },
        "reference": source.about,
        "prompt": request.prompt,
        "clips": [len(clip) / 16_000 for clip in request.clips],
        "windows": walk.lengths,
        "window_clips": [k for k, n in enumerate(walk.clip_frames) for _ in clip_windows(c.encoder, n)],
        "token_seconds": frames / token_count(frames) / FRAMES_PER_SECOND,
        "n_tokens": len(walk.prompt.ids),
        "audio_spans": spans(slots),
        "text_tokens": texts,
        "missing": outcome.missing,
    }


def spans(flags: np.ndarray) -> list[list[int]]:
    """Runs of true: [[start, stop], …]."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return edges.reshape(-1, 2).tolist()


def _stage(result: StageResult) -> dict[str, Any]:
    return dataclasses.asdict(result) | {"passed": result.passed}


def _tokens(result: TokenResult | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if result is None:
        return None
    streams = {"reference": result.reference, "own": result.own, "forced": result.forced}
    texts = {
        name: {
            "ids": ids,
            "pieces": [tokenizer.decode([i], skip_special=False) for i in ids],
            "text": tokenizer.decode(ids, skip_special=False),
        }
        for name, ids in streams.items()
    }
    agreed = sum(a == b for a, b in zip(result.forced, result.reference, strict=True))
    return texts | {
        "passed": result.passed,
        "first_mismatch": result.first_mismatch,
        "margin": result.margin,
        "forced_agreement": agreed / max(1, len(result.reference)),
        "p_reference": result.p_reference,
        "margins": result.margins,
        "limits": result.limits,
        "failures": result.failures,
    }


def clean(value: Any) -> Any:
    """Numbers of numpy as Python's, tuples as lists, and None for what is not finite."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The table.


def stage_table(results: list[StageResult]) -> Table:
    """A row for each value."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(COLUMNS):
        right = 2 <= i < len(COLUMNS) - 1
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for result in results:
        table.add_row(*map(cell, _cells(result)), style=None if result.passed else "red")
    return table


def _cells(r: StageResult) -> tuple[str, ...]:
    m, limits = r.metrics, r.limits
    error = math.sqrt(m["nmse"]) if "nmse" in m else None
    limit = math.sqrt(limits["nmse"]) if "nmse" in limits else None
    remarks = list(r.failures)
    if "kl_mean" in m:
        remarks.insert(0, f"KL {m['kl_mean']:.2g}, 99 % {m['kl_p99']:.2g}; top 1 {m['top1']:.1%}, 5 {m['top5']:.1%}")
    if r.rows != "all":
        remarks.insert(0, r.rows)
    return (
        r.name,
        "ok" if r.passed else "FAIL",
        _cosine(m.get("cos_min")),
        _cosine(limits.get("cos_min")),
        _short(error),
        _short(limit),
        _short(m.get("error_max")),
        _short(m.get("max_abs")),
        f"{m['norm_ratio']:.6f}" if "norm_ratio" in m else "",
        "; ".join(remarks),
    )


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.9f}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def tensor_table(tensors: list[TensorResult]) -> Table:
    """The tensors that are furthest from what they were made from; those that fail first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tensor", "", "type", "bytes", "error", "worst block", "at", "remarks"):
        table.add_column(name, justify="right" if name in ("bytes", "error", "worst block") else "left", no_wrap=True)
    ranked = sorted(tensors, key=lambda t: (not t.failures, -t.error))[:N_TENSORS]
    for t in ranked:
        at = f"row {t.worst_at[0]}, column {t.worst_at[1]}"
        cells = (t.name, "FAIL" if t.failures else "ok", t.type, f"{t.nbytes:,}", _short(t.error), _short(t.worst), at)
        table.add_row(*map(cell, (*cells, "; ".join(t.failures))), style="red" if t.failures else None)
    return table


def token_lines(result: TokenResult, tokenizer: Tokenizer) -> list[str]:
    """The answers in a few lines of text."""
    agreed = sum(a == b for a, b in zip(result.forced, result.reference, strict=True))
    n = len(result.reference)
    lines = [f"along the reference's answer: {agreed} of {n} tokens are this side's choice, too"]
    if result.first_mismatch is None:
        return [*lines, f"greedy: the same {n} tokens: {tokenizer.decode(result.own)!r}"]
    lines.append(
        f"greedy: the first {result.first_mismatch} of {n} tokens agree; margin {result.margin:.3g} after that"
    )
    lines.append(f"  reference: {tokenizer.decode(result.reference)!r}")
    lines.append(f"  this side: {tokenizer.decode(result.own)!r}")
    return lines + [f"  FAIL: {failure}" for failure in result.failures]
