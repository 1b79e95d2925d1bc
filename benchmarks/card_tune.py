"""Which cuts of the products that matter are fastest on this card: checked by many processes, timed by one.

Around the cut that the rule gives, one size at a time is halved or doubled. A cut is timed only if its results are
right. A mat-vec has one cut for all token counts, so that the bits of a row never depend on how many rows there are: it
is taken where it is faster at one token and no slower at eight. Writes the table that `kernels/gpu/tune.py` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from card_device import Gpu, table_name
from card_kernels import Product, Stock, error_limit, list_products, shape_of
from card_steps import Step
from kernel_tune import neighbours

from auricle.engine.outputs import write_text
from auricle.kernels.gpu import tune
from auricle.kernels.gpu.tune import FEW, Config, Entry, format_table

WORTH = 0.97  # of the rule's time: what is not faster than that is chance
NO_SLOWER = 1.01
MANY = 512
SECONDS = 0.06
WANTED = (  # the products that take most of a request
    ("gate_up", "Q4_K", MANY), ("down", "Q4_K", MANY), ("gate_up", "Q4_K", 1), ("down", "Q4_K", 1),
    ("head", "Q6_K", 1), ("down", "Q6_K", 1), ("enc.fc1", "Q8_0", MANY), ("qkv", "Q4_K", MANY), ("head", "Q4_K", 1),
    ("enc.fc2", "Q8_0", MANY), ("down", "Q6_K", MANY),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A product in a type, at so many tokens; `kernel` as `tune.pick` knows it."""

    product: Product
    type_name: str
    n_tokens: int

    @property
    def kernel(self) -> str:
        if self.n_tokens <= FEW:
            return "matvec"
        return "matmul_gated" if self.product.close == "gate" else "matmul"

    @property
    def name(self) -> str:
        return f"{self.product.name} {self.type_name} n{self.n_tokens}"

    def rule(self, gpu: Gpu) -> Config:
        sizes = (self.product.rows[0], self.product.n_cols)
        return tune.pick(self.kernel, self.type_name, self.n_tokens, *sizes, None, gpu.capability)

    def configs(self, gpu: Gpu) -> list[Config]:
        """The rule's, and its neighbours."""
        rule = self.rule(gpu)
        return [rule, *neighbours(rule, "matvec" if self.kernel == "matvec" else "matmul")]


def tasks(gpu: Gpu) -> Iterator[Task]:
    products = {p.name: p for p in list_products(shape_of(gpu))}
    wanted = [("o", "Q4_K", 1)] if gpu.rehearsal else WANTED
    yield from (Task(products[name], type_name, n) for name, type_name, n in wanted)


def picker(gpu: Gpu, task: Task, config: Config) -> Callable[..., Config]:
    """Cuts that kernel's products in that type as `config` says, whatever their size, and all else as ever."""

    def pick(kernel: str, format_name: str, n_tokens: int, n_rows: int, n_cols: int) -> Config:
        if (kernel, format_name) == (task.kernel, task.type_name):
            return config
        return tune.pick(kernel, format_name, n_tokens, n_rows, n_cols, None, gpu.capability)

    return pick


def counts_of(task: Task) -> tuple[int, ...]:
    """Token counts that a cut is judged at."""
    return (1, FEW) if task.kernel == "matvec" else (task.n_tokens,)


def label(config: Config) -> str:
    return " ".join(f"{key}={value}" for key, value in asdict(config).items())


def mark_of(task: Task, config: Config) -> str:
    """The file that says that a cut is right."""
    return f"{task.name}.{label(config)}".replace(" ", "_")


def check_steps(gpu: Gpu, work: Path) -> Iterator[tuple[str, Step]]:
    """Each cut of each task, compared; which also compiles it. Cuts that are right leave a mark in `work`."""
    stocks: dict[str, Stock] = {}
    for task in tasks(gpu):
        for config in task.configs(gpu)[: 2 if gpu.rehearsal else None]:
            name = f"{task.name}: {label(config)}"
            yield name, lambda t=task, c=config, n=name: check_config(gpu, work, stocks, t, c, n)


