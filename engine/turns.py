"""Whose turn it is: a model works on one answer at a time, whoever asks and from whichever thread.

Knows threads and processes. Does not know what an answer is.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..kernels.errors import AuricleError

log = logging.getLogger("auricle.engine")

LOOK_AGAIN_S = 0.5  # whether the thread that has the turn is still there
PATIENCE_S = 60.0


class TurnError(AuricleError):
    """A request that a model cannot take: it is closed, has gone on to another, or was opened before a fork."""


class Turn:
    """One answer's claim to the model. `over`: it has ended, or another has taken its place."""

    over = False


class Turns:
    """Gives each answer its turn, from its first piece of work to its end.

    An answer of another thread waits for that. One of the thread that worked last cannot wait for itself: it takes the
    turn, and the older answer raises TurnError when it is read on. So does what belongs to a thread that has ended.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # over an RLock: a collected answer may end its turn anywhere
        self._turn: Turn | None = None
        self._thread = threading.current_thread()  # that worked last
        self._busy = False
        self.closed = False

    @contextmanager
    def work(self, turn: Turn) -> Iterator[None]:
        """What is done inside is done by nobody else meanwhile. Waits until it may begin. Raises TurnError."""
        check_process()
        with self._changed:
            self._wait_for(turn)
            self._turn, self._thread, self._busy = turn, threading.current_thread(), True
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _wait_for(self, turn: Turn) -> None:
        waited = 0.0  # since anything changed
        while True:
            if turn.over:
                raise TurnError(
                    "this answer is over: the model was asked again in this thread; read it to its end first, "
                    "or open two models"
                )
            if self.closed:
                raise TurnError("the model is closed; load it again")
            own = self._thread is threading.current_thread()
            if self._busy and own:
                raise TurnError("the model is at work in this very thread; ask again when that has ended")
            free = self._turn in (None, turn) or own or not self._thread.is_alive()
            if free and not self._busy:
                break
            waited = 0.0 if self._changed.wait(LOOK_AGAIN_S) else waited + LOOK_AGAIN_S
            if waited == PATIENCE_S:
                log.warning(
                    "waiting for an answer that another thread does not read on; it must read it to its end or close it"
                )
        if self._turn is not turn and self._turn is not None:
            self._turn.over = True

    def end(self, turn: Turn) -> None:
        """The answer needs the model no more."""
        if forked():  # a lock that another thread held at the fork is never released here
            return
        with self._changed:
            turn.over = True
            if self._turn is turn:
                self._turn = None
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody gets a turn from now on; waits for the work that is under way in another thread."""
        self.closed = True  # before the wait: a thread that works on and on finds out between two pieces
        if forked():
            return
        with self._changed:
            self._changed.notify_all()
            while self._busy and self._thread is not threading.current_thread():
                self._changed.wait()


_worker: int | None = None  # the process whose threads do the arithmetic


def forked() -> bool:
    """Whether this process is a copy of one that had computed: it has none of the threads that the libraries rely on,
    and would wait for them without end."""
    return _worker is not None and _worker != os.getpid()


def check_process() -> None:
    """To be called before anything is computed. Raises TurnError in a forked copy of a process that has computed."""
    global _worker
    if forked():
        raise TurnError(
            "this process was forked from one that has used a model, whose threads it lacks; "
            "start it afresh, with multiprocessing's start method 'spawn', and load the model there"
        )
    _worker = os.getpid()
