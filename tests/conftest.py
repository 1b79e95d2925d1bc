"""Settings for every test: one arithmetic thread a process, since the suite runs one process a core."""

from __future__ import annotations

import logging
import os
from functools import partial

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--card", action="store_true", help="the cases of GPU kernels run on this machine's GPU")


@pytest.fixture(autouse=True)
def pristine_log():
    """No test finds what the command line set up for another: a handler keeps the stderr that was there then."""
    log = logging.getLogger("auricle")
    log.handlers[:], log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one core, for as long as a module's tests run."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(shape)`: the folder of a random checkpoint, made once."""
    from talks import checkpoint_of

    return partial(checkpoint_of, tmp_path_factory.mktemp("finetune"))
