"""Runs a checkout of the official MOSS-Audio code and writes every stage to stdout; a program for another environment.

    python official.py CHECKOUT CHECKPOINT < request > stages

The request is a line of JSON (`clips`: lengths in samples, `prompt`, `n_new`, `time_markers`, `ops`, `resident_bytes`,
`tensors`: where each lies) and the clips, float32 at 16 kHz. A stage is a line of JSON (`name`, `dtype`, `shape`) and
its bytes; the last line has `end` and the versions. Needs what the checkout needs, and nothing of this package: the
folder beside this file serves as the module path. The model's code is not changed; hooks look on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import numpy as np
import torch
from lazy import Stored, load_lazily, meta_parameters
from probes import probe

SPAN = "<|audio_bos|><|AUDIO|><|audio_eos|>\n"


class Writer:
    """Stages to a pipe, in the order in which they can be computed.

    The encoder works through groups of windows; with more than one group its stages are held back until all are there.
    """

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._held: dict[str, list[torch.Tensor]] | None = None

    def hold(self) -> None:
        self._held = {}

    def let_go(self) -> None:
        held, self._held = self._held or {}, None
        for name, parts in held.items():
            width = max(part.shape[1] for part in parts)
            padded = [torch.nn.functional.pad(p, (0, 0) * (p.dim() - 2) + (0, width - p.shape[1])) for p in parts]
            self.write(name, torch.cat(padded))

    def write(self, name: str, value: torch.Tensor) -> None:
        if self._held is not None and name.startswith("enc."):
            self._held.setdefault(name, []).append(value)
            return
        array = value.detach().to(torch.float32 if value.is_floating_point() else torch.int32).contiguous().numpy()
        self.line(name=name, dtype=array.dtype.str, shape=array.shape)
        self._pipe.write(memoryview(array).cast("B") if array.size else b"")

    def line(self, **facts: Any) -> None:
        self._pipe.write(json.dumps(facts).encode() + b"\n")
        self._pipe.flush()


def load_official(checkpoint: Path, tensors: dict[str, list], resident_bytes: int) -> torch.nn.Module:
    """The official model over weights that are read when they are used, in float32."""
    from src.modeling_moss_audio import MossAudioConfig, MossAudioModel

    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "dtype", "architectures", "auto_map"):
        settings.pop(key, None)
    config = MossAudioConfig(**settings)
    config._attn_implementation = config.language_config._attn_implementation = "eager"
    model = meta_parameters(lambda: MossAudioModel(config))
    tied = {"lm_head.weight": "language_model.embed_tokens.weight"} if settings.get("tie_word_embeddings") else {}
    load_lazily(model, Stored(tensors).read, resident_bytes, tied)
    return model


def prepare(checkpoint: Path, model: torch.nn.Module, request: dict, clips: list[np.ndarray]) -> dict[str, Any]:
    """What the official processor makes of the request, in float32."""
    from transformers import AutoTokenizer

    stub = {} if importlib.util.find_spec("torchaudio") else {"torchaudio": types.ModuleType("torchaudio")}
    with patch.dict(sys.modules, stub):  # imported by the processor, and not used for arrays
        from src.processing_moss_audio import MelConfig, MossAudioProcessor

    path = checkpoint / "processor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = {key: settings[key] for key in ("audio_token_id", "audio_start_id", "audio_end_id") if key in settings}
    processor = MossAudioProcessor(
        AutoTokenizer.from_pretrained(checkpoint, use_fast=False),
        mel_config=MelConfig(mel_dim=model.audio_encoder.config.num_mel_bins, mel_dtype=torch.float32),
        enable_time_marker=request["time_markers"],
        **ids,
    )
    text = request["prompt"]
    if len(clips) > 1:  # the processor's own prompt has room for one clip
        text = processor._build_default_prompt(text, has_audio=True).replace(SPAN, SPAN * len(clips))
    inputs = processor(text=text, audios=clips or None, return_tensors="pt")
    inputs.pop("attention_mask")
    if clips:
        inputs["audio_input_mask"] = inputs["input_ids"] == processor.audio_token_id
    return inputs


def attach(model: torch.nn.Module, writer: Writer, stack: ExitStack, n_windows: int) -> None:
    """Hooks for every stage. They come before the model's own, which add the merged rows."""
    encoder, decoder = model.audio_encoder, model.language_model

    def after(module: torch.nn.Module, name: str, pick: Any = lambda x: x) -> None:
        hook = module.register_forward_hook(lambda m, args, output: writer.write(name, pick(output)))
        stack.callback(hook.remove)

    def before(module: torch.nn.Module, name: str) -> None:
        hook = module.register_forward_pre_hook(lambda m, args: writer.write(name, args[0][0]))
        stack.callback(hook.remove)

    def first(x: Any) -> torch.Tensor:
        return x[0] if isinstance(x, tuple) else x

    if n_windows > encoder.conv_chunksize:
        stack.callback(encoder.register_forward_pre_hook(lambda m, args: writer.hold(), with_kwargs=False).remove)
        stack.callback(encoder.register_forward_hook(lambda m, args, output: writer.let_go()).remove)
    after(encoder.stem_proj, "enc.stem_proj")
    for n, layer in enumerate(encoder.layers):
        after(layer, f"enc.blk.{n}", first)
    after(encoder, "enc.out", lambda output: output.last_hidden_state[0])
    after(model.audio_adapter, "adapter", lambda x: x[0])
    for k, merger in enumerate(model.deepstack_audio_merger_list):
        before(merger, f"enc.tap.{k}")
        after(merger, f"deepstack.{k}", lambda x: x[0])
    n_merger = len(model.deepstack_audio_merger_list) if n_windows else 0
    before(decoder.layers[0], "llm.embed")
    for n, layer in enumerate(decoder.layers):
        after(layer, f"llm.blk.{n}", lambda x: x[0] if x.dim() == 3 else x)
        if n < n_merger:
            following = decoder.layers[n + 1] if n + 1 < len(decoder.layers) else decoder.norm
            before(following, f"llm.inject.{n}")
    after(decoder.norm, "llm.final_norm", lambda x: x[0])


