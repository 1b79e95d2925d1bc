"""What a GGUF file is for: a model, an adapter, an importance matrix. Knows the marks of each, and none of their
contents."""

from __future__ import annotations

from ..kernels.errors import AuricleError
from ..kernels.quote import quote
from .gguf import GGUFFile

MODEL, ADAPTER, IMATRIX = "model", "adapter", "imatrix"
USES = {
    MODEL: "a model; give it with -m",
    ADAPTER: "a LoRA adapter; give it with --lora beside a model",
    IMATRIX: "an importance matrix; give it with --imatrix to auricle convert or quantize",
}
COUNT_KEYS = "count."  # begins the keys of a matrix as CrispASR writes it, which states no type


def find_kind(file: GGUFFile) -> str:
    """One of `USES`, or what the file calls itself. Raises GGUFError for a type that is no text."""
    stated = file.get("general.type", str)
    if stated is not None:
        return stated
    if any(key.startswith(COUNT_KEYS) for key in file.metadata):
        return IMATRIX
    pairs_only = all(name.endswith((".lora_a", ".lora_b")) for name in file.tensors)
    return ADAPTER if file.tensors and pairs_only else MODEL


def expect_kind(file: GGUFFile, wanted: str, error: type[AuricleError], remedy: str) -> None:
    """Raises `error` for a file that is for something else, with what it is and what to do."""
    found = find_kind(file)
    if found != wanted:
        raise error(f"{file.where} is {USES.get(found, f'of the type {quote(found)}')}; {remedy}")
