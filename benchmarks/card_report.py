"""What a run on a card says: one document, one page of text with each goal beside its figure, one plot.

Works on what there is: a figure that is missing is told as missing. Knows the names of steps and what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
PAPER = {"RTX 4060 Ti": 288e9, "RTX 4090": 1008e9}  # bytes a second, of NVIDIA's specifications
PAPER_COPY = 0.9  # of which a copy moves about so much: 4.3 of 4.8 TB/s on an H200


@dataclass(frozen=True)
class Goal:
    """`figure`: None when it was not measured. It is met at `limit` or above, or below where `most`."""

    name: str
    figure: float | None
    limit: float
    most: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        return "pass" if (self.figure <= self.limit if self.most else self.figure >= self.limit) else "MISS"

    def line(self) -> str:
        figure = "-" if self.figure is None else f"{self.figure:.3g}{self.unit}"
        sign = "at most" if self.most else "at least"
        return f"| {self.name} | {figure} | {sign} {self.limit:.3g}{self.unit} | {self.verdict} |"


def steps_of(document: Document, stage: str) -> dict[str, dict[str, Any]]:
    """Results of a stage by name, those that are well."""
    rows = document["stages"].get(stage, {}).get("steps", [])
    return {row["step"]: row for row in rows if row.get("ok")}


def dig(rows: Mapping[str, Any], step: str, *keys: str) -> Any:
    """A value of a step; None where it is missing."""
    found: Any = rows.get(step)
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def ratio(a: float | None, b: float | None) -> float | None:
    return None if not a or not b else a / b


def kernel_rows(document: Document) -> list[dict[str, Any]]:
    """Timed products, with the peers' times of the same size and shares of the ceilings."""
    steps = {row["step"]: row for row in document["stages"].get("kernels", {}).get("steps", [])}
    peers = {(r["case"], r["tokens"]): r for row in steps.values() for r in row.get("rows", []) if "bf16_us" in r}
    ceilings = dig(steps_of(document, "facts"), "ceilings") or {}
    found = []
    for row in (r for s in steps.values() for r in s.get("rows", []) if "type" in r):
        peer = peers.get((row["case"], row["tokens"]), {})
        row = dict(row) | {key: peer[key] for key in ("bf16_us", "int4_us") if key in peer}
        if "us" in row and ceilings:
            row["of_copy"] = row["bytes_per_s"] / ceilings["copy_bytes_per_s"]
            row["of_matmul"] = row["flops_per_s"] / ceilings["matmul_flops_per_s"]
            if "bf16_us" in row:
                row["of_bf16"] = row["bf16_us"] / row["us"]
        found.append(row)
    return found


def find_row(rows: list[dict[str, Any]], case: str, type_name: str, tokens: int) -> dict[str, Any]:
    return next((r for r in rows if (r["case"], r["type"], r["tokens"]) == (case, type_name, tokens) and "us" in r), {})


def context_step(document: Document, stage: str, context: int = 200) -> float | None:
    rows = dig(steps_of(document, stage), "contexts", "rows") or []
    return next((row["step_s"] for row in rows if row["context"] == context), None)


def decode_bytes(document: Document) -> float | None:
    """Weights and cache that a step reads at 200 tokens."""
    work = dig(steps_of(document, "work"), "work", "q4_k_all, decode at 200")
    return work["weight_bytes"] + work["cache_bytes"] if work else None


def decode_share(document: Document) -> float | None:
    """Of the copy bandwidth, that a decode step at 200 tokens uses."""
    copy = dig(steps_of(document, "facts"), "ceilings", "copy_bytes_per_s")
    return ratio(ratio(decode_bytes(document), context_step(document, "requests-q4_k_all")), copy)


def on_paper(document: Document) -> Iterator[str]:
    """Tokens a second to expect of small cards: their bandwidth, used as well as this card's was."""
    share, n_bytes = decode_share(document), decode_bytes(document)
    for name, bytes_per_s in PAPER.items() if share and n_bytes else ():
        least, rate = n_bytes / bytes_per_s, share * PAPER_COPY * bytes_per_s / n_bytes
        yield f"{name}: {rate:.0f} tokens/s on paper (4B q4_k_all at 200; {1 / least:.0f} if memory were all)"


