"""The diary of a conversion, so that one that was interrupted can go on: `OUT.part.journal` beside `OUT.part`.

Lines of JSON, only ever appended. The first states what is being written, as a fingerprint; each further one a tensor
that is finished, with the CRC-32 of its bytes, and stands there only after those bytes are on the disk. A line that
was cut off by a crash counts for nothing, nor does what comes after it. Knows no weights and no plan.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..engine.outputs import OutputError, disk_errors
from .source import ConversionError

VERSION = 1
SYNC_BYTES = 64 << 20  # written between two lines at most, but for a tensor that is larger

# What leaves the work where it is, to be resumed; any other failure would happen again.
_RESUMABLE = (KeyboardInterrupt, SystemExit, OutputError, OSError, MemoryError)


class Journal:
    """A context manager around a conversion to `out_path`; one process at a time.

    Entering raises ConversionError where a conversion was interrupted and `resume` does not say to go on. On a clean
    exit the journal goes; after a failure it and the .part file stay if resuming can help and there is something to
    resume, else both go.
    """

    def __init__(self, out_path: Path, resume: bool) -> None:
        self.out_path, self.part, self.path = out_path, Path(f"{out_path}.part"), Path(f"{out_path}.part.journal")
        self.resume = resume
        self.recorded: dict[str, int] = {}  # tensors that an earlier process finished, with their CRC-32
        self._fingerprint: str | None = None  # of the interrupted conversion
        self._end = 0  # of the lines that are whole
        self._begun = False
        self._waiting: list[tuple[str, int]] = []
        self._waiting_bytes = 0
        self._fd = -1

    @property
    def continues(self) -> bool:
        """Whether there is an interrupted conversion."""
        return self._fingerprint is not None

    def __enter__(self) -> Journal:
        with disk_errors(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            with disk_errors(self.path):
                text = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
            if self.part.exists():
                self._parse(text)
            if self.continues and not self.resume:
                raise ConversionError(
                    f"{self.out_path}: a conversion was interrupted here; continue with --resume or delete {self.part}"
                )
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def begin(self, fingerprint: str) -> None:
        """State what is written, or check that it is what was being written. Raises ConversionError if it is not."""
        if self.continues and self._fingerprint != fingerprint:
            raise ConversionError(
                f"{self.part} was begun from another source or with other options: repeat those, or delete it"
            )
        with disk_errors(self.path):
            os.ftruncate(self._fd, self._end)
            if not self.continues:
                self._append([{"journal": VERSION, "fingerprint": fingerprint}])
        self._begun = True

    def record(self, name: str, crc: int, nbytes: int, sync: Callable[[], None]) -> None:
        """Tensor `name` is written; `sync` puts it on the disk, and is called once for many small tensors."""
        self._waiting.append((name, crc))
        self._waiting_bytes += nbytes
        if self._waiting_bytes < SYNC_BYTES:
            return
        sync()
        with disk_errors(self.path):
            self._append([{"tensor": name, "crc32": crc} for name, crc in self._waiting])
        self.recorded.update(self._waiting)
        self._waiting, self._waiting_bytes = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        refused = self.continues and not self._begun
        resumable = isinstance(error, _RESUMABLE) or isinstance(getattr(error, "__cause__", None), OSError)
        if refused or (resumable and self.recorded):
            return
        if kind is not None and self._begun:
            self.part.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(f"{self.out_path} is being written by another process: wait for it") from error

    def _parse(self, text: bytes) -> None:
        for line in text.split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
                if self._fingerprint is None:
                    fingerprint = entry["fingerprint"] if entry["journal"] == VERSION else None
                    if fingerprint is None:
                        return
                    self._fingerprint = fingerprint
                else:
                    self.recorded[entry["tensor"]] = entry["crc32"]
            except (ValueError, KeyError, TypeError):
                return
            self._end += len(line) + 1

    def _append(self, entries: list[dict]) -> None:
        text = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        while text:
            n = os.pwrite(self._fd, text, self._end)
            text, self._end = text[n:], self._end + n
        os.fsync(self._fd)
