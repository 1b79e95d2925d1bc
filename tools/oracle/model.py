"""MOSS-Audio in PyTorch, put together from transformers' Whisper layer and Qwen3: the yardstick for the engine.

Reads a Hugging Face checkpoint directly and gives every stage by name, in float32. Attribute names are the
checkpoint's own tensor names, so loading is a closed world: a missing or surplus tensor is an error. Knows no GGUF,
no graph and no tokenizer, and takes ready log-mels and token ids; it is written for clearness, not for speed.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model, WhisperConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from ...convert.checkpoint import Checkpoint, open_checkpoint
from ...convert.hf import read_world
from ...convert.hyperparameters import read_tied
from ...convert.source import Source
from ...kernels.dequantize import dequantize
from ...kernels.errors import AuricleError
from .lazy import load_lazily

Emit = Callable[[str, Tensor], None]

AUDIO_DEFAULTS = {
    "n_window": 200,
    "conv_chunksize": 64,
    "activation_function": "gelu",
    "layer_norm_eps": 1e-5,
    "deepstack_encoder_layer_indexes": (),
}
"""What the official configuration class fills in when a config.json says nothing."""

QWEN3_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
)
"""All of a decoder's configuration that decides what it computes; the converter sees that the rest is as usual."""

MAX_GROUP = 1 << 20  # windows that pass the convolutions together
ROWS_BYTES = 64 << 20  # of float32 at a time


class OracleError(AuricleError):
    """The request does not fit the model."""


@cache
def _whisper_extras() -> dict[str, Any]:
    """What this transformers' Whisper layer wants besides hidden states and mask: something in 4.57, nothing in 5.x."""
    names = inspect.signature(WhisperEncoderLayer.forward).parameters
    return {"layer_head_mask": None} if "layer_head_mask" in names else {}


def _run_whisper_layer(layer: WhisperEncoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    """[B, T, d] -> [B, T, d]. transformers 4.57 returns a tuple, 5.x the tensor."""
    out = layer(x, mask, **_whisper_extras())
    return out[0] if isinstance(out, tuple) else out


def _stem_len(n: int) -> int:
    """Length after the three convolutions (kernel 3, stride 2, padding 1)."""
    for _ in range(3):
        n = (n - 1) // 2 + 1
    return n


def _sinusoids(n_tokens: int, d_model: int) -> Tensor:
    """Whisper's positions, sines first and then cosines: [n_tokens, d_model]."""
    half = d_model // 2
    rates = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float32))
    angles = torch.arange(n_tokens, dtype=torch.float32)[:, None] * rates  # [n_tokens, half]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class AudioEncoder(nn.Module):
    """Independent windows of mel -> audio tokens; positions and attention stay inside a window."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d_model, d_conv, d_out = config["d_model"], config["downsample_hidden_size"], config["output_dim"]
        self.n_mels = config["num_mel_bins"]
        self.window = 2 * config["n_window"]  # mel frames
        self.windows_a_group = config["conv_chunksize"]
        self.taps = tuple(config["deepstack_encoder_layer_indexes"])
        self.conv1 = nn.Conv2d(1, d_conv, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(d_conv, d_conv, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(d_conv, d_conv, 3, stride=2, padding=1)
        self.stem_proj = nn.Linear(d_conv * _stem_len(self.n_mels), d_model)
        whisper = WhisperConfig(
            d_model=d_model,
            encoder_attention_heads=config["encoder_attention_heads"],
            encoder_ffn_dim=config["encoder_ffn_dim"],
            activation_function=config["activation_function"],
            attn_implementation="eager",
        )
        self.layers = nn.ModuleList(WhisperEncoderLayer(whisper) for _ in range(config["encoder_layers"]))
        self.layer_norm = nn.LayerNorm(d_model, eps=config["layer_norm_eps"])
        self.out_proj = nn.Linear(d_model, d_out, bias=False) if d_out != d_model else nn.Identity()

    def forward(self, mels: Sequence[Tensor], emit: Emit) -> tuple[Tensor, list[Tensor]]:
        """Clips [n_mels, n_frames] -> encoder output and one tensor a tap, each [n_audio, d_out], clips in order.

        A window shorter than the longest of the whole request is filled with zeros before the convolutions; what
        becomes of them is hidden from attention and dropped at the end.
        """
        windows = [window for mel in mels for window in mel.split(self.window, dim=1)]
        n_frames = max(window.shape[1] for window in windows)
        batch = torch.stack([F.pad(window, (0, n_frames - window.shape[1])) for window in windows])  # [B, n_mels, F]
        x = torch.cat([self._stem(group) for group in batch.split(self.windows_a_group)])  # [B, T, d_model]
        emit("enc.stem_proj", x)

        n_tokens = torch.tensor([_stem_len(window.shape[1]) for window in windows])
        valid = torch.arange(x.shape[1])[None, :] < n_tokens[:, None]  # [B, T]
        mask = torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min)[:, None, None, :]

        x = x + _sinusoids(x.shape[1], x.shape[2])
        outputs = []
        for n, layer in enumerate(self.layers):
            x = _run_whisper_layer(layer, x, mask)
            emit(f"enc.blk.{n}", x)
            outputs.append(x if n in self.taps else None)
        encoded = self.out_proj(self.layer_norm(x))[valid]
        emit("enc.out", encoded)
        return encoded, [self.out_proj(outputs[tap])[valid] for tap in self.taps]

    def _stem(self, mel: Tensor) -> Tensor:
        """[B, n_mels, n_frames] -> [B, T, d_model]."""
        x = mel[:, None]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.gelu(conv(x))  # [B, d_conv, n_mels / 8, T] after the third
        return self.stem_proj(x.permute(0, 3, 1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the audio adapter, and one merger a tap."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_in, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_in, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MossAudio(nn.Module):
    """The whole model, with the checkpoint's tensor names as attribute names."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        audio = AUDIO_DEFAULTS | {k: v for k, v in config["audio_config"].items() if v is not None}
        qwen3 = _make_qwen3_config(config["language_config"])
        sizes = audio["output_dim"], config["adapter_hidden_size"], qwen3.hidden_size
        n_inject = config.get("deepstack_num_inject_layers")
        n_merger = len(audio["deepstack_encoder_layer_indexes"][:n_inject])
        self.audio_encoder = AudioEncoder(audio)
        self.audio_adapter = GatedMLP(*sizes)
        self.deepstack_audio_merger_list = nn.ModuleList(GatedMLP(*sizes) for _ in range(n_merger))
        self.language_model = Qwen3Model(qwen3)
        self.lm_head = nn.Linear(qwen3.hidden_size, qwen3.vocab_size, bias=False)


