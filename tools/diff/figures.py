"""What the charts of the page draw: the document's numbers by depth and by position, short enough to be embedded.

Knows the document of `report.py`. Does not know how a chart looks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ...kernels import display

ENCODER = ("mel", "enc.", "adapter", "deepstack.")
MAX_TEXT = 4000  # characters of a prompt or of an answer
N_FRAME_TOKENS = 8  # mel frames of an audio token
ROWS_FIRST, ROWS_LAST = "first window", "last row"

LAYER = re.compile(r"\w+\.blk\.(\d+)")
LABELS = {"enc.stem_proj": "stem", "enc.out": "out", "llm.embed": "embed", "llm.final_norm": "norm"}
LABELS |= {"decode.logits": "decoding"}
NUMBERED = {"enc.tap": "tap", "deepstack": "merger", "llm.inject": "inject"}


def show(text: Any) -> str:
    """Text whose every character can be seen."""
    return display.show(text, MAX_TEXT)


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: no `<` is left in it, and nothing but ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def figures(document: dict[str, Any]) -> dict[str, Any]:
    """`depth`: points in running order; `heat`: relative errors by position, whose bins begin at `grids[row.grid]`."""
    meta, grids = document["meta"], Grids()
    stages = [s for s in document["stages"] if s["name"] != "input_ids"]
    ops = [s for s in document["ops"] if s["kind"] == "op"]
    sides = {"encoder": True, "decoder": False}
    n_audio, n_answer = sum(meta["windows"]), _n_answer(stages)
    lengths = {"encoder": n_audio, "decoder": meta["n_tokens"] + max(0, n_answer - 1)}
    return {
        "depth": {side: [_point(s, meta) for s in stages if in_encoder(s["name"]) is e] for side, e in sides.items()},
        "inside": {side: _points_inside([s for s in ops if in_encoder(s["name"]) is e]) for side, e in sides.items()},
        "heat": {
            side: {"n": n, "rows": [_heat_row(s, meta, grids) for s in stages if in_encoder(s["name"]) is sides[side]]}
            for side, n in lengths.items()
        },
        "grids": grids.starts,
        "windows": meta["windows"],
        "window_clips": meta["window_clips"],
        "token_seconds": meta["token_seconds"],
        "n_tokens": meta["n_tokens"],
        "audio_spans": meta["audio_spans"],
        "text": {str(at): show(piece) for at, piece in meta["text_tokens"]},
        "taps": meta["model"]["taps"],
        "n_inject": meta["model"]["n_inject"],
    }


def in_encoder(name: str) -> bool:
    return name.startswith(ENCODER)


def _n_answer(stages: Sequence[dict[str, Any]]) -> int:
    return next((s["positions"].get("n_rows", 0) for s in stages if s["name"] == "decode.logits"), 0)


def label_of(name: str) -> str:
    """A short name of a stage: of a layer its number."""
    stem, _, number = name.rpartition(".")
    if not number.isdigit():
        return LABELS.get(name, name)
    return number if stem.endswith(".blk") else f"{NUMBERED.get(stem, stem)} {number}"


def distance(cosine: float | None) -> float | None:
    """1 - cosine, which can be read on a log axis."""
    return None if cosine is None else max(0.0, 1.0 - cosine)


def root(nmse: float | None) -> float | None:
    return None if nmse is None else math.sqrt(nmse)


def short(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def _point(stage: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """`cos`: 1 - cosine of the worst row, at the first percentile, and the mean; `error`: relative, of the worst row,
    at the 99th percentile, and of all rows together."""
    m, limits, name = stage["metrics"], stage["limits"], stage["name"]
    layer = LAYER.fullmatch(name)
    number = int(layer[1]) if layer else None
    marked = number is not None and (
        number in meta["model"]["taps"] if in_encoder(name) else number < meta["model"]["n_inject"]
    )
    return {
        "name": show(name),
        "label": show(label_of(name)),
        "layer": number is not None,
        "mark": marked and bool(meta["windows"]),
        "line": meta["mode"] == "chain" and not name.startswith(("enc.tap", "deepstack", "mel", "decode")),
        "bad": not stage["passed"],
        "note": show("; ".join(stage["failures"])),
        "cos": [short(distance(m.get(key))) for key in ("cos_min", "cos_p1", "cos_mean")],
        "cos_limit": short(distance(limits.get("cos_min"))),
        "error": [short(m.get("error_max")), short(m.get("error_p99")), short(root(m.get("nmse")))],
        "error_limit": short(root(limits.get("nmse"))),
    }


def _points_inside(ops: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Values inside stages; the first of each layer has its number."""
    points, before = [], None
    for op in ops:
        layer = LAYER.match(op["name"])
        number = layer[1] if layer else None
        m = op["metrics"]
        points.append(
            {
                "name": show(op["name"]),
                "label": number if number is not None and number != before else "",
                "layer": True,
                "bad": not op["passed"],
                "note": show("; ".join(op["failures"]) or f"made by {', '.join(op['ops'])}"),
                "error": [short(m.get("error_max"), 3), short(root(m.get("nmse")), 3)],
                "error_limit": short(root(op["limits"].get("nmse")), 3),
            }
        )
        before = number
    return points


