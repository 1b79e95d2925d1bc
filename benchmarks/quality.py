"""What quantising does to words: error rates of a trained model in each type, on human recordings of spoken digits.

    python benchmarks/quality.py demo FSDD_FOLDER --ablate --readme README.md

The model (an F16 or F32 GGUF; `demo` is the one in the box) is quantised to each type, with and without importance
weights from training recordings, and asked about sequences of test recordings: to transcribe them, to transcribe them
with times, and to count. FSDD_FOLDER holds the Free Spoken Digit Dataset's recordings; those of the test are of
speakers heard in training ("heard") and of one who was not ("unheard"). With --ablate the model also does without its
time markers, with the DeepStack inputs shuffled, and without them.

Writes quality.json and, where matplotlib is installed, quality.png into --out, prints the table and puts it between
the marks in the README.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from quality_asks import collect, measure_file, quantise, take_away

from auricle.engine.outputs import replacing, write_text
from auricle.tools.demo import find_model
from auricle.tools.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- quality -->", "<!-- /quality -->"
RECIPES = ("f32", "f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_k_f16enc", "q4_k_all", "q3_k")
UNWEIGHED = ("f32", "f16", "q8_0")  # whose rounding heeds no importance
SPEAKERS = ("heard", "unheard")

Row = dict[str, Any]


def make_files(model: Path, fsdd: Path, folder: Path, a: argparse.Namespace) -> Iterator[tuple[Row, Path, dict]]:
    """Each row's name and the like, its file, and the options to ask it with."""
    importance = None
    if a.imatrix_clips and set(a.types) - set(UNWEIGHED):
        importance = collect(model, fsdd, folder, a.imatrix_clips, a.seed)
    for recipe in a.types:
        for weights in (None, importance) if recipe not in UNWEIGHED and importance else (None,):
            weighed = weights is not None
            path = quantise(model, folder / f"{recipe}{'-imatrix' * weighed}.gguf", recipe, weights)
            yield {"kind": "type", "name": recipe, "imatrix": weighed, "bytes": path.stat().st_size}, path, {}
    if a.ablate:
        for name, (path, options) in take_away(model, folder).items():
            yield {"kind": "ablation", "name": name, "imatrix": False, "bytes": path.stat().st_size}, path, options


def measure_all(model: Path, fsdd: Path, a: argparse.Namespace) -> list[Row]:
    """All rows, several processes of one thread at a time."""
    rows: dict[Future, Row] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(a.jobs, context) as pool:
        for row, path, options in make_files(model, fsdd, Path(folder), a):
            rows[pool.submit(measure_file, path, fsdd, a.sequences, a.seed, 1, options)] = row
        for done in as_completed(rows):
            rows[done] |= done.result()
            print(f"{describe(rows[done])}: {rates(rows[done])}", flush=True)
    return list(rows.values())


def describe(row: Row) -> str:
    return f"{row['name']} + importance" if row["imatrix"] else row["name"]


def rates(row: Row) -> str:
    return ", ".join(f"{100 * row[s]['words']['wer']:.2f} % digit errors ({s})" for s in SPEAKERS)


COLUMNS = {
    "digit errors": lambda s: percent(s["words"]["wer"]),
    "sequences without": lambda s: percent(s["words"]["exact"], 1),
    "time error, mean": lambda s: milliseconds(s["times"]["aas_ms"]),
    "95 %": lambda s: milliseconds(s["times"]["p95_ms"]),
    "within 150 ms": lambda s: percent(s["times"]["near"], 1),
    "counts": lambda s: percent(s["count"], 1),
}


def percent(share: float | None, decimals: int = 2) -> str:
    return "-" if share is None else f"{100 * share:.{decimals}f} %"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def make_table(rows: list[Row]) -> str:
    """In each cell the speakers heard in training, then the one who was not."""
    header = ["type", "MB", *COLUMNS]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [" / ".join(show(row[s]) for s in SPEAKERS) for show in COLUMNS.values()]
        size = f"{row['bytes'] / 1e6:.1f}" if row["kind"] == "type" else ""
        lines.append([describe(row), size, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def put_between_marks(path: Path, table: str) -> None:
    before, rest = path.read_text().split(BEGIN)
    write_text(path, f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def plot(rows: list[Row], path: Path) -> None:
    """Digit errors against the size of the file; types with importance weights are joined to those without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharex=True)
    for ax, speakers in zip(axes, SPEAKERS, strict=True):
        for weighed, marker, label in ((False, "o", "plain"), (True, "^", "with importance weights")):
            chosen = [r for r in rows if r["imatrix"] == weighed]
            sizes, errors = [r["bytes"] / 1e6 for r in chosen], [100 * r[speakers]["words"]["wer"] for r in chosen]
            ax.plot(sizes, errors, marker, label=label, mfc="none" if weighed else None)
            for r, x, y in zip(chosen, sizes, errors, strict=True):
                if not weighed:
                    ax.annotate(
                        r["name"], (x, y), xytext=(3, 3), textcoords="offset points", fontsize="x-small", rotation=50
                    )
        title = "speakers heard in training" if speakers == "heard" else "a speaker never heard"
        ax.set(title=title, xlabel="MB", ylabel="digit errors, %", xscale="log")
        ax.margins(0.12)
        ax.set_ylim(0, 1.2 * ax.get_ylim()[1])  # room for the names
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="x", which="both", labelsize="small")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part.path, dpi=110, format=path.suffix[1:], metadata={"Software": None})
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file in F16 or F32, or demo")
    parser.add_argument("fsdd", type=Path, help="folder of the recordings")
    parser.add_argument("--types", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--sequences", type=int, default=100, help="of each kind of speakers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--imatrix-clips", type=int, default=48, help="0: no importance weights")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--ablate", action="store_true", help="take away time markers and DeepStack inputs, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path)
    return parser.parse_args()


def main() -> None:
    a = parse_arguments()
    start = time.perf_counter()
    rows = measure_all(find_model(a.model), a.fsdd, a)
    types, ablations = ([r for r in rows if r["kind"] == kind] for kind in ("type", "ablation"))
    facts = {"sequences": a.sequences, "seed": a.seed, "imatrix_clips": a.imatrix_clips}
    facts |= {"seconds": round(time.perf_counter() - start), "machine": describe_machine(), "rows": rows}
    a.out.mkdir(parents=True, exist_ok=True)
    write_text(a.out / "quality.json", json.dumps(facts) + "\n")
    try:
        plot(types, a.out / "quality.png")
    except ImportError:
        print("no plot: matplotlib is not installed")
    print(make_table(types))
    if ablations:
        print(f"\n{make_table(ablations)}")
    if a.readme:
        put_between_marks(a.readme, make_table(types))


if __name__ == "__main__":
    main()
