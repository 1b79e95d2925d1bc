"""`auricle bench`: what a model file does on this machine, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, print_json, say
from .options import OpenSettings, format_bytes, with_settings
from .tables import print_table


@app.command()
@with_settings(OpenSettings)
def bench(
    audio: Annotated[
        Path | None, typer.Option("--audio", help="The clip.  [default: 11 s of made sound]", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Measure for about this long.")] = 60.0,
    *,
    settings: OpenSettings,
) -> None:
    """Measure how fast a model runs here.

    The clip is heard and 32 tokens are written, again and again; figures are medians, those of the first run apart.
    """
    from ..bench import run_bench

    facts = run_bench(settings.open, settings.backend, audio, seconds, say, settings.precision)
    if settings.as_json:
        print_json(facts)
        return
    print_table(*figure_table(facts), n_right=2)
    print_table(("machine", ""), machine_rows(facts))


def figure_table(facts: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what, in the first run, in the others."""

    def pair(what: str, name: str, form: str) -> tuple[str, str, str]:
        return what, form.format(facts["first_run"][name]), form.format(facts[name])

    clip = f"{facts['clip_s']:.1f} s of sound"
    rows = [
        ("import the libraries", f"{facts['imports_s']:.2f} s", ""),
        ("open the file", f"{facts['load_s']:.2f} s", ""),
        ("open to first op", f"{facts['first_op_s']:.2f} s", ""),
        pair(f"mel of {clip}", "mel_s", "{:.3f} s"),
        pair(f"encoder on {clip}", "encoder_s", "{:.2f} s"),
        pair(f"prefill of {facts['prompt_tokens']} tokens", "prefill_tokens_per_s", "{:.1f} tokens/s"),
        pair("time to first token", "first_token_s", "{:.2f} s"),
        pair(f"decode after {facts['prompt_tokens']} tokens", "decode_tokens_per_s", "{:.1f} tokens/s"),
        pair(f"real-time factor with {facts['new_tokens']} tokens", "real_time_factor", "{:.2f}"),
        ("peak memory", "", format_bytes(facts["peak_rss_bytes"])),
        ("model file", "", format_bytes(facts["file_bytes"])),
    ]
    return ("", "first run", f"median of {facts['rounds']}"), rows


def machine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    machine = facts["machine"]
    share = facts["decode_bytes_per_token"] * facts["decode_tokens_per_s"] / machine["read_bytes_per_s"]
    versions = (f"{name} {number or 'missing'}" for name, number in machine["versions"].items())
    memory = "unknown" if machine["memory_bytes"] is None else format_bytes(machine["memory_bytes"])
    return [
        ("processor", machine["cpu"]),
        ("instructions", " ".join(machine["instructions"] or ()) or "unknown"),
        ("cores", f"{machine['threads']} used of {machine['cores']}"),
        ("memory", memory),
        ("reading it", f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s, of which decoding takes {share:.0%}"),
        ("software", ", ".join(versions)),
        ("backend", f"{facts['backend']}, precision {facts['precision'] or 'auto'}, KV cache {facts['kv_type']}"),
    ]
