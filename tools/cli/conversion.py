"""`auricle convert` and `auricle quantize`: GGUF files from checkpoints and from other GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...convert.recipes import DEFAULT, ENCODER_FLOOR, RECIPES
from ...engine.sampling import OptionError
from .app import app, say
from .options import ModelFile, format_bytes, parse_size, with_settings
from .tables import format_shape, print_sizes, print_table, show_progress

if TYPE_CHECKING:
    from ...convert.budget import Budget
    from ...convert.plan import ConversionPlan


@dataclass(frozen=True)
class ConversionSettings:
    """Which types, how, and whether at all."""

    type_name: Annotated[
        str | None,
        typer.Option(
            "--type", help=f"Recipe of types: {', '.join(RECIPES)}.  [default: {DEFAULT}]", show_default=False
        ),
    ] = None
    tensor_types: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            help="Type of the tensors whose names match a shell pattern, as in 'llm.blk.*.attn.v.*=q6_k'; may be "
            "repeated, the first match wins. Vectors stay F32.",
            show_default=False,
        ),
    ] = None
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="Importance of columns, a file of `auricle imatrix`.")
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="FILE[:SCALE]",
            help="Merge an adapter into the weights, a file of `auricle convert --lora DIR`; may be repeated.",
            show_default=False,
        ),
    ] = None
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Threads.  [default: all cores]", show_default=False)
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted conversion ended.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False

    def choices(self) -> dict[str, Any]:
        """The keyword arguments of both planners."""
        from ...convert.recipes import parse_override

        importance = None
        if self.imatrix is not None:
            from ...convert.importance import read_importance

            importance = read_importance(self.imatrix)
        overrides = [parse_override(text) for text in self.tensor_types or ()]
        chosen = {"overrides": overrides, "importance": importance, "lora": self.lora or ()}
        return {"type_name": self.type_name or DEFAULT, **chosen}


@app.command()
@with_settings(ConversionSettings)
def convert(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of a Hugging Face checkpoint.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The GGUF file to write.", show_default=False)] = ...,
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="With --lora DIR: the GGUF model it is for, to check.", show_default=False),
    ] = None,
    *,
    settings: ConversionSettings,
) -> None:
    """Make a GGUF file from a Hugging Face checkpoint, or with --lora DIR alone from an adapter that peft saved.

    The file appears when it is complete, or not at all; until then the work is in OUT.part.
    """
    _carry_out(plan_convert(checkpoint, model, settings), out, settings)


def plan_convert(checkpoint: Path | None, model: Path | None, settings: ConversionSettings) -> ConversionPlan:
    """The plan of `auricle convert`. Raises OptionError for options that do not go together."""
    if checkpoint is not None:
        if model is not None:
            raise OptionError("-m is for --lora DIR alone; a checkpoint brings its own names and shapes")
        from ...convert.hf import plan_conversion

        return plan_conversion(checkpoint, **settings.choices())
    if len(settings.lora or ()) != 1:
        raise OptionError("give the folder of a checkpoint, or --lora DIR with that of an adapter")
    if settings.tensor_types or settings.imatrix:
        raise OptionError("--tensor-type and --imatrix are for models; an adapter is stored whole, see --type")
    from ...convert.lora import plan_lora

    return plan_lora(settings.lora[0], settings.type_name, model)


@app.command()
@with_settings(ConversionSettings)
def quantize(
    model: ModelFile,
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.", show_default=False)],
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantise weights again that have been already: they lose twice.")
    ] = False,
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size",
            help="The most the file may take, as in 2.6GiB or 800MB; types are chosen by --sensitivity.",
            show_default=False,
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option("--sensitivity", help="A report of `auricle diff --sensitivity`.", show_default=False),
    ] = None,
    encoder_floor: Annotated[
        str | None,
        typer.Option(
            "--encoder-floor",
            help=f"Least type of encoder and adapters with --target-size.  [default: {ENCODER_FLOOR.name.lower()}]",
            show_default=False,
        ),
    ] = None,
    *,
    settings: ConversionSettings,
) -> None:
    """Make a GGUF file of other types from a GGUF file.

    The types are those of a recipe (--type), or with --target-size and --sensitivity made to measure: as many bits for
    each tensor as it is worth in a file of that size. The file appears when it is complete, or not at all; until then
    the work is in OUT.part.
    """
    from ...convert.requantize import plan_requantization

    budget = _find_budget(target_size, sensitivity, encoder_floor, settings)
    options = settings.choices() | {"allow_requantize": allow_requantize, "budget": budget}
    _carry_out(plan_requantization(model, **options), out, settings, sensitivity)


def _find_budget(
    target_size: str | None, sensitivity: Path | None, floor: str | None, settings: ConversionSettings
) -> Budget | None:
    """Raises OptionError for options that do not go together, ConversionError for a report that is none."""
    if target_size is None and sensitivity is None and floor is None:
        return None
    if target_size is None or sensitivity is None:
        raise OptionError("--target-size and --sensitivity go together; auricle diff --sensitivity makes a report")
    if settings.type_name is not None:
        raise OptionError(f"--type {settings.type_name} and --target-size both choose the types; give one of them")
    from ...convert.budget import Budget, read_report
    from ...convert.recipes import find_type

    return Budget(parse_size(target_size), read_report(sensitivity), find_type(floor) if floor else ENCODER_FLOOR)


def _carry_out(plan: ConversionPlan, out: Path, settings: ConversionSettings, sensitivity: Path | None = None) -> None:
    from ...convert.stream import VERIFYING, WRITING
    from ...convert.stream import convert as write_file

    for note in plan.notes:
        say(note)
    if settings.dry_run:
        _print_plan(plan)
        return
    inputs = (settings.imatrix, sensitivity)
    try:
        with show_progress({WRITING: " weights", VERIFYING: " weights"}) as progress:
            write_file(plan, out, progress, inputs=inputs, jobs=settings.jobs, resume=settings.resume)
    except KeyboardInterrupt:
        if Path(f"{out}.part").exists():
            say(f"interrupted; --resume goes on from {out}.part")
        raise
    say(f"{out}: {len(plan)} tensors, {plan.total_bytes:,} bytes")


def _print_plan(plan: ConversionPlan) -> None:
    rows = [(r.target, format_shape(r.shape), r.source_dtype, r.format.name, f"{r.nbytes:,}") for r in plan]
    print_table(("tensor", "shape", "from", "type", "bytes"), rows, n_right=1)
    print_sizes("part", plan.bytes_by_part())
    print_sizes("type", plan.bytes_by_type())
    print(f"metadata and alignment: {plan.total_bytes - sum(r.nbytes for r in plan):,} bytes")
    print(f"file: {plan.total_bytes:,} bytes ({format_bytes(plan.total_bytes)})")
