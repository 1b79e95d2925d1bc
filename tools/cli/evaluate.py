"""`auricle evaluate`: error rates of a model on conversations with known answers."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from .app import CUT_OFF, app, print_json
from .options import AnswerSettings, with_settings
from .tables import print_table

if TYPE_CHECKING:
    from ..evaluate.measures import Scores
    from ..evaluate.requests import Row
    from ..evaluate.text import Spelling


@app.command()
@with_settings(AnswerSettings)
def evaluate(
    data: Annotated[Path, typer.Argument(help="Conversations: JSON, one a line.", show_default=False)],
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first of them.", show_default=False)
    ] = None,
    keep_case: Annotated[bool, typer.Option("--keep-case", help="Upper and lower case differ.")] = False,
    keep_punctuation: Annotated[bool, typer.Option("--keep-punctuation", help="Punctuation counts.")] = False,
    *,
    settings: AnswerSettings,
) -> None:
    """Measure a model on conversations with known answers: word and character errors, and the times of words.

    DATA is in the official format: {"conversation": [{"role": "user", "message_type": "audio", "content": PATH}, …,
    {"role": "assistant", "message_type": "text", "content": ANSWER}]}. The first question of each is asked. Both texts
    are compared in lower case and without punctuation, unless said otherwise. Where answers have time stamps, the
    accumulated averaging shift (AAS) of the words that were heard right is measured in milliseconds.
    """
    from ..conversations import read_conversations
    from ..evaluate.measures import import_jiwer, score
    from ..evaluate.requests import first_requests, run_requests
    from ..evaluate.text import Spelling

    import_jiwer()
    spelling = Spelling(lower=not keep_case, punctuation=keep_punctuation)
    requests, n_more = first_requests(read_conversations(data, limit), data)
    console = Console(stderr=True)
    columns = ("asking …", MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with settings.open() as model, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(requests))
        for row in run_requests(model, requests, data, **settings.generation()):
            rows.append(row)
            bar.advance(task)
    scores = score([row.answer for row in rows], spelling)
    n_cut = sum(row.finish_reason == "length" for row in rows)
    _report(settings, data, spelling, scores, rows, n_more, n_cut)
    if n_cut:
        print(f"auricle: {n_cut} of {len(rows)} answers were cut off; see --max-new-tokens and --ctx", file=sys.stderr)
        raise typer.Exit(CUT_OFF)


def _report(
    settings: AnswerSettings, data: Path, spelling: Spelling, scores: Scores, rows: list[Row], n_more: int, n_cut: int
) -> None:
    if settings.as_json:
        facts = {"model": str(settings.model), "data": str(data), "spelling": asdict(spelling), "skipped": n_more}
        facts |= {"cut_off": n_cut, "scores": asdict(scores), "rows": [describe_row(row) for row in rows]}
        print_json(facts)
        return
    print_table(("measure", "value"), table_rows(scores), n_right=1)
    print(f"compared: {spelling.describe()}")
    if n_more:
        print(f"{n_more} later exchanges were not asked")


def table_rows(scores: Scores) -> list[tuple[str, str]]:
    """Measures for people; those of times only where there are any."""
    rows = [
        ("answers", f"{scores.n_answers:,}"),
        ("words", f"{scores.n_words:,}"),
        ("word error rate", percent(scores.wer)),
        ("substituted, left out, added", f"{scores.substitutions}, {scores.deletions}, {scores.insertions}"),
        ("character error rate", percent(scores.cer)),
        ("answers without an error", percent(scores.exact)),
    ]
    if not scores.n_boundaries:
        return rows
    return [
        *rows,
        ("boundaries of words", f"{scores.n_boundaries:,}"),
        ("  matched", percent(scores.matched)),
        ("  mean shift (AAS)", milliseconds(scores.aas_ms)),
        ("  95 % are within", milliseconds(scores.p95_ms)),
        ("  within 150 ms", percent(scores.near)),
    ]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def describe_row(row: Row) -> dict[str, Any]:
    """One answer, for JSON."""
    return {
        "line": row.request.line,
        "audio": list(row.request.clips),
        "prompt": row.request.prompt,
        "reference": row.answer.reference,
        "hypothesis": row.answer.hypothesis,
        "finish_reason": row.finish_reason,
        "audio_seconds": row.audio_seconds,
    }