def _make_qwen3_config(config: dict[str, Any]) -> Qwen3Config:
    """4.57 reads `rope_theta`, 5.x writes `rope_parameters`: both are accepted, under either version."""
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") if config.get("rope_theta") is None else config["rope_theta"]
    sizes = {key: config[key] for key in QWEN3_KEYS}
    return Qwen3Config(**sizes, rope_theta=theta, attn_implementation="eager")


class Oracle:
    """A loaded model that gives every stage of one request (one prompt, any number of clips)."""

    def __init__(self, model: MossAudio) -> None:
        self.model = model

    def run(
        self, samples_mels: Sequence[np.ndarray], input_ids: np.ndarray, audio_mask: np.ndarray, n_new: int = 0
    ) -> dict[str, np.ndarray]:
        """Every stage by name, kept in memory; arguments and names as in `trace`. Ids are int32, the rest float32."""
        stages: dict[str, np.ndarray] = {}

        def keep(name: str, value: Tensor) -> None:
            dtype = torch.float32 if value.is_floating_point() else torch.int32
            if name != "decode.logits":
                stages[name] = value.to(dtype).numpy()

        self.trace(samples_mels, input_ids, audio_mask, keep, n_new)
        return stages

    @torch.inference_mode()
    def trace(
        self,
        samples_mels: Sequence[np.ndarray],
        input_ids: np.ndarray,
        audio_mask: np.ndarray,
        emit: Emit,
        n_new: int = 0,
        all_logits: bool = True,
    ) -> None:
        """Hand each stage to `emit(name, tensor)` as soon as it is computed, in the order of computation.

        `samples_mels`: one log-mel [n_mels, n_frames] a clip; `input_ids` [T]; `audio_mask` bool [T], true where an
        audio token stands. With B windows of at most W tokens: `enc.stem_proj` (before positions) and `enc.blk.N`
        [B, W, d], rows past a window's end meaningless; `enc.out`, `enc.tap.K`, `adapter`, `deepstack.K` [n_audio, d];
        `llm.embed`, `llm.blk.N` (before the injection), `llm.inject.K` (after it), `llm.final_norm` [T, d];
        `logits` [T, n_vocab], unless `all_logits` is false; with `n_new`, `generated_ids` [n_new], greedy: no id ends
        it, and `decode.logits` [n_new, n_vocab], what each was taken from.
        Raises OracleError when mels, ids and mask do not fit together.
        """
        ids = torch.from_numpy(np.asarray(input_ids, dtype=np.int64))
        mask = torch.from_numpy(np.asarray(audio_mask, dtype=bool))
        self._check_request(samples_mels, ids, mask)
        embedded = self.model.language_model.embed_tokens(ids)  # [T, d_model]
        additions: list[Tensor] = []
        if samples_mels:
            adapted, additions = self._encode(samples_mels, emit)
            embedded[mask] = adapted
        emit("llm.embed", embedded)

        hidden, kv_cache = self._prefill(embedded, mask, additions, emit)
        emit("llm.final_norm", hidden)
        if all_logits:
            emit("logits", self.model.lm_head(hidden))
        if n_new:
            logits = self._continue_greedily(hidden[-1], kv_cache, n_new)
            emit("generated_ids", logits.argmax(-1))
            emit("decode.logits", logits)

    def _check_request(self, mels: Sequence[np.ndarray], ids: Tensor, mask: Tensor) -> None:
        encoder = self.model.audio_encoder
        for mel in mels:
            if mel.ndim != 2 or mel.shape[0] != encoder.n_mels or mel.shape[1] == 0:
                raise OracleError(f"a mel of shape {mel.shape}: give [{encoder.n_mels}, frames], one frame or more")
        if ids.ndim != 1 or ids.shape != mask.shape or not len(ids):
            raise OracleError(f"ids {tuple(ids.shape)}, audio mask {tuple(mask.shape)}: give equal lengths, not empty")
        n_audio = sum(
            _stem_len(min(encoder.window, mel.shape[1] - start))
            for mel in mels
            for start in range(0, mel.shape[1], encoder.window)
        )
        if int(mask.sum()) != n_audio:
            raise OracleError(f"the prompt has {int(mask.sum())} audio tokens, its mels make {n_audio}: give as many")

    def _encode(self, mels: Sequence[np.ndarray], emit: Emit) -> tuple[Tensor, list[Tensor]]:
        """Clips -> the rows that replace embeddings, and one set of rows to add a merger: each [n_audio, d_model]."""
        clips = [torch.from_numpy(np.ascontiguousarray(mel, dtype=np.float32)) for mel in mels]
        encoded, taps = self.model.audio_encoder(clips, emit)
        adapted = self.model.audio_adapter(encoded)
        emit("adapter", adapted)
        additions = []
        for k, merger in enumerate(self.model.deepstack_audio_merger_list):
            emit(f"enc.tap.{k}", taps[k])
            additions.append(merger(taps[k]))
            emit(f"deepstack.{k}", additions[k])
        return adapted, additions

    def _prefill(self, embedded: Tensor, mask: Tensor, additions: list[Tensor], emit: Emit) -> tuple[Tensor, Any]:
        """[T, d_model] -> the final norm's rows [T, d_model] and the KV cache.

        Merger k's rows are added to the output of layer k at the audio positions, in hooks, so that Qwen3Model
        itself keeps charge of masks, positions and cache in every transformers version.
        """

        def observe(n: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                emit(f"llm.blk.{n}", output[0])
                if n >= len(additions):
                    return output
                injected = output.clone()
                injected[0, mask] += additions[n]
                emit(f"llm.inject.{n}", injected[0])
                return injected

            return hook

        with ExitStack() as hooks:
            for n, layer in enumerate(self.model.language_model.layers):
                hooks.callback(layer.register_forward_hook(observe(n)).remove)
            out = self.model.language_model(inputs_embeds=embedded[None], use_cache=True)
        return out.last_hidden_state[0], out.past_key_values

    def _continue_greedily(self, hidden: Tensor, kv_cache: Any, n_new: int) -> Tensor:
        """The last position's final norm [d_model] and its cache -> logits [n_new, n_vocab]: the likeliest id of each
        row was read before the next."""
        logits = [self.model.lm_head(hidden)]
        while len(logits) < n_new:
            ids = logits[-1].argmax()[None, None]
            out = self.model.language_model(input_ids=ids, past_key_values=kv_cache, use_cache=True)
            logits.append(self.model.lm_head(out.last_hidden_state[0, -1]))
        return torch.stack(logits)


def load_oracle(checkpoint_dir: str | Path, resident_bytes: int = sys.maxsize) -> Oracle:
    """Read config.json and the safetensors (sharded or not) of a checkpoint; weights become float32 when they are used.

    All of them stay in memory as far as `resident_bytes` go; the others are read again each time.
    Raises ConversionError as `open_world` does.
    """
    checkpoint = open_world(checkpoint_dir)
    with torch.device("meta"):  # the weights are assigned below: no memory or time is spent on initial values
        model = MossAudio(checkpoint.config.values)
    tied = {"lm_head.weight": "language_model.embed_tokens.weight"} if read_tied(checkpoint.config) else {}
    load_lazily(model, partial(read_tensor, checkpoint), resident_bytes, tied)
    # Its buffers are computed, not loaded: on the meta device they would have no values.
    model.language_model.rotary_emb = Qwen3RotaryEmbedding(config=model.language_model.config)
    return Oracle(model.eval())


def open_world(checkpoint_dir: str | Path) -> Checkpoint:
    """A checkpoint of which every value and every tensor that the model reads is known to be good.

    Raises ConversionError for what the converter refuses, too: a file that is missing or damaged, a value of another
    kind or out of range, a tensor missing, surplus or of another shape.
    """
    checkpoint = open_checkpoint(checkpoint_dir)
    read_world(checkpoint)
    checkpoint.config.get("audio_config.conv_chunksize", int, within=(1, MAX_GROUP))
    return checkpoint


def read_tensor(source: Source, name: str) -> Tensor:
    """A tensor of a checkpoint in float32. Raises ConversionError for a file that has been cut short meanwhile."""
    stored = source.tensors[name]
    out = np.empty((stored.n_rows, stored.n_cols), np.float32)
    step = max(1, ROWS_BYTES // max(1, 4 * stored.n_cols))
    for start in range(0, stored.n_rows, step):
        stop = min(start + step, stored.n_rows)
        out[start:stop] = dequantize(source.read_bytes(name, start, stop), stored.format)
    return torch.from_numpy(out.reshape(stored.shape))