def count_cases(document: Document) -> tuple[int, int]:
    """Cases that were judged, and those that are not green."""
    rows = [r for name in ("cases", "pytest") for r in document["stages"].get(name, {}).get("steps", [])]
    judged = [r for r in rows if not r.get("skipped")]
    return len(judged), sum(not r.get("ok") for r in judged)


def goals(document: Document) -> list[Goal]:
    """Of a card; ratios in one run."""
    rows, peer = kernel_rows(document), steps_of(document, "peer")
    compiled, requests = steps_of(document, "compiled-peer"), steps_of(document, "requests-q4_k_all")
    step, (judged, red) = context_step(document, "requests-q4_k_all"), count_cases(document)
    one, eight = (find_row(rows, "gate_up", "Q4_K", n).get("us") for n in (1, 8))
    first, theirs = dig(requests, "clip", "first_token_s"), dig(peer, "clip", "first_token_s")
    peak, plan = (dig(requests, "first request", key) for key in ("peak_bytes", "planned_without_libraries"))
    many = [r["of_bf16"] for r in rows if r["tokens"] == 512 and "of_bf16" in r and not r["case"].startswith("enc.")]
    return [
        Goal("cases that are not green", float(red) if judged else None, 0, most=True),
        Goal("head (Q6_K), of copy bandwidth", find_row(rows, "head", "Q6_K", 1).get("of_copy"), 0.80),
        Goal("head (Q4_K), of copy bandwidth", find_row(rows, "head", "Q4_K", 1).get("of_copy"), 0.80),
        Goal("gate|up (Q4_K), of copy bandwidth", find_row(rows, "gate_up", "Q4_K", 1).get("of_copy"), 0.65),
        Goal("decode step at 200, of copy bandwidth", decode_share(document), 0.55),
        Goal("eight tokens over one, gate|up (Q4_K)", ratio(eight, one), 1.5, most=True),
        Goal("decode, times transformers eager", ratio(dig(peer, "static at 200", "step_s"), step), 8),
        Goal("decode, times transformers compiled", ratio(dig(compiled, "compiled at 200", "step_s"), step), 2),
        Goal("mat-mat at 512 tokens, worst of bf16 matmul", min(many, default=None), 0.60),
        Goal("first token of 11 s, of transformers'", ratio(first, theirs), 0.5, most=True),
        Goal("peak over plan", ratio(peak, plan), 1.05, most=True),
        Goal("peak, of transformers'", ratio(peak, dig(peer, "peak", "peak_bytes")), 1 / 3, most=True),
    ]


def make_page(document: Document) -> str:
    """One page of text."""
    return "\n".join(_page(document)) + "\n"


def _page(document: Document) -> Iterator[str]:
    facts = steps_of(document, "facts")
    environment = facts.get("environment", {})
    ceilings = facts.get("ceilings", {})
    yield f"# {environment.get('gpu', 'an unknown card')}"
    yield ""
    versions = environment.get("versions", {})
    yield ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    if ceilings:
        yield (
            f"copy {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
            f"bf16 matmul {ceilings['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
        )
    yield from ("", "| goal | figure | limit | |", "| --- | --- | --- | --- |")
    yield from (goal.line() for goal in goals(document))
    yield from ("", *on_paper(document))
    yield from _failures(document)
    yield from _kernels(document)
    yield from _requests(document)
    yield from _profile(document)
    yield from ("", "## Stages", "")
    for name, stage in document["stages"].items():
        yield summary_line(name, stage)


def summary_line(name: str, stage: Mapping[str, Any]) -> str:
    steps = stage.get("steps", [])
    red = sum(not row.get("ok") for row in steps)
    note = f"; {stage['note'].splitlines()[0]}" if stage.get("note") else ""
    return f"{name}: {len(steps)} steps, {red} not well, {stage.get('seconds', 0):.0f} s{note}"


def why(row: Mapping[str, Any]) -> str:
    """In one line what is wrong with a step."""
    if lines := row.get("failure", "").strip().splitlines():
        return lines[-1][:160]
    return f"error {row['error']:.2e}, at most {row['limit']:.1e}" if "limit" in row else "wrong"


MOST_FAILURES = 40


