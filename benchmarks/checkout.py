"""Makes `auricle` importable from the checkout where it is not installed, in this process and in those it starts.

The package is a namespace of four folders, so a link with its name to the checkout is all that it takes. Needs the
standard library only, and must be imported before anything of the project.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = (ROOT / "benchmarks", ROOT / "tests")


def link_auricle(folder: Path) -> None:
    """Puts a link `auricle` to the checkout into `folder`, and that folder first on the path of Python, here and in
    processes that inherit the environment; scripts of benchmarks and tests are found there, too."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "auricle"
    if not link.is_symlink():
        link.symlink_to(ROOT, target_is_directory=True)
    added = [str(path) for path in (folder.absolute(), *PATHS)]
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*added, given] if given else added)
    sys.path[:0] = [path for path in added if path not in sys.path]
