"""The results of a diff as one page of HTML that needs nothing else: no network, no library, no fonts.

Knows the document of `report.py` and nothing of how it was made. Verdict and tables are text, for readers without
scripts, too; the charts are drawn by the script in `page.html` from the numbers that `figures.py` picks. Every word of
the document may come from a hostile file, and none is written unescaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import embed, figures
from .tables import code, number, prose, result_tables, share_of, text, worst_rows

TEMPLATE = Path(__file__).with_name("page.html")
FIELD = re.compile(r"\{\{(\w+)\}\}")
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
MODES = {
    "chain": "Each stage is computed from this side’s own stages before it, so errors add up along the way.",
    "isolate": "Each stage is given the reference’s input, so an error is charged to the stage that makes it.",
    "bisect": "Each stage, then each value inside stages, is given the reference’s input; tensors are compared, too.",
}
LEGEND = (
    '<li class="legend" aria-hidden="true"><i>token</i><span>reference</span><span>this side</span>'
    '<span class="forced">led along</span><i>probability</i></li>'
)
KINDS = {"stages": "file of stages", "archive": "archive of stages", "model": "model file"}


def render(document: dict[str, Any]) -> str:
    """The page of a document of `report.document`."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = SCRIPT.search(template)
    assert script, f"{TEMPLATE} has no script"
    verdict, meta = document["verdict"], document["meta"]
    name = Path(meta["model"]["path"]).name
    fields = {
        "script_hash": base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode(),
        "title": text(f"{'agrees' if verdict['passed'] else 'differs'}: {name}"),
        "verdict": _verdict(document),
        "sides": _sides(meta),
        "mode": MODES.get(meta["mode"], ""),
        "tokens": _tokens(document["tokens"]),
        "worst_rows": worst_rows(document),
        "tables": result_tables(document),
        "data": embed(figures(document)),
    }
    return FIELD.sub(lambda match: fields[match[1]], template)


# The verdict.


def _verdict(document: dict[str, Any]) -> str:
    verdict = document["verdict"]
    passed = verdict["passed"]
    if passed:
        title, lead = "Agrees", "Every limit holds, at every stage."
    else:
        place = verdict["op"] or verdict["stage"] or verdict["tensor"]
        title = f"Differs, first at {code(place)}"
        inside = verdict["stage"] and verdict["stage"] != place
        lead = f"Inside stage {code(verdict['stage'])}." if inside else ""
        lead += f" The tensor {code(verdict['tensor'])} is damaged or another one." if verdict["tensor"] else ""
    evidence = "".join(f"<li>{text(line)}</li>" for line in verdict["evidence"])
    return (
        f'<section class="verdict {"pass" if passed else "fail"}"><div class="badge" aria-hidden="true">'
        f"{'✓' if passed else '✕'}</div><div><h1>{title}</h1><p>{_compared(document['meta'])}. {lead}</p>"
        f"{f'<ul>{evidence}</ul>' if evidence else ''}</div></section>{_tiles(document)}"
    )


def _compared(meta: dict[str, Any]) -> str:
    """What stands beside what, in a line."""
    model, reference = meta["model"], meta["reference"]
    other = code(Path(str(reference["path"])).name) if "path" in reference else text(reference.get("kind", ""))
    backend = f" on {text(reference['backend'])}" if "backend" in reference else ""
    return f"{code(Path(model['path']).name)} on {text(model['backend'])} beside {other}{backend}"