def check_config(
    gpu: Gpu, work: Path, stocks: dict[str, Stock], task: Task, config: Config, name: str
) -> dict[str, Any]:
    """A cut that does not fit the card is no failure: it is not taken."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    counts = counts_of(task)
    if task.name not in stocks:
        stocks.clear()
        stocks[task.name] = Stock(task.product, task.type_name, gpu, max(counts))
    stock, backend = stocks[task.name], gpu.backend(picker(gpu, task, config))
    try:
        programs = {n: stock.program(backend, n) for n in counts}
    except (OutOfResources, PTXASError, CompilationError, AssertionError) as error:
        return {"fits": False, "why": str(error)[:200]}
    errors = {n: stock.error(program, n) for n, program in programs.items()}
    right = all(error <= error_limit(backend, task.type_name, n) for n, error in errors.items())
    same = same_bits(programs) if task.kernel == "matvec" else True
    if right and same:
        marks = work / "cuts"
        marks.mkdir(exist_ok=True)
        (marks / mark_of(task, config)).write_text("")
    return {"ok": right and same, "fits": True, "errors": errors, "same_bits": same}


def same_bits(programs: dict[int, Any]) -> bool:
    """Whether a token's results are the same whatever the number of tokens."""
    first, *others = [[out.view(-1)[: out.numel() // n] for out in p.outputs.values()] for n, p in programs.items()]
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def time_steps(gpu: Gpu, work: Path) -> Iterator[tuple[str, Step]]:
    entries: list[Entry] = []
    for task in tasks(gpu):
        yield task.name, lambda t=task: time_task(gpu, work, entries, t)


def time_task(gpu: Gpu, work: Path, entries: list[Entry], task: Task) -> dict[str, Any]:
    """The fastest of the cuts that are right, if it is worth it; the table is written anew."""
    counts, rule, times = counts_of(task), task.rule(gpu), {}
    stock = Stock(task.product, task.type_name, gpu, max(counts))
    for config in task.configs(gpu):
        mark = work / "cuts" / mark_of(task, config)
        if not mark.exists():
            continue
        backend = gpu.backend(picker(gpu, task, config))
        times[config] = [time_config(gpu, stock, backend, n) for n in counts]
    listed = [{"config": asdict(c), "us": [1e6 * s for s in t]} for c, t in times.items()]
    found = choose(times, rule)
    if found is None:
        return {"times": listed, "kept": "the rule's"}
    n = FEW if task.kernel == "matvec" else task.n_tokens
    sizes = (task.product.rows[0], task.product.n_cols)
    entries.append(Entry(task.kernel, task.type_name, n, *sizes, found, 1e6 * times[found][0]))
    facts = gpu.describe()
    table = format_table(entries, {"machine": facts, "versions": facts["versions"]})
    (work / "tuned").mkdir(exist_ok=True)
    write_text(work / "tuned" / table_name(gpu), table)
    return {"times": listed, "kept": asdict(found)}


def choose(times: dict[Config, list[float]], rule: Config) -> Config | None:
    """The cut that is fastest at the first token count, of those that are faster than the rule's there and no slower
    anywhere; None where there is none, or the rule's was not timed."""
    if rule not in times:
        return None
    base = times[rule]
    better = {
        config: t[0]
        for config, t in times.items()
        if t[0] <= WORTH * base[0] and all(a <= NO_SLOWER * b for a, b in zip(t, base, strict=True))
    }
    return min(better, key=better.__getitem__) if better else None


def time_config(gpu: Gpu, stock: Stock, backend: Any, n_tokens: int) -> float:
    programs = [stock.program(backend, n_tokens, copy) for copy in range(stock.n_copies())]
    return gpu.time_launches([program.call for program in programs], SECONDS)
