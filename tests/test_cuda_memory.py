"""How weights get to a card: in bounded pieces that several threads write, queued in order; on a stand-in."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from auricle.engine.weights import Weight
from auricle.kernels import layouts
from auricle.kernels.dequantize import dequantize
from auricle.kernels.formats import F16, IQ4_NL, Q4_K, Q6_K, Q8_0, Format
from stand_in import StandIn

pytest.importorskip("triton", reason="the kernels are written in Triton")
memory = pytest.importorskip("auricle.engine.backends.cuda_memory")


class Recorder(StandIn):
    """Pinned memory that is counted, and events that tell when a slot may be written again."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned_bytes = 0

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.pinned_bytes += nbytes
        return super().pinned(nbytes)


@pytest.fixture
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLOT_BYTES", 8192)
    monkeypatch.setattr(memory, "N_THREADS", 4)
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 4)


@pytest.mark.parametrize(("fmt", "stored"), [(Q4_K, Q4_K), (Q6_K, Q6_K), (Q8_0, Q8_0), (F16, F16), (IQ4_NL, F16)])
def test_a_matrix_of_many_pieces_arrives_whole(small_slots: None, fmt: Format, stored: Format) -> None:
    n_rows, n_cols = 133, 256
    data = np.random.default_rng(0).integers(0, 60, (n_rows, fmt.row_bytes(n_cols)), dtype=np.uint8)
    card = Recorder()
    placed = memory.CardDevice(card).place(Weight("w", fmt, (n_rows, n_cols), data))
    rows = data if fmt is stored else dequantize(data, fmt).astype(np.float16).view(np.uint8)
    assert (placed.format, placed.n_rows, placed.n_cols) == (stored, n_rows, n_cols)
    np.testing.assert_array_equal(placed.words.numpy().view(np.uint8), layouts.pack(rows, stored).reshape(-1))
    assert card.pinned_bytes == memory.N_SLOTS * memory.SLOT_BYTES


def test_numbers_longer_than_all_slots_arrive_in_order(small_slots: None) -> None:
    values = np.arange(3 * memory.N_SLOTS * 8192 // 4 + 5, dtype=np.float32)
    np.testing.assert_array_equal(memory.CardDevice(Recorder()).constant(values).numpy(), values)


def test_pieces_are_written_at_the_same_time_and_queued_in_order(small_slots: None) -> None:
    together = threading.Barrier(4, timeout=20)
    target, finished = torch.zeros(4, 10, dtype=torch.uint8), []

    def write(n: int, out: np.ndarray) -> None:
        together.wait()  # for ever, if one were written after the other
        time.sleep(0.05 * (3 - n))
        out[:] = n + 1
        finished.append(n)

    staging = memory.Staging(Recorder())
    staging.upload(memory.Piece(target[n], partial(write, n)) for n in range(4))
    assert sorted(finished) == [0, 1, 2, 3]
    assert target.tolist() == [[n + 1] * 10 for n in range(4)]


def test_a_slot_is_not_written_while_the_card_reads_it(small_slots: None) -> None:
    """Every use of a slot waits for the event that was recorded after the copy before."""
    log: list[tuple[str, int]] = []

    class Event:
        def __init__(self, n: int) -> None:
            self.n = n

        def record(self) -> None:
            log.append(("copied", self.n))

        def synchronize(self) -> None:
            log.append(("wait", self.n))

    card = Recorder()
    numbers = iter(range(100))
    card.event = lambda: Event(next(numbers))
    staging = memory.Staging(card)
    target = torch.zeros(3 * memory.N_SLOTS, 4, dtype=torch.uint8)
    staging.upload(memory.Piece(row, lambda out: out.fill(1)) for row in target)
    for n in range(memory.N_SLOTS):
        assert [what for what, slot in log if slot == n] == ["wait", "copied"] * 3
    assert [slot for what, slot in log if what == "copied"] == [*range(memory.N_SLOTS)] * 3


def test_an_error_of_a_thread_is_raised_and_later_uploads_work(small_slots: None) -> None:
    staging, target = memory.Staging(Recorder()), torch.zeros(20, 4, dtype=torch.uint8)
    writing = []

    def write(n: int, out: np.ndarray) -> None:
        writing.append(n)
        if n == 2:
            raise OSError("the file is gone")
        out[:] = 7
        writing.remove(n)

    with pytest.raises(OSError, match="the file is gone"):
        staging.upload(memory.Piece(row, partial(write, n)) for n, row in enumerate(target))
    assert writing == [2]
    assert target[:2].eq(7).all()
    staging.upload(memory.Piece(row, lambda out: out.fill(9)) for row in target)
    assert target.eq(9).all()
