"""The model in the box as a checkpoint folder, to be fine-tuned: `python -m auricle.tools.demo.checkpoint OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...kernels.errors import AuricleError
from ..finetune.folder import read_gguf_weights, write_weights
from ..finetune.shape import demo_config, demo_merges, write_demo_files
from ..oracle.model import MossAudio
from ..process import standard_streams
from . import MODEL


def write_checkpoint(folder: Path, path: Path = MODEL) -> Path:
    """The Hugging Face files and float32 weights of a GGUF file of the demo model; returns `folder`.

    Raises FolderError or GGUFError for a file of another model.
    """
    model = MossAudio(demo_config(len(demo_merges())))
    read_gguf_weights(model, path)
    write_demo_files(folder)
    write_weights(folder, model)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="auricle.tools.demo.checkpoint", description=__doc__.partition(":")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="a file of the same shape, by default the shipped one"
    )
    a = parser.parse_args(arguments)
    try:
        write_checkpoint(a.out, a.model)
    except AuricleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
