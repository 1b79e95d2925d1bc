"""What several test files need: where shared material lies, how to skip without it, and the program in this process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared reference material beside the checkout")


def auricle(*arguments: object) -> tuple[int, str, str]:
    """The program, in this process: its status, and what it writes to stdout and stderr."""
    from auricle.tools.cli.main import run

    out, errors, status = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["auricle", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(errors):
        try:
            run()
        except SystemExit as end:
            status = end.code or 0
    return status, out.getvalue(), errors.getvalue()


def diff_command(*arguments: object) -> tuple[int, str]:
    """Status of `auricle diff`, and what it finds, or else why it ended."""
    status, out, errors = auricle("diff", *arguments)
    return status, out or errors