class Grids:
    """The distinct lists of where bins start."""

    def __init__(self) -> None:
        self.starts: list[list[int]] = []

    def add(self, starts: list[int]) -> int:
        if starts not in self.starts:
            self.starts.append(starts)
        return self.starts.index(starts)


def _heat_row(stage: dict[str, Any], meta: dict[str, Any], grids: Grids) -> dict[str, Any]:
    """A stage by position. `at`: where its first row stands, `scale`: how many positions a row is wide, `limit`: the
    error beyond which rows of a failed stage are counted as wrong."""
    positions, name = stage["positions"], stage["name"]
    row = {
        "name": show(name),
        "label": show(label_of(name)),
        "layer": bool(LAYER.fullmatch(name)),
        "bad": not stage["passed"],
    }
    if not positions:
        return row | {"note": show("; ".join(stage["failures"]) or "no rows")}
    n, at, scale = positions["n_rows"], 0, 1.0
    if name == "mel":
        scale = sum(meta["windows"]) / n
    elif name == "decode.logits":
        at = meta["n_tokens"] - 1
    elif stage["rows"] == ROWS_LAST:
        at = (sum(meta["windows"]) if in_encoder(name) else meta["n_tokens"]) - n
    return row | {
        "n": n,
        "at": at,
        "scale": scale,
        "grid": grids.add(positions["starts"]),
        "error": [short(v, 3) for v in positions["error_max"]],
        "kl": [short(v, 3) for v in positions.get("kl_max", ())],
        "limit": None if stage["passed"] else short(_row_limit(stage["limits"])),
    }


def _row_limit(limits: dict[str, float]) -> float | None:
    """The relative error of rows: as the limit of all, or what makes the limit of cosines between equal lengths."""
    if "nmse" in limits or "cos_min" not in limits:
        return root(limits.get("nmse"))
    return root(2 * max(0.0, 1.0 - limits["cos_min"]))


def where(stage: str, row: int, meta: dict[str, Any], answer: Sequence[str] = ()) -> str:
    """What a row of a stage is: seconds into a clip, or a token of the prompt or of the answer."""
    if stage == "mel":
        return _audio_place(row / N_FRAME_TOKENS, meta, exact=False)
    if in_encoder(stage):
        return _audio_place(row, meta)
    if stage == "decode.logits":
        return f"answer, token {row}" + (f" “{show(answer[row])}”" if row < len(answer) else "")
    before = 0
    for start, stop in meta["audio_spans"]:
        if start <= row < stop:
            return _audio_place(before + row - start, meta)
        before += stop - start
    piece = next((piece for at, piece in meta["text_tokens"] if at == row), None)
    return "prompt" if piece is None else f"prompt, “{show(piece)}”"


def _audio_place(token: float, meta: dict[str, Any], exact: bool = True) -> str:
    """Seconds into the clip of an audio token, counted over all windows, and its window."""
    first_of_clip = before = 0
    clips, n_windows = meta["window_clips"], len(meta["windows"])
    for w, (n, clip) in enumerate(zip(meta["windows"], clips, strict=True)):
        if w and clip != clips[w - 1]:
            first_of_clip = before
        if token < before + n or w == n_windows - 1:
            seconds = (token - first_of_clip) * meta["token_seconds"]
            which = f"clip {clip + 1}, " if clips[-1] else ""
            window = f", window {w + 1} of {n_windows}" if exact else ""
            return f"audio, {which}{seconds:.2f} s{window}"
        before += n
    return "audio"
