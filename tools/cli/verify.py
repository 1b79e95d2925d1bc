"""`auricle verify`: whether a file is bit for bit what it was, and if not, which tensor is to blame."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...engine.outputs import check_outputs
from ...kernels.display import show
from .app import app, say
from .options import ModelFile
from .tables import show_progress


@app.command()
def verify(
    model: ModelFile,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Compare with these checksums.", show_default=False)
    ] = None,
    write_manifest: Annotated[
        Path | None,
        typer.Option("--write-manifest", help="Write the checksums to a file; - is stdout.", show_default=False),
    ] = None,
) -> None:
    """Print the SHA-256 of each tensor of a GGUF file, write them to a manifest, or compare them with one."""
    from ...convert import checksums

    printed = str(write_manifest) == "-" or (write_manifest is None and manifest is None)
    write_manifest = None if printed else write_manifest
    check_outputs([write_manifest], [model, manifest])
    expected = None if manifest is None else checksums.read_manifest(manifest)
    with show_progress({}) as progress:
        digests = checksums.hash_tensors(model, progress=progress)
    if expected is not None:
        wrong = checksums.compare_manifest(digests, expected)
        for name, what in wrong.items():
            print(show(f"{name}: {what}"))
        if wrong:
            raise checksums.ChecksumError(f"{model}: {len(wrong)} of {len(expected)} checksums of {manifest} fail")
        say(f"{model}: all {len(expected)} checksums agree")
    if write_manifest is not None:
        checksums.write_manifest(write_manifest, digests)
    if printed:
        print(checksums.format_manifest(digests), end="")