def _failures(document: Document) -> Iterator[str]:
    rows = [(name, r) for name, s in document["stages"].items() for r in s.get("steps", []) if not r.get("ok")]
    if rows:
        yield from ("", "## Not well", "")
    for name, row in rows[:MOST_FAILURES]:
        yield f"- {name}: {row['step']}: {why(row)}"
    if len(rows) > MOST_FAILURES:
        yield f"- and {len(rows) - MOST_FAILURES} more"


def _kernels(document: Document) -> Iterator[str]:
    rows = [r for r in kernel_rows(document) if "us" in r]
    if rows:
        yield from (
            "",
            "## Products",
            "",
            "| product | type | tokens | us | GB/s | of copy | of bf16 | bf16 us | int4 us |",
        )
        yield "| --- " * 9 + "|"
    for r in rows:
        cells = [r["case"], r["type"], r["tokens"], f"{r['us']:.1f}", f"{r['bytes_per_s'] / 1e9:.0f}"]
        cells += [f"{r['of_copy']:.0%}" if "of_copy" in r else "", f"{r['of_bf16']:.2f}" if "of_bf16" in r else ""]
        cells += [f"{r[key]:.1f}" if key in r else "" for key in ("bf16_us", "int4_us")]
        yield f"| {' | '.join(map(str, cells))} |"


def _requests(document: Document) -> Iterator[str]:
    for name in [n for n in document["stages"] if n.startswith("requests-")]:
        steps = steps_of(document, name)
        yield from ("", f"## {name.removeprefix('requests-')}", "")
        for part in ("first request", "clip", "long clip"):
            if part in steps:
                r = steps[part]
                yield (
                    f"{part}, {r['clip_s']:.0f} s: encoder {1e3 * r['encoder_s']:.1f} ms, prefill "
                    f"{1e3 * r['prefill_s']:.1f} ms of {r['prompt_tokens']} tokens, first token "
                    f"{1e3 * r['first_token_s']:.1f} ms, step {1e3 * r['step_s']:.2f} ms; peak "
                    f"{r['peak_bytes'] / 2**30:.2f} GiB, planned {r['planned_bytes'] / 2**30:.2f} GiB"
                )
        for row in dig(steps, "contexts", "rows") or []:
            yield f"decode at {row['context']}: {1 / row['step_s']:.1f} tokens/s, {1e3 * row['step_s']:.3f} ms"
        if "encoder" in steps:
            yield f"encoder, {steps['encoder']['clip_s']:.0f} s: {steps['encoder']['encoder_s']:.3f} s"
    for name in ("start-warm", "start-cold"):
        if found := steps_of(document, name).get("start"):
            yield f"{name}: first token {found['to_first_token_s']:.1f} s after the start of the process"
    for name in ("peer", "compiled-peer"):
        for step, row in steps_of(document, name).items():
            keys = {k: v for k, v in row.items() if isinstance(v, float) and k.endswith("_s")}
            yield f"transformers, {step}: " + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in keys.items())


def _profile(document: Document) -> Iterator[str]:
    for part, row in steps_of(document, "profile").items():
        if "kernels" not in row:
            continue
        yield from ("", f"## Profile of {part}", "")
        yield f"wall {row['wall_us']:.0f} us, on the card {row['device_us']:.0f} us, {row['launches']:.0f} launches"
        yield from (f"- {k['us']:.1f} us, {k['count']:.1f} times: {k['name'][:90]}" for k in row["kernels"][:12])


def plot_roofline(document: Document, path: Path) -> bool:
    """Products over their intensity, below the measured ceilings; False where there is nothing to plot or no
    matplotlib."""
    rows = [r for r in kernel_rows(document) if "us" in r]
    ceilings = steps_of(document, "facts").get("ceilings")
    if not rows or not ceilings:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    bandwidth, rate = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    ridge = rate / bandwidth
    low, high = 0.5, 20 * ridge
    axes.plot([low, ridge, high], [low * bandwidth, rate, rate], color="black", label="copy bandwidth, bf16 matmul")
    for type_name in sorted({r["type"] for r in rows}):
        some = [r for r in rows if r["type"] == type_name]
        intensity = [r["flops_per_s"] / r["bytes_per_s"] for r in some]
        axes.scatter(intensity, [r["flops_per_s"] for r in some], s=18, label=type_name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="operations a second")
    axes.set_title(str(dig(steps_of(document, "facts"), "environment", "gpu") or ""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
