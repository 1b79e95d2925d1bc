"""Which tiles are fastest on this GPU: `kernels.py --tune`. Writes kernels/gpu/tuned/<gpu>.json with `--save`.

Starts from what `tune.pick` says and changes one size at a time, keeping what is faster, until nothing is. Every
configuration is compared with PyTorch before it is timed. Entries of other shapes, types and token counts that the
table has already are kept. A configuration takes a second or more to compile, so choose with --types, --tokens and
--only what is to be tuned in one go.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

from gpu import require_gpu, time_launches
from kernel_times import Card, Job, Stock, list_products, occurs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from auricle.engine.outputs import write_text
from auricle.kernels.formats import BY_NAME
from auricle.kernels.gpu.tiles import TILES
from auricle.kernels.gpu.tune import FEW, TUNED, Config, Entry, format_table, load_table, slug

LIMITS = {
    "rows": (1, 256),
    "cols": (32, 2048),
    "tokens": (16, 256),
    "warps": (1, 16),
    "stages": (1, 5),
}
# Columns of a mat-vec are the rule's: see `tune.pick`.
CHANGED = {"matvec": ("warps", "rows", "stages"), "matmul": ("warps", "rows", "tokens", "cols", "stages")}
WORTH = 0.98  # of the best time so far: what is not faster than that is chance


def neighbours(config: Config, kernel: str) -> Iterator[Config]:
    """Configurations with one size halved or doubled; stages of a mat-mat one more or less."""
    for name in CHANGED[kernel]:
        value, (least, most) = getattr(config, name), LIMITS[name]
        step = name == "stages" and kernel != "matvec"
        changed = (value - 1, value + 1) if step else (value // 2, value * 2)
        yield from (replace(config, **{name: n}) for n in changed if least <= n <= most)


def time_config(job: Job, config: Config, seconds: float) -> float:
    """Seconds of a launch; infinite when it does not fit the card or its result is wrong."""

    def chosen(*_: object) -> Config:
        return config

    try:
        if job.error(chosen) > job.tolerance:
            print(f"wrong: {job.stock.product.name} {job.stock.format} {config}", file=sys.stderr)
            return float("inf")
        return time_launches(job.calls(chosen), seconds)
    except (OutOfResources, PTXASError, CompilationError):
        return float("inf")


def find_best(job: Job, kernel: str, start: Config, seconds: float) -> tuple[Config, float]:
    """Goes downhill from `start`."""
    seen = {start: time_config(job, start, seconds)}
    best = start
    while True:
        for config in neighbours(best, kernel):
            if config not in seen:
                seen[config] = time_config(job, config, seconds)
        nearest = min(neighbours(best, kernel), key=seen.__getitem__)
        if seen[nearest] > WORTH * seen[best]:
            return best, seen[best]
        best = nearest


def run(a: argparse.Namespace) -> int:
    """Measures, prints, and with `--save` writes the table. Raises NoGPU."""
    require_gpu()
    card = Card(a.seconds)
    facts = {"machine": card.facts, "versions": card.facts["versions"]}
    path = TUNED / f"{slug(card.facts['gpu'])}.json"
    entries = {(e.kernel, e.type, e.n_tokens, e.n_rows, e.n_cols): e for e in load_table(path)}
    products = [p for shape in a.shapes for p in list_products(shape) if re.search(a.only, p.name) and not p.gated]
    for product in products:
        single = replace(product, rows=product.rows[:1])
        for name in a.types or sorted(fmt.name for fmt in TILES):
            stock = Stock(single, BY_NAME[name], "cuda", card.rotation_bytes)
            for n in filter(lambda n: occurs(product, n), a.tokens):
                kernel = "matvec" if n <= FEW else "matmul"
                key = (kernel, name, n, single.rows[0], single.n_cols)
                start = card.pick(*key)
                config, seconds = find_best(Job(stock, n, "cuda"), kernel, start, a.seconds)
                entries[key] = Entry(*key, config, 1e6 * seconds)
                print(f"{product.name} {name} {n} tokens: {1e6 * seconds:.1f} us, {config}", flush=True)
                if a.save:
                    path.parent.mkdir(exist_ok=True)
                    write_text(path, format_table(list(entries.values()), facts))
    print(json.dumps({"benchmark": "kernels-tune", "entries": len(entries), "machine": card.facts}))
    return 0
