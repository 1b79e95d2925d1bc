"""`auricle verify`: whether a file is bit for bit what it was, and if not, which tensor is to blame."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import ModelFile
from .tables import show_progress


@app.command()
def verify(
    model: ModelFile,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Compare with these checksums.", show_default=False)
    ] = None,
    write_manifest: Annotated[
        Path | None, typer.Option("--write-manifest", help="Write the checksums to a file.", show_default=False)
    ] = None,
) -> None:
    """Print the SHA-256 of each tensor of a GGUF file, write them to a manifest, or compare them with one."""
    from ...convert import checksums

    expected = None if manifest is None else checksums.read_manifest(manifest)
    with show_progress({}) as progress:
        digests = checksums.hash_tensors(model, progress=progress)
    if expected is not None:
        wrong = checksums.compare_manifest(digests, expected)
        for name, what in wrong.items():
            print(f"{name}: {what}")
        if wrong:
            raise checksums.ChecksumError(f"{model}: {len(wrong)} of {len(expected)} checksums of {manifest} fail")
        print(f"{model}: all {len(expected)} checksums agree", file=sys.stderr)
    if write_manifest is not None:
        checksums.write_manifest(write_manifest, digests)
    elif expected is None:
        print(checksums.format_manifest(digests), end="")
