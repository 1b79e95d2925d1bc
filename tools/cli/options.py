"""Options that several commands share, and what their text means."""

from __future__ import annotations

import dataclasses
import functools
import inspect as introspect
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engine import Model, load
from ...engine.answer import FEWEST_NEW_TOKENS, NEW_TOKENS_PER_SECOND
from ...engine.lora import parse_lora
from ...engine.sampling import OptionError
from ..demo import MODEL, find_model
from .cut import say_when_cut

ModelFile = Annotated[Path, typer.Argument(help="A GGUF file, or demo.", callback=find_model, show_default=False)]
ModelPath = Annotated[
    Path,
    typer.Option(
        "-m",
        "--model",
        help="The model, a GGUF file; demo is the one in the box.",
        callback=find_model,
        show_default=False,
    ),
]
OptionalModelPath = Annotated[
    Path | None,
    typer.Option(
        "-m",
        "--model",
        help="The model, a GGUF file; demo is the one in the box, and the default on a terminal.",
        callback=find_model,
        show_default=False,
    ),
]
BackendName = Annotated[
    str, typer.Option("--backend", help="Where to compute: auto (the GPU if there is one), cuda, cpu, reference.")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="auto, exact; on the cpu also bf16.  [default: auto]", show_default=False),
]
Threads = Annotated[int | None, typer.Option("--threads", help="Cores to use.  [default: all]", show_default=False)]
Context = Annotated[
    int | None, typer.Option("--ctx", help="Context in tokens.  [default: the model's maximum]", show_default=False)
]
KVType = Annotated[
    str | None,
    typer.Option(
        "--kv-type", help="Type of the KV cache: f32, f16, q8_0.  [default: the backend's]", show_default=False
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="Add an adapter, a file of `auricle convert --lora`; may be repeated.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="Do with so much memory: 4GiB, 900MiB.  [default: no limit]", show_default=False),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")]
MinP = Annotated[float, typer.Option("--min-p", help="Keep tokens at least this likely relative to the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 makes repeated tokens less likely.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.", show_default=False)]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text; may be repeated.", show_default=False),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        help=f"Tokens to generate at most.  [default: {FEWEST_NEW_TOKENS}, and {NEW_TOKENS_PER_SECOND} for each second "
        "of audio]",
        show_default=False,
    ),
]
TimeMarkers = Annotated[
    bool | None,
    typer.Option(
        "--time-markers/--no-time-markers",
        help="Tell the model the elapsed seconds inside the audio.  [default: as the model file says]",
        show_default=False,
    ),
]


ParseSpecial = Annotated[
    bool,
    typer.Option("--parse-special", help="Obey control tokens (<|im_end|>) and audio spans written in the question."),
]


@dataclass(frozen=True)
class OpenSettings:
    """Which model to open, and how."""

    model: ModelPath
    backend: BackendName = "auto"
    precision: Precision = None
    threads: Threads = None
    ctx: Context = None
    kv_type: KVType = None
    lora: Loras = None
    memory: Memory = None
    as_json: AsJSON = False

    def lora_files(self) -> list[Path]:
        """The adapters' files. Raises OptionError."""
        return [parse_lora(spec)[0] for spec in self.lora or ()]

    def open(self) -> Model:
        model = load(
            self.model,
            backend=self.backend,
            precision=self.precision,
            threads=self.threads,
            n_ctx=self.ctx,
            kv_type=self.kv_type,
            memory=None if self.memory is None else parse_size(self.memory),
            lora=self.lora or (),
        )
        say_when_cut(self.model)
        return model


@dataclass(frozen=True)
class AnswerSettings(OpenSettings):
    """How to make an answer, besides."""

    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: Penalty = 1.0
    seed: Seed = None
    stop: Stop = None
    max_new_tokens: MaxNewTokens = None
    time_markers: TimeMarkers = None
    parse_special: ParseSpecial = False

    def generation(self) -> dict[str, Any]:
        """The keyword arguments of `Model.stream`."""
        own = {f.name for f in dataclasses.fields(self)} - {f.name for f in dataclasses.fields(OpenSettings)}
        return {name: getattr(self, name) for name in own} | {"stop": tuple(self.stop or ())}


@dataclass(frozen=True)
class TranscribeSettings(AnswerSettings):
    """As `AnswerSettings`; a person at a terminal need not name a model."""

    model: OptionalModelPath = None


def model_in_the_box() -> Path:
    """The demonstration model, for a person who sees what it is: no pipeline gets confident digits by accident.
    Raises OptionError where stdout is no terminal."""
    if not sys.stdout.isatty():
        raise OptionError("no model is named; add -m MODEL.gguf (-m demo is a demonstration that knows digits only)")
    print("auricle: no -m: using the demonstration model, which knows spoken English digits only", file=sys.stderr)
    return MODEL


def with_settings(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each field of the dataclass `settings`; the command's last parameter, of that
    name, takes them all."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        *own, _ = introspect.signature(command).parameters.values()
        shared = typing.get_type_hints(settings, include_extras=True)
        required = dataclasses.MISSING
        options = [
            introspect.Parameter(
                f.name,
                introspect.Parameter.KEYWORD_ONLY,
                annotation=shared[f.name],
                default=introspect.Parameter.empty if f.default is required else f.default,
            )
            for f in dataclasses.fields(settings)
        ]
        own = [p.replace(annotation=hints[p.name], kind=introspect.Parameter.KEYWORD_ONLY) for p in own]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            chosen = settings(**{p.name: values.pop(p.name) for p in options})
            command(**values, settings=chosen)

        wrapper.__signature__ = introspect.Signature([*own, *options])
        wrapper.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        del wrapper.__wrapped__
        return wrapper

    return decorate


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "10m", "1h" or "1:30". Raises OptionError."""
    clock = re.fullmatch(r"(\d+):(\d{1,2}(?:\.\d+)?)", text.strip())
    if clock and float(clock[2]) < 60:
        return 60 * int(clock[1]) + float(clock[2])
    plain = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text.strip())
    if not plain or float(plain[1]) <= 0:
        raise OptionError(f"{text!r} is no duration; write 90s, 10m, 1h or 1:30")
    return float(plain[1]) * _UNITS[plain[2]]


_SIZES = {"": 1, "b": 1, "bytes": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate(("k", "m", "g"), 1)
    for end, base in (("b", 1000), ("ib", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of "2.6GiB", "800 MB", "123456" or "123456 bytes", rounded down. Raises OptionError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower().replace("_", ""))
    if not found or found[2] not in _SIZES or Decimal(found[1]) <= 0:
        raise OptionError(f"{text!r} is no size; write 2.6GiB, 800MB or a number of bytes")
    return int(Decimal(found[1]) * _SIZES[found[2]])


def format_bytes(n: int) -> str:
    """Two decimals in the largest binary unit that leaves at least 1."""
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
