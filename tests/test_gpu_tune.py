"""Configurations of GPU kernels: looked up in measured tables, or by rule; nothing here needs a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auricle.kernels.formats import FORMATS
from auricle.kernels.gpu.tune import (
    FEW,
    PASS,
    PROCESSORS,
    RULES,
    TUNED,
    Config,
    Entry,
    TuneError,
    ahead_of,
    format_table,
    lanes_of,
    load_table,
    pick,
    resident_blocks,
    shared_bytes,
    slug,
    unit_of,
)

CARD = "NVIDIA Made-Up 9 Ti"
FACTS = {"machine": {"gpu": CARD}, "versions": {"triton": "0"}}


def entry(n_tokens: int, n_rows: int, n_cols: int, rows: int, kernel: str = "matvec") -> Entry:
    return Entry(kernel, "Q4_K", n_tokens, n_rows, n_cols, Config(rows, 256, n_tokens, 4, 2), 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of a card that is not: each entry is told by the rows of its tile."""
    entries = [
        entry(1, 9728, 2560, 101),
        entry(4, 9728, 2560, 104),
        entry(1, 1024, 2560, 201),
        entry(64, 9728, 2560, 364, "matmul"),
        entry(512, 9728, 2560, 365, "matmul"),
    ]
    (tmp_path / f"{slug(CARD)}.json").write_text(format_table(entries, FACTS))
    return tmp_path


@pytest.mark.parametrize(
    ("kernel", "n_tokens", "n_rows", "n_cols", "rows"),
    [
        ("matvec", 1, 9728, 2560, 101),  # measured
        ("matvec", 2, 9728, 2560, 104),  # the next token count that is enough
        ("matvec", 1, 8192, 2560, 101),  # the nearest shape
        ("matvec", 1, 1500, 2560, 201),
        ("matmul", 65, 9728, 2560, 365),
        ("matmul", 4096, 9728, 2560, 365),  # more than any that was measured
    ],
)
def test_lookup(folder: Path, kernel: str, n_tokens: int, n_rows: int, n_cols: int, rows: int) -> None:
    assert pick(kernel, "Q4_K", n_tokens, n_rows, n_cols, CARD, folder=folder).rows == rows


@pytest.mark.parametrize(
    ("kernel", "fmt", "n_tokens", "n_rows", "device"),
    [
        ("matvec", "Q6_K", 1, 9728, CARD),  # a type that was not measured
        ("matvec", "Q4_K", 1, 151936, CARD),  # a shape far from all
        ("matvec", "Q4_K", 8, 9728, CARD),  # tiles of fewer tokens than there are do not do
        ("matvec", "Q4_K", 1, 9728, "NVIDIA Made-Up 9"),
        ("matvec", "Q4_K", 1, 9728, None),
    ],
)
def test_the_rule_where_nothing_was_measured(
    folder: Path, kernel: str, fmt: str, n_tokens: int, n_rows: int, device: str | None
) -> None:
    by_rule = RULES[kernel](fmt, n_tokens, n_rows, 2560, (8, 9))
    assert pick(kernel, fmt, n_tokens, n_rows, 2560, device, folder=folder) == by_rule


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / f"{slug(CARD)}.json"
    path.write_text('{"rows": [{"kernel": "matvec"}]}')
    with pytest.raises(TuneError, match=r"made-up-9-ti\.json: not a tuned table"):
        pick("matvec", "Q4_K", 1, 9728, 2560, CARD, folder=tmp_path)


def test_tables_name_what_they_were_measured_on(folder: Path) -> None:
    (path,) = folder.iterdir()
    assert path.name == "nvidia-made-up-9-ti.json"
    document = json.loads(path.read_text())
    assert document["machine"]["gpu"] == CARD
    assert [Entry(**row | {"config": Config(**row["config"])}) for row in document["rows"]] == list(load_table(path))


def test_shipped_tables_were_measured() -> None:
    for path in TUNED.glob("*.json"):
        document = json.loads(path.read_text())
        assert slug(document["machine"]["gpu"]) == path.stem
        assert document["versions"]["triton"]
        assert all(e.us > 0 for e in load_table(path))


@given(
    fmt=st.sampled_from([f.name for f in FORMATS]),
    n_tokens=st.integers(1, 4096),
    n_rows=st.integers(1, 200_000),
    n_cols=st.integers(1, 13_000),
    capability=st.sampled_from(sorted(PROCESSORS)),
)
def test_rules_keep_to_the_limits(
    fmt: str, n_tokens: int, n_rows: int, n_cols: int, capability: tuple[int, int]
) -> None:
    kernel = "matvec" if n_tokens <= FEW else "matmul"
    config = pick(kernel, fmt, n_tokens, n_rows, n_cols, capability=capability)
    tiles = (config.rows, config.cols, config.tokens, config.warps)
    assert all(n > 0 and n & (n - 1) == 0 for n in tiles), config  # Triton's blocks are powers of two
    if kernel == "matvec":
        assert min(n_tokens, PASS) <= config.tokens < 2 * n_tokens
        assert config.cols == pick(kernel, fmt, 1, n_rows, n_cols, capability=capability).cols
    else:
        sizes = config.rows, config.cols, config.tokens, config.stages
        assert shared_bytes(fmt, *sizes) <= PROCESSORS[capability].shared


def test_resident_blocks() -> None:
    """By registers, by threads, by shared memory; figures of NVIDIA's occupancy calculator for 8.9."""
    assert resident_blocks((8, 9), registers=40, shared=0, warps=4) == 12  # 48 warps
    assert resident_blocks((8, 9), registers=128, shared=0, warps=8) == 2
    assert resident_blocks((8, 9), registers=32, shared=48 << 10, warps=4) == 2
    assert resident_blocks((8, 9), registers=32, shared=100 << 10, warps=4) == 0
    assert resident_blocks((9, 0), registers=32, shared=100 << 10, warps=4) == 2


def test_configurations_are_plain_data() -> None:
    assert [f.name for f in dataclasses.fields(Config)] == ["rows", "cols", "tokens", "warps", "stages"]


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(2560, 4096), (6144, 2560), (9728, 2560), (2560, 9728), (151936, 2560)])
def test_every_thread_of_a_mat_vec_has_rows_and_few_idle_steps(
    fmt: str, n_tokens: int, n_rows: int, n_cols: int
) -> None:
    unit, config = unit_of(fmt), pick("matvec", fmt, n_tokens, n_rows, n_cols, capability=(9, 0))
    lanes = lanes_of(config, unit)
    assert lanes <= 32
    assert config.rows * lanes % (32 * config.warps) == 0
    steps = -(-n_cols // (lanes * unit))
    assert steps * lanes * unit <= 1.1 * n_cols
    assert steps % ahead_of(config, unit, n_cols) == 0


def test_measured_cuts_of_a_mat_vec_keep_the_order_of_sums(tmp_path: Path) -> None:
    measured = Config(64, 2048, 1, 2, 3)
    table = format_table([Entry("matvec", "Q4_K", 1, 9728, 2560, measured, 1.0)], FACTS)
    (tmp_path / f"{slug(CARD)}.json").write_text(table)
    found = pick("matvec", "Q4_K", 1, 9728, 2560, CARD, folder=tmp_path)
    by_rule = RULES["matvec"]("Q4_K", 1, 9728, 2560, (8, 9))
    assert found == dataclasses.replace(measured, cols=by_rule.cols) != by_rule
