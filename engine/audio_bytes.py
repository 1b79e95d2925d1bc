"""The bytes of a recording from a path, a pipe, bytes or an open file, read by position.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..kernels.errors import AuricleError

_PIECE = 1 << 20  # bytes asked of a pipe or searched at a time
_REFUSED = "give a path, bytes, a binary file object or a numpy array"

FileSource = str | os.PathLike | bytes | BinaryIO
Limit = Callable[[str, bytes], "int | None"]  # from a pipe's name and first bytes: how many to read, None for all


class AudioError(AuricleError):
    """Audio that cannot be read, or that the model cannot take: which one, why, and the remedy."""


class LengthError(AudioError):
    """Audio that is longer than it may be."""


class AudioBytes:
    """A recording of `size` bytes with a name for messages; `read` gives fewer bytes only at the end.

    `cut`: more bytes follow in a pipe, which were not read since the limit had come.
    """

    def __init__(self, name: str, file: BinaryIO, size: int, cut: bool = False) -> None:
        self.name, self.size, self.cut = name, size, cut
        self._file = file

    @classmethod
    def of(cls, name: str, content: bytes, cut: bool = False) -> AudioBytes:
        """Bytes in memory."""
        return cls(name, io.BytesIO(content), len(content), cut)

    def __enter__(self) -> AudioBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, n_bytes: int) -> bytes:
        """Raises AudioError when the medium fails."""
        try:
            self._file.seek(start)
            return self._file.read(max(0, min(n_bytes, self.size - start)))
        except OSError as error:
            raise AudioError(f"{self.name}: cannot be read ({error.strerror}); check the medium") from error

    def starts(self, magic: bytes, at: int) -> bool:
        return self.read(at, len(magic)) == magic

    def find(self, magic: bytes, start: int, stop: int) -> int:
        """The first position of `magic` wholly within [start, stop), or -1."""
        for at in range(start, stop, _PIECE):
            piece = self.read(at, min(_PIECE + len(magic) - 1, stop - at))
            found = piece.find(magic)
            if found >= 0:
                return at + found
        return -1

    def is_blank(self, start: int, stop: int) -> bool:
        """Whether all of [start, stop) is zero."""
        return not any(self.read(at, min(_PIECE, stop - at)).strip(b"\0") for at in range(start, stop, _PIECE))


class SpanFile(io.RawIOBase):
    """`prefix` and then the bytes [start, stop) as a file, which is what a decoder reads.

    `claim`: bytes by which the file says it is longer than it is.
    """

    def __init__(self, data: AudioBytes, start: int, stop: int, prefix: bytes = b"", claim: int = 0) -> None:
        self._data, self._start, self._prefix = data, start, prefix
        self._size, self._claim, self._at = len(prefix) + stop - start, claim, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._at, self._size + self._claim)[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        n_left = min(len(buffer), max(0, self._size - self._at))
        piece = self._prefix[self._at : self._at + n_left]
        start = self._start + self._at + len(piece) - len(self._prefix)
        piece += self._data.read(start, n_left - len(piece))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def open_bytes(source: FileSource, limit: Limit) -> AudioBytes:
    """Opens a path, the bytes of a file, or a binary file object, which is read from where it stands.

    What is no regular file is read at once, as far as `limit` says. Raises AudioError for what is missing, unreadable,
    empty or no source of bytes.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = AudioBytes.of("audio bytes", bytes(source))
    elif isinstance(source, (str, os.PathLike)):
        data = _open_path(source, limit)
    elif isinstance(source, io.TextIOBase):
        raise AudioError("file object is open as text; open it in binary mode ('rb')")
    elif hasattr(source, "read"):
        name = getattr(source, "name", None)
        data = _read_stream(name if isinstance(name, str) and name.isprintable() else "file object", source, limit)
    else:
        raise AudioError(f"{type(source).__name__} is no audio; {_REFUSED}")
    if data.size == 0:
        raise AudioError(f"{data.name}: is empty (0 bytes); copy or record it again")
    return data


def _open_path(source: str | os.PathLike, limit: Limit) -> AudioBytes:
    text = os.fspath(source)
    if not text:
        raise AudioError("the name of the audio file is empty; name a file")
    path = Path(os.fsdecode(text))
    name = str(path) if str(path).isprintable() else repr(str(path))
    try:
        if path.is_dir():
            raise AudioError(f"{name}: is a directory; name an audio file")
        file = open(path, "rb")  # noqa: SIM115 (closed by AudioBytes)
    except FileNotFoundError as error:
        raise AudioError(f"{name}: no such file; check the path") from error
    except ValueError as error:  # a NUL
        raise AudioError(f"{name}: no such file; check the path") from error
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror}); check the path and its permissions") from error
    info = os.fstat(file.fileno())
    if stat.S_ISREG(info.st_mode):
        return AudioBytes(name, file, info.st_size)
    with file:
        return _read_stream(name, file, limit)


def _read_stream(name: str, file: BinaryIO, limit: Limit) -> AudioBytes:
    """Reads a stream, whose pieces may be short, to its end or its limit."""
    content = bytearray()
    _fill(name, file, content, _PIECE)
    most = limit(name, bytes(content)) if len(content) >= _PIECE else None
    cut = _fill(name, file, content, most)
    return AudioBytes.of(name, bytes(content), cut)


def _fill(name: str, file: BinaryIO, content: bytearray, most: int | None) -> bool:
    """Reads until there are `most` bytes; whether the stream may go on."""
    while most is None or len(content) < most:
        try:
            piece = file.read(_PIECE)
        except (OSError, ValueError, TypeError) as error:  # a fault of the medium; closed; not a file's `read`
            raise AudioError(f"{name}: cannot be read ({error}); open it again in binary mode ('rb')") from error
        if piece is None:
            raise AudioError(f"{name}: has nothing to read yet; open it in blocking mode")
        if not isinstance(piece, (bytes, bytearray, memoryview)):
            raise AudioError(f"{name} yields {type(piece).__name__}, not bytes; open it in binary mode ('rb')")
        if not piece:
            return False
        content += piece
    return True
