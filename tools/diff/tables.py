"""Tables of the page, and the small pieces of HTML that all of it is made of.

Knows the document of `report.py`. Every text goes through `text`, which escapes it and makes it visible.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .figures import distance, root, show, where
from .thresholds import AT_LEAST

Cell = tuple[str, Any]  # what is shown (already HTML), and what to sort by (None: the text)
IN_COLUMNS = ("nmse ", "cos_min ")  # failures that numbers beside limits show
NUMBERS = (
    "#of limit",
    "#1 − cos, worst",
    "#1 %",
    "#mean",
    "#limit",
    "#error",
    "#limit",
    "#worst",
    "#max abs",
    "#norm",
)


def text(value: Any) -> str:
    """Any text, made visible and escaped for elements and attributes."""
    return html.escape(show(value), quote=True)


def prose(value: str) -> str:
    """Text of several lines, each escaped."""
    return "\n".join(text(line) for line in value.split("\n"))


def code(value: Any) -> str:
    return f"<code><bdi>{text(value)}</bdi></code>"


def number(value: float | None, digits: int = 3) -> str:
    """A small number as people write it: 0, 0.0123, 6.1e-5."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _cell(value: float | None, digits: int = 3) -> Cell:
    return number(value, digits), -1 if value is None else float(f"{value:.5g}")


def share_of(stage: dict[str, Any]) -> float:
    """The largest part of a limit that is used: above 1 it fails. Infinite where it fails without a number."""
    shares = [0.0]
    for metric, limit in stage["limits"].items():
        value = stage["metrics"].get(metric)
        if value is None:
            continue
        if metric in AT_LEAST:
            value, limit = 1.0 - value, 1.0 - limit
        ratio = value / limit if limit > 0 else math.inf if value > 0 else 0.0
        shares.append(math.sqrt(ratio) if metric == "nmse" or metric.startswith("cos") else ratio)
    largest = max(shares)
    return largest if stage["passed"] or largest > 1 else math.inf


def _share_cell(stage: dict[str, Any]) -> Cell:
    share = share_of(stage)
    if not math.isfinite(share):
        return "over", 1e9
    label = f"{share:.0%}" if share < 10 else f"{share:.0f} ×"
    return f'<span class="share" style="--w:{min(share, 1):.0%}">{label}</span>', float(f"{share:.4g}")


