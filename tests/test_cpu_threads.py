"""Models and threads beside each other in one process: work space is by thread, and the number of threads is shared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
import torch

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import load
from auricle.tools.sample import SampleShape, write_checkpoint
from sounds import JFK

SHAPE = SampleShape(
    n_layer=2, enc_n_layer=2, taps=(0,), n_inject=1, enc_d_model=256, enc_d_out=256, d_adapter=256
)  # fmt: skip

pytestmark = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core only")


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    numba.set_num_threads(min(before, numba.config.NUMBA_NUM_THREADS))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    write_checkpoint(folder / "checkpoint", SHAPE)
    convert(plan_conversion(folder / "checkpoint", "q8_0"), folder / "model.gguf")
    return folder / "model.gguf"


def test_a_model_of_one_thread_beside_one_of_two(path: Path) -> None:
    """The second changes the number of threads under the first, whose programs have work space for one."""
    with load(path, threads=1) as one, load(path, precision="exact") as exact:
        want = one.generate(audio=JFK, max_new_tokens=8).token_ids
        with load(path, threads=2) as two:
            assert two.generate(audio=JFK, max_new_tokens=8).token_ids == want
            assert one.generate(audio=JFK, max_new_tokens=8).token_ids == want
        assert len(exact.generate(audio=JFK, max_new_tokens=8).token_ids) == 8


def test_another_python_thread(path: Path) -> None:
    """numba keeps the number of threads for each Python thread; a new one begins with all cores."""
    answers: list[tuple[tuple[int, ...], int]] = []

    def work() -> None:
        answers.append((model.generate(audio=JFK, max_new_tokens=8).token_ids, numba.get_num_threads()))

    with load(path, threads=1) as model:
        want = model.generate(audio=JFK, max_new_tokens=8).token_ids
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert answers == [(want, 1)]


def test_the_number_of_threads_is_what_was_asked_for(path: Path) -> None:
    with load(path, threads=1) as model:
        model.generate(audio=JFK, max_new_tokens=2)
        assert torch.get_num_threads() == numba.get_num_threads() == 1
