"""A program and the system around it: stdout and stderr that may be closed, full or left by their reader, and signals.

Does not know what is written.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

UNWRITABLE = 8  # the exit status where stdout, or another output, cannot be written


class StdoutError(Exception):
    """Stdout does not take what is written. No AuricleError: there is nobody left to tell in the middle of the work."""


@contextmanager
def standard_streams() -> Iterator[None]:
    """For the body of a program: what stdout does not take ends it with a line on stderr and the status UNWRITABLE,
    without the line where its reader left; what stderr does not take is lost and changes nothing. No file that is
    opened meanwhile gets the number of a stream that is closed. Characters that a stream's encoding lacks are written
    as escapes. Streams that a caller has put in the place of the process's own are left alone.
    """
    _fill_gaps()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _open(1, sys.stdout, _Stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _open(2, sys.stderr, _Stderr)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except StdoutError as error:
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else 0
        if number != errno.EPIPE:
            reason = "it is closed" if number == errno.EBADF else os.strerror(number)
            print(f"auricle: cannot write to stdout: {reason}", file=sys.stderr, flush=True)
        raise SystemExit(UNWRITABLE) from None
    finally:
        sys.stdout, sys.stderr = before


def _fill_gaps() -> None:
    """A closed stream's number is given to something harmless: from stdin nothing can be read, to stdout nothing
    written, and what goes to stderr is lost."""
    for fd, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # the lowest free number, which is fd


def _open(fd: int, stream: TextIO | None, kind: type[io.FileIO]) -> TextIO:
    """As Python opens it. A stream that was closed when the process began has no `stream`, whatever has its number."""
    if stream is None:
        fd = os.open(os.devnull, os.O_RDONLY)
    encoding, through = getattr(stream, "encoding", "utf-8"), getattr(stream, "write_through", False)
    raw = kind(fd, "wb", closefd=False)
    buffered = io.BufferedWriter(raw)
    by_lines = fd == 2 or raw.isatty()
    return io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=by_lines, write_through=through)


class _Stdout(io.FileIO):
    """Raises StdoutError for the first bytes that are not taken; those that are still on their way then are lost."""

    gone = False

    def write(self, data: Any) -> int:
        if self.gone:
            return len(data)
        try:
            while (n := super().write(data)) is None:  # a pipe that is full and does not block
                select.select([], [self], [])
            return n
        except OSError as error:
            self.gone = True
            return self.refuse(error, len(data))

    def refuse(self, error: OSError, n: int) -> int:
        raise StdoutError from error


class _Stderr(_Stdout):
    """Loses what is not taken."""

    def refuse(self, error: OSError, n: int) -> int:
        return n


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A terminated or hung-up program leaves nothing half-written: SystemExit with the usual status, 128 + signal."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]  # nohup ignores one
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
