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
from ..formats import BY_NAME, Format

TUNED = Path(__file__).parent / "tuned"
FEW = 8  # tokens that the mat-vec takes at once
NEAR = 2.0  # a matrix measured serves for another whose rows and columns are within this factor together
WARP = 32  # threads
LOAD_BITS = 128  # the widest load a thread can make
LOADS_A_WARP = 4  # of a row of a tile in the mat-vec: with more, activations would go through shared memory
LARGEST_TILE = {True: 512, False: 256}  # columns of it, of types below 8 bits and of others
REGISTERS = 65536  # of a multiprocessor
RESERVED_SHARED = 1 << 10  # bytes of shared memory that the driver takes for each block
DECODED_BYTES = 2  # a decoded weight or an activation in a tile is a half


class TuneError(AuricleError):
    """A tuned table that cannot be read."""


@dataclass(frozen=True)
class Config:
    """How a matrix product is cut. A program takes `rows` rows of weights and `tokens` tokens, `cols` columns at a
    time."""

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

    Of a card whose name has a table, what was measured; else a rule. Raises TuneError for a table that is damaged.
    """
    if device_name is not None:
        entries = load_table(folder / f"{slug(device_name)}.json")
        tuned = find_tuned(entries, kernel, format_name, n_tokens, n_rows, n_cols)
        if tuned is not None:
            return tuned
    return RULES[kernel](format_name, n_tokens, n_rows, n_cols, capability)


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

    Each thread gets one vector of a tile's codes, the widest load there is. The sums of more than two tokens take many
    registers, so there are fewer threads in a program.
    """
    bits = code_bits(BY_NAME[format_name])
    warps = 4 if n_tokens <= 2 else 2
    vectors = min(LARGEST_TILE[bits < 8] * bits // LOAD_BITS, LOADS_A_WARP * warps)  # of a row of a tile
    rows, cols = WARP * warps // vectors, vectors * LOAD_BITS // bits
    tokens = 1 << (min(n_tokens, FEW) - 1).bit_length()
    return Config(rows, cols, tokens, warps, stages=2)


def code_bits(fmt: Format) -> int:
    """Bits of a weight in the largest field of a block: what a kernel reads most of."""
    sizes = [field[0].itemsize for field in (fmt.layout.fields or {}).values()] or [fmt.block_bytes]
    return 8 * max(sizes) // fmt.length


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
    """As a mat-mat, but two matrices at once have two tiles of sums: half the rows where those are large."""
    cut = choose_matmul(format_name, n_tokens, n_rows, n_cols, capability)
    return replace(cut, rows=cut.rows // 2) if cut.rows * cut.tokens >= 128 * 128 else cut


RULES = {"matvec": choose_matvec, "matmul": choose_matmul, "matmul_gated": choose_gated}
