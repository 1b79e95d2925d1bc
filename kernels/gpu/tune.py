"""Which tiles a kernel works in: measured tables by the name of the GPU, and a rule for cards that nobody has measured.

`pick` reads and computes; nothing is measured here, ever: `benchmarks/kernels.py --tune` writes the tables. Knows the
limits of processors and the sizes of matrices, no kernel.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import AuricleError
from ..formats import BY_NAME

TUNED = Path(__file__).parent / "tuned"
FEW = 16  # tokens that the mat-vec takes
PASS = 8  # of them at a time
NEAR = 2.0  # a matrix measured serves for another whose rows and columns are within this factor together
WARP = 32  # threads
UNIT = 64  # weights that a thread of the mat-vec takes at once
OTHER_UNITS = {"Q6_K": 128, "F16": 16, "BF16": 16, "F32": 8}  # types of which it takes more or fewer
LEAST_LANES = 8  # threads that share a row in the mat-vec
WASTE = 1.1  # steps of so many lanes, for what a row would take if its end were full
BUSY_WARPS = 24  # of a multiprocessor: so many loads in flight hide what memory takes
IN_FLIGHT = {1: 5, 2: 2, 4: 1, 8: 1}  # units that a thread of the mat-vec loads before it needs them, by tokens
ROWS_A_THREAD = {1: 1, 2: 2, 4: 2, 8: 2}  # by tokens: those are loaded once for all rows
LARGE_ROWS_A_THREAD = ROWS_A_THREAD | {8: 1}  # of units larger than UNIT, for which registers do not suffice
REGISTERS = 65536  # of a multiprocessor
RESERVED_SHARED = 1 << 10  # bytes of shared memory that the driver takes for each block
DECODED_BYTES = 2  # a decoded weight or an activation in a tile is a half


class TuneError(AuricleError):
    """A tuned table that cannot be read."""


@dataclass(frozen=True)
class Config:
    """How a matrix product is cut. A program takes `rows` rows of weights and `tokens` tokens, `cols` columns at a
    time. `stages`: how many times as much is on its way from memory."""

    rows: int
    cols: int
    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Processor:
    """Limits of a compute capability: `shared` bytes of a block, `shared_all` of a multiprocessor, `warps` and `blocks`
    that it keeps resident; `count`: multiprocessors of a small card of the kind, for those of unknown name.

    Source: NVIDIA, CUDA C++ Programming Guide, technical specifications by compute capability.
    """

    shared: int
    shared_all: int
    warps: int
    blocks: int
    count: int


KIB = 1 << 10
PROCESSORS: dict[tuple[int, int], Processor] = {
    (8, 0): Processor(163 * KIB, 164 * KIB, 64, 32, 108),
    (8, 6): Processor(99 * KIB, 100 * KIB, 48, 16, 28),
    (8, 9): Processor(99 * KIB, 100 * KIB, 48, 24, 34),
    (9, 0): Processor(227 * KIB, 228 * KIB, 64, 32, 132),
    (10, 0): Processor(227 * KIB, 228 * KIB, 64, 32, 148),
    (12, 0): Processor(99 * KIB, 100 * KIB, 48, 24, 36),
}
SMALLEST = (8, 6)  # a card that is not in the table is taken for one of these


def find_processor(capability: tuple[int, int]) -> Processor:
    """The limits of a capability; those of the smallest kind for one that is not known."""
    return PROCESSORS.get(capability, PROCESSORS[SMALLEST])


def resident_blocks(capability: tuple[int, int], registers: int, shared: int, warps: int) -> int:
    """Blocks of `warps` warps that a multiprocessor keeps at once; `registers` of a thread, `shared` bytes of a block.

    0 when not even one fits. Registers are given out to a warp 256 at a time.
    """
    p = find_processor(capability)
    if shared > p.shared:
        return 0
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256 * warps)
    return min(p.blocks, p.warps // warps, by_registers, p.shared_all // (shared + RESERVED_SHARED))


def pick(
    kernel: str,
    format_name: str,
    n_tokens: int,
    n_rows: int,
    n_cols: int,
    device_name: str | None = None,
    capability: tuple[int, int] = (8, 9),
    folder: Path = TUNED,
) -> Config:
    """The configuration of `kernel` (one of RULES) for a matrix [n_rows, n_cols] of a type and so many tokens.

    Of a card whose name has a table, what was measured; else a rule. Columns of a mat-vec are always the rule's, which
    asks for no tokens: the order of sums hangs on them. Raises TuneError for a table that is damaged.
    """
    by_rule = RULES[kernel](format_name, n_tokens, n_rows, n_cols, capability)
    if device_name is None:
        return by_rule
    entries = load_table(folder / f"{slug(device_name)}.json")
    tuned = find_tuned(entries, kernel, format_name, n_tokens, n_rows, n_cols)
    if tuned is None:
        return by_rule
    return replace(tuned, cols=by_rule.cols) if kernel == "matvec" else tuned


# Tables.


def slug(device_name: str) -> str:
    """The name of a GPU as that of a file: "NVIDIA GeForce RTX 4060 Ti" -> "nvidia-geforce-rtx-4060-ti"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@dataclass(frozen=True)
class Entry:
    """A measured row of a table: `us` microseconds a launch."""

    kernel: str
    type: str
    n_tokens: int
    n_rows: int
    n_cols: int
    config: Config
    us: float


@cache
def load_table(path: Path) -> tuple[Entry, ...]:
    """The entries of a tuned table; none when there is no such file. Raises TuneError naming a damaged one."""
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text())["rows"]
        return tuple(Entry(**row | {"config": Config(**row["config"])}) for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path}: not a tuned table ({error!r}): measure again with benchmarks/kernels.py --tune"
        raise TuneError(message) from None


