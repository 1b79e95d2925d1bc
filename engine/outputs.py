"""Files that are written: never over what is being read, and whole or not at all.

`check_outputs` is asked before the work, with all that the work reads. Whatever is written goes through `replacing`:
into a new file in the same folder, which takes the place of the old one when all its bytes are on the disk. Does not
know what is in a file.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..kernels.errors import AuricleError

PathLike = str | os.PathLike[str]
STREAMS = {1: "stdout", 2: "stderr"}


class OutputError(AuricleError):
    """What cannot be written, or must not be."""


@dataclass(frozen=True)
class Part:
    """A file that is being written."""

    path: Path
    fd: int


def check_outputs(outputs: Iterable[PathLike | None], inputs: Iterable[PathLike | None] = ()) -> None:
    """What would be noticed only after the work, or not at all. Raises OutputError unless each output is a file that
    can be made or replaced and that is no input, nothing in a folder that is an input, no other output, and not where
    stdout or stderr go; whatever its name. None stands for what is not asked for.
    """
    named = [Path(path) for path in outputs if path is not None]
    for path in named:
        _check_place(path)
    existing = [path for path in named if os.path.exists(path)]
    read = {identity: name for name, identity in _walk(inputs)} if existing else {}
    for path in existing:
        found = read.get(_identify(path))
        if found is not None:
            same = "an input itself" if os.path.abspath(found) == os.path.abspath(path) else f"the input {found}"
            raise OutputError(f"{path} is {same}; write to another path")
        for fd, stream in STREAMS.items():
            if _identify(fd) == _identify(path):
                raise OutputError(f"{path} is where {stream} goes; write to another path")
    places: dict[object, Path] = {}
    for path in named:
        place = _identify(path) or os.path.realpath(path)
        if place in places:
            raise OutputError(f"{places[place]} and {path} are one file; give each output its own")
        places[place] = path


def _check_place(path: Path) -> None:
    if str(path) == "-":
        raise OutputError("- is stdout, which this cannot be written to; name a file (./- for one of that name)")
    folder = Path(os.path.realpath(path)).parent
    if not os.path.isdir(folder):
        raise OutputError(f"{path.parent} is not a folder: make it first, or write elsewhere")
    with disk_errors(path), suppress(FileNotFoundError):
        os.stat(path)  # a name may be too long
    if os.path.exists(path) and not os.path.isfile(path):  # a rename would replace a device, too
        raise OutputError(f"{path} is not a file: write to another path")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: nothing can be made in {folder}; write elsewhere")


def _walk(paths: Iterable[PathLike | None]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, identity) of the files among `paths` and of those in their folders."""
    for path in paths:
        names = [os.fspath(path)] if path is not None else []
        if names and os.path.isdir(names[0]):
            names = [os.path.join(folder, file) for folder, _, files in os.walk(names[0]) for file in files]
        for name in names:
            identity = _identify(name)
            if identity is not None:
                yield name, identity


def _identify(path: PathLike | int) -> tuple[int, int] | None:
    """Device and inode: the same for all names of a file. None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


@contextmanager
def replacing(path: PathLike, *, part: Path | None = None, keep: bool = False, resume: bool = False) -> Iterator[Part]:
    """A new file that takes the place of `path` when the body is done, and is removed when it raises.

    `path` may be a link: what it points to is replaced. With `part` the new file has that name; with `keep` it then
    stays when the body raises, and with `resume` what it holds is continued. Raises OutputError where the system
    refuses; the body's own errors pass.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    new = os.O_CREAT | (os.O_EXCL if part is None else 0 if resume else os.O_TRUNC)
    part = part or target.with_name(f".{secrets.token_hex(4)}.part")  # not longer than a name may be
    with disk_errors(path):
        _check_kind(target)
        fd = os.open(part, os.O_RDWR | new, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        yield Part(part, fd)
        with disk_errors(path):
            _settle(part, fd, mode)
            os.replace(part, target)
    except BaseException:
        if not keep:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _check_kind(target: Path) -> None:
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(f"cannot write {target}: it is not a regular file; choose another name")


def _settle(part: Path, fd: int, mode: int) -> None:
    """All bytes to the disk. Some libraries put a file of their own in the place of the one they are told to write."""
    if _identify(part) == _identify(fd):
        os.fsync(fd)
        return
    other = os.open(part, os.O_RDONLY)
    try:
        os.fchmod(other, mode)
        os.fsync(other)
    finally:
        os.close(other)


def write_bytes(path: PathLike, data: bytes | memoryview) -> None:
    """The whole file, or what was there before. Raises OutputError."""
    with replacing(path) as part, disk_errors(path):
        view = memoryview(data)
        while view:
            view = view[os.write(part.fd, view) :]


def write_text(path: PathLike, text: str) -> None:
    """In UTF-8. The whole file, or what was there before. Raises OutputError."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def copy_file(source: PathLike, path: PathLike) -> None:
    """A file's bytes to `path`: the whole file, or what was there before. Raises OutputError; OSError where `source`
    cannot be read."""
    write_bytes(path, Path(source).read_bytes())


@contextmanager
def disk_errors(path: PathLike) -> Iterator[None]:
    """The system's refusals as OutputError."""
    try:
        yield
    except OSError as error:
        remedy = "make room or write elsewhere" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "write elsewhere"
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
