"""Layouts for GPU memory: every byte of a file's rows is kept, once, where the kernels expect it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auricle.kernels.formats import FORMATS, Q4_0, Q4_K, Q6_K, Q8_0, Format
from auricle.kernels.layouts import find_layout, pack, packed_bytes, unpack


def random_rows(fmt: Format, n_rows: int, n_cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n_rows, fmt.row_bytes(n_cols)), dtype=np.uint8)


@given(st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
def test_packing_is_reversible_and_its_size_is_known(fmt: Format, n_rows: int, n_blocks: int, seed: int) -> None:
    n_cols = n_blocks * fmt.length
    rows = random_rows(fmt, n_rows, n_cols, seed)
    packed = pack(rows, fmt)
    assert packed.nbytes == packed_bytes(fmt, n_rows, n_cols)
    assert packed.shape[1] % 16 == 0
    np.testing.assert_array_equal(unpack(packed, fmt, n_cols), rows)


@pytest.mark.parametrize("fmt", [Q4_0, Q8_0, Q6_K], ids=str)
def test_planes_are_the_fields_of_a_row_one_after_the_other(fmt: Format) -> None:
    n_cols = 3 * fmt.length
    rows = random_rows(fmt, 4, n_cols)
    packed, planes = pack(rows, fmt), find_layout(fmt, n_cols).planes
    blocks = rows.view(fmt.layout)
    assert set(planes) == set(fmt.layout.names)
    for name, at in planes.items():
        assert at % 16 == 0
        expected = np.ascontiguousarray(blocks[name]).reshape(4, -1).view(np.uint8)
        np.testing.assert_array_equal(packed[:, at : at + expected.shape[1]], expected)


def test_rows_are_packed_by_themselves() -> None:
    rows = random_rows(Q6_K, 7, 512)
    np.testing.assert_array_equal(np.concatenate([pack(rows[:3], Q6_K), pack(rows[3:], Q6_K)]), pack(rows, Q6_K))


def test_blocks_of_whole_lines_stay_as_they_are() -> None:
    rows = random_rows(Q4_K, 2, 512)
    np.testing.assert_array_equal(pack(rows, Q4_K), rows)


@pytest.mark.parametrize(("fmt", "n_cols", "most"), [(Q8_0, 1280, 1.0), (Q4_0, 2560, 1.0), (Q6_K, 2560, 1.01)])
def test_planes_cost_next_to_nothing(fmt: Format, n_cols: int, most: float) -> None:
    assert packed_bytes(fmt, 1, n_cols) <= most * fmt.row_bytes(n_cols)
