"""Files that a diff writes: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ...engine.sampling import OptionError


def check_target(path: Path, inputs: Iterable[Path | None]) -> None:
    """What would be noticed only after the work, or not at all. Raises OptionError."""
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent} is not a folder: make it first, or write elsewhere")
    if path.exists() and not path.is_file():
        raise OptionError(f"{path} is not a file: write to another path")
    for other in inputs:
        if other is not None and path.exists() and other.exists() and path.samefile(other):
            raise OptionError(f"{path} is an input itself; write to another path")


def write_text(path: Path, text: str) -> None:
    """Writes to `path + ".part"`, and renames that when all is there. Raises OptionError."""
    part = Path(f"{path}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}; make room or write elsewhere") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
