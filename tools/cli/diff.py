"""`auricle diff`: does a model file compute what something else computes, and if not, where does it begin to differ."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ...engine.lora import parse_lora
from ...engine.prompts import TASKS
from ...engine.sampling import OptionError
from ...kernels.display import show
from ..demo import find_model
from .app import app, print_json
from .options import AsJSON, KVType, Loras, ModelFile, Precision, Threads, TimeMarkers, with_settings

if TYPE_CHECKING:
    from ...engine import Model
    from ..diff.audit import ReadRows
    from ..diff.locate import Outcome
    from ..diff.request import Request
    from ..diff.sources import Source

DIFFERS = 7

Folder = Annotated[Path | None, typer.Option(show_default=False)]


@dataclass(frozen=True)
class DiffSettings:
    """With what to compare, how, and what to show."""

    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask.  [default: to transcribe]")] = None
    reference: Annotated[
        Path | None, typer.Option("--reference", help="A file of stages: safetensors or GGUF.", show_default=False)
    ] = None
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Another model file, or the same one.", callback=find_model, show_default=False),
    ] = None
    official: Annotated[
        Path | None, typer.Option("--official", help="A checkout of the official code.", show_default=False)
    ] = None
    official_python: Annotated[
        Path | None,
        typer.Option("--official-python", help="The Python to run it with.  [default: its .venv]", show_default=False),
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="A Hugging Face folder, run in PyTorch.", show_default=False),
    ] = None
    backend: Annotated[str, typer.Option("--backend", help="Where this side computes.")] = "cpu"
    precision: Precision = None
    against_backend: Annotated[str, typer.Option("--against-backend", help="Where --against does.")] = "reference"
    kv_type: KVType = "f32"
    lora: Loras = None
    isolate: Annotated[bool, typer.Option("--isolate", help="Give each stage the reference's input.")] = False
    bisect: Annotated[bool, typer.Option("--bisect", help="Find the first wrong stage, op and tensor.")] = False
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            help="With --against: write what quantising each tensor costs, for quantize --target-size.",
            show_default=False,
        ),
    ] = None
    probe: Annotated[
        str, typer.Option("--probe", help="Measure that for each tensor, or by layer: a quarter of the runs.")
    ] = "tensor"
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of the answer to compare.")] = 16
    threshold: Annotated[
        list[str] | None,
        typer.Option("--threshold", help="STAGE=COSINE or STAGE:METRIC=VALUE; * matches.", show_default=False),
    ] = None
    time_markers: TimeMarkers = None
    threads: Threads = None
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with charts of all results, too.", show_default=False)
    ] = None
    as_json: AsJSON = False

    def inputs(self) -> list[Path | None]:
        """What is read besides the model and the audio."""
        adapters = [parse_lora(spec)[0] for spec in self.lora or ()]
        return [self.reference, self.against, self.checkpoint, self.official, *adapters]

    @property
    def mode(self) -> str:
        return "bisect" if self.bisect else "isolate" if self.isolate else "chain"


@app.command()
@with_settings(DiffSettings)
def diff(
    model: ModelFile,
    audio: Annotated[list[str], typer.Argument(help="Audio files of one question.", show_default=False)],
    *,
    settings: DiffSettings,
) -> None:
    """Compare every stage of a model file with a reference, and say where it begins to differ.

    The reference is one of --reference, --against, --official with --checkpoint, or --checkpoint. The status is 0
    when all limits hold and 7 when not.
    """
    from ...engine.outputs import check_outputs, write_text
    from ...engine.session import set_threads
    from ..diff.locate import run_diff
    from ..diff.page import render
    from ..diff.report import document
    from ..diff.request import make_request, open_model
    from ..diff.thresholds import parse_overrides

    check_settings(settings)
    check_outputs([settings.html, settings.sensitivity], [model, *audio, *settings.inputs()])
    overrides = parse_overrides(settings.threshold or ())
    if settings.threads is not None:
        set_threads(settings.threads)
    with ExitStack() as stack:
        prompt = settings.prompt if settings.prompt is not None else find_prompt(settings)
        request = make_request(audio, prompt, settings.tokens, settings.time_markers)
        opened = stack.enter_context(
            open_model(
                model,
                request,
                backend=settings.backend,
                kv_type=settings.kv_type or "f32",
                precision=settings.precision,
                lora=settings.lora or (),
            )
        )
        source, read = open_source(settings, opened, request, stack)
        outcome = run_diff(opened, request, source, mode=settings.mode, overrides=overrides, read=read)
        facts = document(outcome, opened, request, source)
        if settings.html is not None:
            write_text(settings.html, render(facts))
        if settings.sensitivity:
            facts["sensitivity"] = write_sensitivity(settings, opened, request)
        if settings.as_json:
            print_json(facts)
        else:
            print_outcome(outcome, opened)
            if settings.sensitivity:
                print_sensitivity(facts["sensitivity"])
    raise typer.Exit(0 if outcome.verdict.passed else DIFFERS)


def check_settings(settings: DiffSettings) -> None:
    """Raises OptionError unless there is one reference."""
    given = [settings.reference, settings.against, settings.official or settings.checkpoint]
    if sum(x is not None for x in given) != 1:
        raise OptionError("give one of --reference, --against, --checkpoint, or --official with --checkpoint")
    if settings.sensitivity and not settings.against:
        raise OptionError("--sensitivity needs the exact file to compare with: --against F16.gguf")
    if settings.sensitivity and settings.lora:
        raise OptionError("--sensitivity measures models without adapters; merge them first: auricle quantize --lora")
    if settings.probe not in ("tensor", "layer"):
        raise OptionError(f"--probe is {settings.probe!r}; it is tensor or layer")
    if settings.official and not settings.checkpoint:
        raise OptionError("--official needs the folder of the weights, too: --checkpoint DIR")


def find_prompt(settings: DiffSettings) -> str:
    """The prompt that a file of stages was made with, where it says so; else the usual one."""
    from ..diff.sources import open_stages

    known = open_stages(settings.reference).prompt if settings.reference else None
    return known or TASKS["transcribe"]


def open_source(
    settings: DiffSettings, model: Model, request: Request, stack: ExitStack
) -> tuple[Source, ReadRows | None]:
    """The other side, and how to read its weights, if it has any."""
    from ...engine.gguf import open_gguf
    from ..diff.audit import read_checkpoint, read_gguf
    from ..diff.sources import ModelFile, open_stages
    from ..diff.walk import Walk

    if settings.reference:
        return open_stages(settings.reference), None
    if settings.against:
        other = ModelFile(settings.against, request, settings.against_backend, settings.kv_type or "f32")
        stack.callback(other.close)
        return other, read_gguf(stack.enter_context(open_gguf(settings.against)))
    walk, read = Walk(model, request), read_checkpoint(settings.checkpoint)
    if settings.official:
        from ..diff.official import Official

        paths = settings.official, settings.checkpoint
        return Official(*paths, walk.outline.stages, model.time_markers, settings.official_python), read
    from ..diff.checkpoint import Checkpoint

    return Checkpoint(settings.checkpoint, walk), read


def write_sensitivity(settings: DiffSettings, model: Model, request: Request) -> dict[str, Any]:
    """What each tensor of `model` costs beside those of --against; also in a file of its own."""
    from ..diff.request import open_model
    from ..diff.sensitivity import measure, write_report

    console, tasks = Console(stderr=True), {}
    columns = (TextColumn("{task.description}", markup=False), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        open_model(settings.against, request, backend=settings.against_backend, precision="exact") as reference,
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar,
    ):

        def report_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        report = measure(model, reference, request, probe=settings.probe, progress=report_progress)
    write_report(settings.sensitivity, report)
    return report


def print_sensitivity(report: dict[str, Any]) -> None:
    """The tensors that cost most."""
    from ..diff.sensitivity import sensitivity_table

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=250)
    console.print("\nwhat each tensor costs the logits, alone (nats):")
    console.print(sensitivity_table(report))


def print_outcome(outcome: Outcome, model: Model) -> None:
    """Tables and the verdict on stdout; never cut, however narrow the terminal."""
    from ..diff.report import stage_table, tensor_table, token_lines

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=250)
    console.print(stage_table(outcome.stages))
    failed = [r for r in outcome.ops if not r.passed]
    if failed:
        console.print(f"\n{len(failed)} of {len(outcome.ops)} values inside stages fail:")
        console.print(stage_table(failed))
    if outcome.tensors:
        console.print()
        console.print(tensor_table(outcome.tensors))
    if outcome.tokens:
        console.print()
        for line in token_lines(outcome.tokens, model.tokenizer):
            console.print(_line(line), soft_wrap=True)
    if outcome.missing:
        console.print("\n", _line(f"not in the reference: {', '.join(outcome.missing)}"), sep="", soft_wrap=True)
    verdict = outcome.verdict
    style = "green" if verdict.passed else "bold red"
    console.print("\n", _line(verdict.summary), sep="", style=style, soft_wrap=True)
    for evidence in verdict.evidence[1:]:
        console.print("  ", _line(evidence), sep="", soft_wrap=True)


def _line(text: str) -> Text:
    return Text(show(text))