@torch.inference_mode()
def run(checkpoint: Path, request: dict, clips: list[np.ndarray], writer: Writer) -> None:
    model = load_official(checkpoint, request["tensors"], request["resident_bytes"])
    inputs = prepare(checkpoint, model, request, clips)
    n_windows = 0
    if clips:
        lengths = inputs["audio_data_seqlens"].tolist()
        writer.write("mel", torch.cat([mel[:, :n] for mel, n in zip(inputs["audio_data"], lengths, strict=True)], 1))
        n_windows = sum(-(-n // model.audio_encoder.chunk_frames) for n in lengths)
    writer.write("input_ids", inputs["input_ids"][0])
    with ExitStack() as stack:
        attach(model, writer, stack, n_windows)
        with probe(model, writer.write) if request["ops"] else nullcontext():
            output = model(**inputs, use_cache=True)
    writer.write("logits", output.logits[0])
    rows = [output.logits[0, -1]]
    cache = output.past_key_values
    del output
    while len(rows) < request["n_new"]:
        ids = rows[-1].argmax()[None, None]
        rows.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1])
    if request["n_new"]:
        writer.write("generated_ids", torch.stack(rows).argmax(-1))
        writer.write("decode.logits", torch.stack(rows))


def main() -> None:
    checkout, checkpoint = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no stage
    sys.path.insert(0, str(checkout))
    request = json.loads(sys.stdin.buffer.readline())
    clips = [np.frombuffer(sys.stdin.buffer.read(4 * n), np.float32).copy() for n in request["clips"]]
    writer = Writer(pipe)
    run(checkpoint, request, clips, writer)
    import transformers

    writer.line(end=True, transformers=transformers.__version__, torch=torch.__version__)


if __name__ == "__main__":
    main()
