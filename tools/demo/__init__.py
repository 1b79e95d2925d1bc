"""The model in the box: a tiny MOSS-Audio that knows spoken English digits; see README.md beside it.

It shows what the engine does, and lets tests measure words instead of cosines. Knows where its files are.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "digits.gguf"
NAME = "demo"  # what stands for it on the command line


def find_model(path: Path | None) -> Path | None:
    """The path of a model that a user names: `demo` stands for the one in the box, unless there is a file of that
    name."""
    return MODEL if path == Path(NAME) and not path.is_file() else path