def _tiles(document: dict[str, Any]) -> str:
    """The few numbers that say most."""
    stages = document["stages"]
    measured = [s for s in stages if s["metrics"].get("cos_min") is not None]
    tiles = []
    for name, key in (("stages", "stages"), ("values inside stages", "ops"), ("tensors", "tensors")):
        if document[key]:
            n, bad = len(document[key]), sum(bool(r["failures"]) for r in document[key])
            tiles.append((name, f"{n - bad} of {n}", "within their limits", bad > 0))
    if measured:
        worst = min(measured, key=lambda s: s["metrics"]["cos_min"])
        cosine = worst["metrics"]["cos_min"]
        note = f"1 − cos {number(1 - cosine)}, at {code(worst['name'])}"
        tiles.append(("smallest cosine", f"{cosine:.6f}", note, False))
        near = max(measured, key=share_of)
        share = share_of(near)
        used = f"{share:.0%}" if share < 10 else f"{number(share)} ×" if math.isfinite(share) else "over"
        tiles.append(("most of a limit used", used, f"at {code(near['name'])}", share > 1))
    logits = next((s["metrics"] for s in stages if s["name"] == "logits" and "kl_mean" in s["metrics"]), None)
    if logits:
        note = f"nats; likeliest token the same: {logits['top1']:.1%}"
        tiles.append(("KL of the logits", number(logits["kl_mean"]), note, False))
    tokens = document["tokens"]
    if tokens:
        n, first = len(tokens["reference"]["ids"]), tokens["first_mismatch"]
        note = "the whole answer" if first is None else f"margin after them {number(tokens['margin'])}"
        tiles.append(("greedy tokens equal", f"{n if first is None else first} of {n}", note, not tokens["passed"]))
    cells = "".join(
        f'<div class="tile{" bad" if bad else ""}"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>'
        for name, value, note, bad in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


# What was compared.


def _sides(meta: dict[str, Any]) -> str:
    model, reference = meta["model"], meta["reference"]
    own = [
        ("file", code(model["path"])),
        ("name", text(model["name"]) if model["name"] else ""),
        ("backend", text(f"{model['backend']}, KV cache {model['kv_type']}")),
        *((f"types, {text(part)}", _counts(counts)) for part, counts in model["types"].items()),
    ]
    kind = str(reference.get("kind", ""))
    other = [("kind", text(KINDS.get(kind, kind)))]
    for key, value in reference.items():
        if key == "path":
            other.append(("file", code(value)))
        elif isinstance(value, dict):
            other += [(text(k), f"<bdi>{text(v)}</bdi>") for k, v in value.items()]
        elif key != "kind":
            other.append((text(key.replace("_", " ")), f"<bdi>{text(value)}</bdi>"))
    clips = ", ".join(f"{seconds:.2f} s" for seconds in meta["clips"]) or "none"
    n_windows, n_audio = len(meta["windows"]), sum(meta["windows"])
    asked = [
        ("prompt", f'<q class="prompt"><bdi>{prose(meta["prompt"])}</bdi></q>'),
        ("audio", f"{clips}" + (f" in {n_windows} windows, {n_audio} audio tokens" if n_windows else "")),
        ("length", f"{meta['n_tokens']} tokens of prompt and audio"),
        ("method", f"<b>{text(meta['mode'])}</b>: {MODES.get(meta['mode'], '')}"),
        ("missing there", ", ".join(map(code, meta["missing"]))),
    ]
    cards = (("This side", own), ("Reference", other), ("Request", asked))
    return "".join(_card(title, facts) for title, facts in cards)


def _card(title: str, facts: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts if value)
    return f'<section class="card"><h3>{title}</h3><dl>{lines}</dl></section>'


def _counts(counts: dict[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return " · ".join(f"{n} {text(t)}" for t, n in ranked)


# The answers.


def _tokens(tokens: dict[str, Any] | None) -> str:
    if tokens is None:
        return ""
    n, first = len(tokens["reference"]["ids"]), tokens["first_mismatch"]
    if first is None:
        lead = f"All {n} greedy tokens are the same."
    else:
        same = f"The first {first} of {n} greedy tokens are the same" if first else "The first greedy token differs"
        excess = f"this side’s own token exceeds the reference’s by {number(tokens['margin'])} in logits"
        allowed = f" (allowed: {number(tokens['limits'].get('margin'))})"
        lead = f"{same}; there {excess + allowed if tokens['margin'] is not None else 'the logits are not finite'}."
    agreed = sum(a == b for a, b in zip(tokens["forced"]["ids"], tokens["reference"]["ids"], strict=True))
    lead += f" Led along the reference’s answer, this side chooses the same token {agreed} times of {n}; where it "
    lead += "does not, its choice is shown. The last line is the probability it gives to the reference’s token."
    cells = "".join(_token(tokens, i) for i in range(n))
    texts = "".join(
        f'<section class="card"><h3>{title}</h3><p class="answer"><bdi>{prose(answer["text"])}</bdi></p></section>'
        for title, answer in (("Reference’s answer", tokens["reference"]), ("This side’s answer", tokens["own"]))
    )
    failures = "".join(f'<p class="no">✕ {text(failure)}</p>' for failure in tokens["failures"])
    return (
        f'<section id="answers"><h2>Answers</h2><p class="lead">{lead}</p>{failures}'
        f'<ol class="tokens">{LEGEND}{cells}</ol><div class="cards two">{texts}</div></section>'
    )


def _token(tokens: dict[str, Any], i: int) -> str:
    """One position of all streams."""
    first = tokens["first_mismatch"]
    state = "" if first is None or i < first else "first" if i == first else "after"
    ids = {key: tokens[key]["ids"][i] for key in ("reference", "own", "forced")}
    p, margins = tokens["p_reference"][i], tokens.get("margins") or []
    hints = [f"reference: id {ids['reference']}", f"this side: id {ids['own']}"]
    hints.append(f"along the reference’s answer: id {ids['forced']}")
    hints.append(f"probability of the reference’s token: {number(p)}")
    if i < len(margins):
        hints.append(f"margin of this side’s choice over it: {number(margins[i])}")
    reference, own, forced = (_piece(tokens[key]["pieces"][i], ids[key]) for key in ids)
    forced = forced if ids["forced"] != ids["reference"] else "&nbsp;"
    other = " class=other" if ids["own"] != ids["reference"] else ""
    name = ' aria-label="first mismatch"' if state == "first" else ""
    return (
        f'<li class="{state}" title="{text("; ".join(hints))}"{name}><i>{i}</i>'
        f"<span>{reference}</span><span{other}>{own}</span>"
        f'<span class="forced">{forced}</span><i class="p" style="--w:{p or 0:.1%}">{number(p, 2)}</i></li>'
    )


def _piece(piece: str, token_id: int) -> str:
    """A token as text in which spaces can be seen; its id where it is no whole character."""
    seen = text(piece).replace(" ", "·") if piece.strip("\ufffd") else f"⟨{token_id}⟩"
    return f"<bdi>{seen}</bdi>"
