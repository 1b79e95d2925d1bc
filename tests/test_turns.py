"""One model and many askers: threads, answers in turn, a close in between, forks, and a file that shrinks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from auricle.convert.hf import convert, plan_conversion
from auricle.engine import Model, load, turns
from auricle.engine.gguf import GGUFError
from auricle.engine.turns import Turn, TurnError, Turns
from auricle.tools.sample import SampleShape, write_checkpoint
from sounds import JFK, synthetic

SHAPE = SampleShape(n_layer=2, enc_n_layer=2, taps=(0,), n_inject=1)
SOUND = synthetic(1.2, 16_000)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    write_checkpoint(folder / "checkpoint", SHAPE)
    convert(plan_conversion(folder / "checkpoint", "q8_0"), folder / "model.gguf")
    return folder / "model.gguf"


@pytest.fixture
def model(path: Path):
    with load(path, n_ctx=400, poison=True) as model:
        yield model


def in_thread(*tasks) -> None:
    """Runs each in a thread of its own, to the end of all."""
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_threads_that_ask_one_model_are_all_answered_right(model: Model) -> None:
    questions = [("What?", SOUND), ("Who was that?", JFK), ("Why?", None)]
    want = [model.generate(*question, max_new_tokens=12).token_ids for question in questions]
    got: list[list[tuple[int, ...]]] = [[] for _ in questions]

    def ask(i: int) -> None:
        for _ in range(3):
            stream = model.stream(*questions[i], max_new_tokens=12)
            for _piece in stream:
                pass
            got[i].append(stream.result.token_ids)

    in_thread(*(lambda i=i: ask(i) for i in range(len(questions))))
    assert got == [[ids] * 3 for ids in want]


def test_threads_may_share_an_answer(model: Model) -> None:
    want = model.generate("What?", SOUND, max_new_tokens=12)
    stream, pieces = model.stream("What?", SOUND, max_new_tokens=12), []
    in_thread(*[lambda: pieces.extend(stream)] * 3)
    assert stream.result.token_ids == want.token_ids
    assert sorted("".join(pieces)) == sorted(want.text)


@pytest.mark.parametrize("how", ["close", "drop", "end of its thread"])
def test_another_thread_waits_for_an_answer_and_no_longer(model: Model, how: str) -> None:
    want = model.generate("What?", SOUND, max_new_tokens=12).token_ids
    held = [model.stream(audio=JFK, max_new_tokens=50)]
    asked, answers = threading.Event(), []

    def ask() -> None:
        asked.set()
        answers.append(model.generate("What?", SOUND, max_new_tokens=12).token_ids)

    if how == "end of its thread":
        in_thread(lambda: next(held[0]))
        in_thread(ask)
    else:
        next(held[0])
        other = threading.Thread(target=ask)
        other.start()
        asked.wait()
        next(held[0])  # it is still this answer's turn
        assert not answers
        held[0].close() if how == "close" else held.clear()
        other.join(60)
    assert answers == [want]


def test_a_close_during_an_answer(path: Path) -> None:
    model, begun, said = load(path, n_ctx=400), threading.Event(), []

    def ask() -> None:
        try:
            for _piece in model.stream(audio=JFK, max_new_tokens=300, temperature=1.0, seed=1):
                begun.set()
        except TurnError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait()
    model.close()
    thread.join(60)
    assert said == ["the model is closed; load it again"]


def test_a_close_while_others_wait(path: Path) -> None:
    model, said = load(path, n_ctx=400), []
    held = model.stream(audio=JFK, max_new_tokens=50)
    next(held)

    def ask() -> None:
        try:
            model.generate("What?")
        except TurnError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    model.close()
    thread.join(60)
    assert said == ["the model is closed; load it again"]


def test_an_answer_cannot_be_asked_for_within_a_piece_of_work() -> None:
    queue, turn = Turns(), Turn()
    with queue.work(turn), pytest.raises(TurnError, match="at work in this very thread"), queue.work(Turn()):
        pass
    with queue.work(turn):  # which has not lost its turn
        pass


def test_who_waits_long_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(turns, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(turns, "PATIENCE_S", 0.01)
    queue, turn, later = Turns(), Turn(), Turn()
    with queue.work(turn):
        pass

    def wait() -> None:
        with queue.work(later):
            pass

    thread = threading.Thread(target=wait)
    thread.start()
    while "does not read on" not in caplog.text and thread.is_alive():
        thread.join(0.01)
    queue.end(turn)
    thread.join(60)
    assert caplog.text.count("does not read on") >= 1


FORK = """
import os, sys
from auricle.engine import AuricleError, load
model = load(sys.argv[1], n_ctx=200)
before = sys.argv[2] == "before"
want = None if before else model.generate("What?", max_new_tokens=3).text
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
try:
    with model:
        print(model.generate("What?", max_new_tokens=3).finish_reason, flush=True)
except AuricleError as error:
    print(error, flush=True)
try:
    with load(sys.argv[1], n_ctx=200) as other:
        print(other.generate("What?", max_new_tokens=3).finish_reason, flush=True)
except AuricleError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks as on POSIX")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_is_told_at_once(path: Path, when: str) -> None:
    """After work it lacks the threads of its parent; before that nothing is wrong."""
    command = [sys.executable, "-c", FORK, str(path), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(("'spawn'" in line) == (when == "after") for line in lines), lines


CUT = """
import os, sys
from pathlib import Path
from auricle.tools.cli.options import OpenSettings
path = Path(sys.argv[1])
model = OpenSettings(path, backend="reference").open()
os.truncate(path, 4096)
for name in model.file.tensors:
    model.file.data(name).sum()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="SIGBUS as on Linux")
def test_a_page_that_is_gone_ends_in_one_line(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    done = subprocess.run([sys.executable, "-c", CUT, str(copy)], capture_output=True, text=True, check=False)
    line = f"auricle: {copy} was cut short while it was in use; fetch or convert it again\n"
    assert (done.returncode, done.stderr) == (3, line)


TWO_MODELS = """
import sys, threading
import numpy as np
from auricle.engine import load
models = [load(sys.argv[1], n_ctx=200) for _ in range(2)]
answers = []
def ask(model):
    for _ in range(3):
        answers.append(model.generate("What?", np.zeros(8000, np.float32), sample_rate=16000, max_new_tokens=8).text)
threads = [threading.Thread(target=ask, args=(model,)) for model in models]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(answers) == 6 and len(set(answers)) == 1, answers
"""


def test_two_models_in_two_threads_where_numba_has_its_own_scheduler(path: Path) -> None:
    """It ends a process that runs two parallel kernels at once."""
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", TWO_MODELS, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_shrinks_between_two_steps(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    with load(copy, n_ctx=400) as model:
        stream = model.stream("What?", SOUND, max_new_tokens=50)
        next(stream)
        size = copy.stat().st_size
        os.truncate(copy, size - 100)
        with pytest.raises(GGUFError, match=f"was cut from {size:,} to {size - 100:,} bytes while it was in use"):
            list(stream)
        with pytest.raises(GGUFError, match="was cut from"):
            model.generate("What?", np.zeros(16_000, np.float32), sample_rate=16_000)