def find_tuned(
    entries: tuple[Entry, ...], kernel: str, format_name: str, n_tokens: int, n_rows: int, n_cols: int
) -> Config | None:
    """The entry of the nearest shape, and of the least token count that is enough, or of the largest there is."""

    def distance(e: Entry) -> float:
        return abs(math.log(e.n_rows / n_rows)) + abs(math.log(e.n_cols / n_cols))

    near = [e for e in entries if (e.kernel, e.type) == (kernel, format_name) and distance(e) <= math.log(NEAR)]
    if not near:
        return None
    enough = [e for e in near if e.n_tokens >= n_tokens]
    n = min(e.n_tokens for e in enough) if enough else max(e.n_tokens for e in near)
    if kernel == "matvec" and n < n_tokens:
        return None
    return min((e for e in near if e.n_tokens == n), key=distance).config


def format_table(entries: list[Entry], facts: dict[str, Any]) -> str:
    """The file of measured entries; `facts`: the machine and the versions they were measured with."""
    assert facts.keys() >= {"machine", "versions"}, f"{sorted(facts)=}"
    return json.dumps(facts | {"rows": [asdict(e) for e in entries]}, indent=1) + "\n"


# Rules.


def choose_matvec(format_name: str, n_tokens: int, n_rows: int, n_cols: int, capability: tuple[int, int]) -> Config:
    """Small programs, so that even a thousand rows give every multiprocessor some: time is what memory takes. They have
    whole rows, so sums need no second launch.

    Rows are shared by few lanes, whose steps end where rows do, and by more where else too few threads would be busy.
    Several tokens are loaded for several rows, as they would be the most of what is loaded.
    """
    busy = find_processor(capability).count * BUSY_WARPS * WARP
    lanes, units = LEAST_LANES, -(-n_cols // UNIT)
    while lanes < WARP and n_rows * lanes < busy and -(-units // (2 * lanes)) * 2 * lanes <= WASTE * units:
        lanes *= 2
    tokens, warps = min(PASS, 1 << (n_tokens - 1).bit_length()), 4
    unit = unit_of(format_name)
    rows = (LARGE_ROWS_A_THREAD if unit > UNIT else ROWS_A_THREAD)[tokens]
    cut = Config(rows * warps * WARP, lanes * UNIT, tokens, warps, stages=IN_FLIGHT[tokens])
    return replace(cut, rows=cut.rows // lanes_of(cut, unit))


def unit_of(format_name: str) -> int:
    """Weights that a thread of the mat-vec takes at once."""
    return OTHER_UNITS.get(format_name, UNIT)


def lanes_of(cut: Config, unit: int) -> int:
    """Threads that share a row in the mat-vec, of a type with units of so many weights: no more than a warp, as sums
    over several would be in another order for other numbers of warps."""
    return min(WARP, max(1, cut.cols // unit))


def ahead_of(cut: Config, unit: int, n_cols: int) -> int:
    """Units that a thread has in flight: as many as `stages` allows, fewer of large ones, and as divide the steps of a
    row."""
    steps = -(-n_cols // (unit * lanes_of(cut, unit)))
    most = max(1, min(cut.stages, cut.stages * UNIT // unit, steps))
    return next(n for n in range(most, 0, -1) if steps % n == 0)


def choose_matmul(format_name: str, n_tokens: int, n_rows: int, n_cols: int, capability: tuple[int, int]) -> Config:
    """Tiles as large as registers and shared memory allow, and smaller ones where there are few."""
    processor = find_processor(capability)
    tokens = max(16, min(128, 1 << (n_tokens - 1).bit_length()))
    rows, cols, stages = 128, 64, 4 if processor.shared > 128 * KIB else 3
    while rows > 64 and -(-n_tokens // tokens) * -(-n_rows // rows) < processor.count:
        rows //= 2
    while stages > 2 and shared_bytes(format_name, rows, cols, tokens, stages) > processor.shared:
        stages -= 1
    warps = 8 if rows * tokens >= 128 * 128 else 4
    return Config(rows, cols, tokens, warps, stages)


def shared_bytes(format_name: str, rows: int, cols: int, tokens: int, stages: int) -> int:
    """Shared memory of a mat-mat program: a pipeline of activations and of stored weights, and a tile decoded."""
    fmt = BY_NAME[format_name]
    stored = rows * cols * fmt.bits_per_weight / 8
    decoded = 0 if fmt.length == 1 else rows * cols * DECODED_BYTES
    return round(stages * (tokens * cols * DECODED_BYTES + stored) + decoded)


def choose_gated(format_name: str, n_tokens: int, n_rows: int, n_cols: int, capability: tuple[int, int]) -> Config:
    """As a mat-mat, but two matrices one after the other have two tiles of sums at the end.

    A warp group of tensor cores has 64 rows, and each of its threads room for both sums of 128 tokens. Others get half
    the rows, and half the warps with them: more warps would share a row, and hand its sums around.
    """
    cut = choose_matmul(format_name, n_tokens, n_rows, n_cols, capability)
    if cut.rows * cut.tokens < 128 * 128 or has_warp_groups(capability):
        return cut
    return replace(cut, rows=cut.rows // 2, warps=cut.warps // 2)


def has_warp_groups(capability: tuple[int, int]) -> bool:
    """Whether tensor cores take a product from four warps together, whose sums are spread over fewer registers."""
    return capability[0] == 9


RULES = {"matvec": choose_matvec, "matmul": choose_matmul, "matmul_gated": choose_gated}