def _table(caption: str, columns: Sequence[str], rows: Iterable[tuple[bool, Sequence[Cell]]], kind: str) -> str:
    """A table whose rows are (failed, cells); columns that begin with # hold numbers."""
    names = [text(c.lstrip("#")) for c in columns]
    head = "".join(f'<th scope="col"{_right(c)}>{name}</th>' for c, name in zip(columns, names, strict=True))
    lines = []
    for failed, cells in rows:
        line = "".join(
            f"<td{_right(c)}{_key(key)}>{content}</td>" for c, (content, key) in zip(columns, cells, strict=True)
        )
        lines.append(f'<tr class="bad">{line}</tr>' if failed else f"<tr>{line}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table class="data {kind}"><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _key(value: Any) -> str:
    return "" if value is None else f' data-v="{text(value)}"'


def _right(column: str) -> str:
    return ' class="n"' if column.startswith("#") else ""


def _result(failed: bool) -> Cell:
    return ('<b class="no">✕ fails</b>', 0) if failed else ('<span class="yes">✓ ok</span>', 1)


def worst_rows(document: dict[str, Any]) -> str:
    meta, tokens = document["meta"], document["tokens"]
    answer = tokens["reference"]["pieces"] if tokens else ()
    found = [(stage, row) for stage in document["stages"] for row in stage["positions"].get("worst_rows", ())]
    found.sort(key=lambda pair: -_or_inf(pair[1]["error"]))
    rows = []
    for stage, row in found:
        name, at = stage["name"], row["row"]
        cells = (code(name), None), (str(at), at), (f"<bdi>{text(where(name, at, meta, answer))}</bdi>", None)
        error = row["error"]
        rows.append((not stage["passed"], (*cells, _cell(distance(row["cos"])), _cell(error))))
    if not rows:
        return ""
    columns = ("stage", "#row", "where", "#1 − cosine", "#relative error")
    return _table("The five worst rows of each stage, largest error first", columns, rows, "rows")


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def result_tables(document: dict[str, Any]) -> str:
    parts = [_details("Stages", _stage_table("Stages in running order", document["stages"]), True)]
    ops = [s for s in document["ops"] if s["kind"] == "op"]
    if ops:
        parts.append(_details("Values inside stages", _op_table(ops), any(not s["passed"] for s in ops)))
    if document["tensors"]:
        bad = any(t["failures"] for t in document["tensors"])
        parts.append(_details("Tensors", _tensor_table(document["tensors"]), bad))
    return "\n".join(parts)


def _details(title: str, table: str, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary><h3>{title}</h3></summary>{table}</details>"


def _numbers(stage: dict[str, Any]) -> list[Cell]:
    m, limits = stage["metrics"], stage["limits"]
    return [
        _share_cell(stage),
        _cell(distance(m.get("cos_min"))),
        _cell(distance(m.get("cos_p1"))),
        _cell(distance(m.get("cos_mean"))),
        _cell(distance(limits.get("cos_min"))),
        _cell(root(m.get("nmse"))),
        _cell(root(limits.get("nmse"))),
        _cell(m.get("error_max")),
        _cell(m.get("max_abs")),
        _cell(m.get("norm_ratio"), 6),
    ]


def _failing_first(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(results, key=lambda r: not r["failures"])


def _stage_table(caption: str, stages: Sequence[dict[str, Any]]) -> str:
    rows = []
    for stage in _failing_first(stages):
        cells = [(code(stage["name"]), None), _result(not stage["passed"]), *_numbers(stage)]
        cells += [(_types(stage), None), (_remarks(stage), None)]
        rows.append((not stage["passed"], cells))
    return _table(caption, ("stage", "result", *NUMBERS, "weights", "remarks"), rows, "stages")


def _types(stage: dict[str, Any]) -> str:
    """The types of the weights; vectors are F32 anyhow."""
    types = set(stage["types"].values())
    return text(", ".join(sorted({t for t in types if not t.startswith("F32")} or types)))


def _remarks(stage: dict[str, Any]) -> str:
    m = stage["metrics"]
    said = [text(failure) for failure in stage["failures"] if not failure.startswith(IN_COLUMNS)]
    if stage["rows"] != "all":
        said.append(text(f"{stage['rows']} only"))
    if "mismatches" in m:
        said.append(f"{m['mismatches']:.0f} ids differ")
    if m.get("kl_mean") is not None:
        said.append(f"KL {number(m['kl_mean'])} nats, 99th percentile {number(m['kl_p99'])}")
        said.append(f"top 1 {m['top1']:.1%}, top 5 {m['top5']:.1%}")
    return "; ".join(said)


def _op_table(ops: Sequence[dict[str, Any]]) -> str:
    rows = []
    for op in _failing_first(ops):
        m, limits = op["metrics"], op["limits"]
        cells = [(code(op["name"]), None), _result(not op["passed"]), _share_cell(op), _cell(root(m.get("nmse")))]
        cells += [_cell(root(limits.get("nmse"))), _cell(m.get("error_max")), _cell(distance(m.get("cos_min")))]
        cells += [(text(", ".join(op["ops"])), None), (", ".join(map(code, op["given"])), None)]
        cells += [(_types(op), None), (_remarks(op), None)]
        rows.append((not op["passed"], cells))
    columns = ("value", "result", "#of limit", "#error", "#limit", "#worst row", "#1 − cos, worst row")
    columns += ("made by", "from", "weights", "remarks")
    return _table("Values inside stages, each from the reference’s values before it", columns, rows, "ops")


def _tensor_table(tensors: Sequence[dict[str, Any]]) -> str:
    rows = []
    for t in sorted(tensors, key=lambda t: (not t["failures"], -_or_inf(t["error"]))):
        types = t["type"] if t["type"] == t["reference_type"] else f"{t['type']} / {t['reference_type']}"
        at = f"row {t['worst_at'][0]}, column {t['worst_at'][1]}"
        cells = [(code(t["name"]), None), _result(bool(t["failures"])), (text(types), None)]
        cells += [(f"{t['nbytes']:,}", t["nbytes"]), _cell(t["error"]), _cell(t["limits"].get("error"))]
        cells += [_cell(t["worst"]), _cell(t["limits"].get("worst")), (at, None)]
        cells.append((text("; ".join(t["failures"])), None))
        rows.append((bool(t["failures"]), cells))
    columns = ("tensor", "result", "type / reference", "#bytes", "#error", "#limit", "#worst block", "#limit", "where")
    columns += ("remarks",)
    return _table("Tensors beside what they were made from, largest error first", columns, rows, "tensors")
