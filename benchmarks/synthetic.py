"""Model files of published shapes for the benchmarks, kept in a folder from one run to the next."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from auricle.engine.outputs import write_text
from auricle.tools.synth import plan_synth, write_synth

RESULTS = Path(__file__).parent / "results"
SHAPES = {"4b": "moss-audio-4b", "8b": "moss-audio-8b", "tiny": "tiny"}


def make_model(folder: Path, shape: str, recipe: str) -> Path:
    """The file of a shape (a key of SHAPES) in a recipe; made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{SHAPES[shape]}.{recipe}.gguf"
    plan = plan_synth(SHAPES[shape], recipe)
    if not path.exists() or path.stat().st_size != plan.layout.total_bytes:
        print(f"making {path}, {plan.layout.total_bytes:,} bytes", file=sys.stderr)
        write_synth(plan, path)
    return path


def save_result(name: str, document: dict[str, Any]) -> None:
    """Keeps a document beside those of the other benchmarks, in lines that a diff can show."""
    write_text(RESULTS / name, json.dumps(document, indent=1) + "\n")
