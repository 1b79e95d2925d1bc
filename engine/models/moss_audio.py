"""MOSS-Audio: a windowed audio encoder, gated adapters, and a Qwen3 decoder that takes their rows (DeepStack).

Source: the official release of May 2026; names of tensors and keys are those of published GGUF files.
Knows no samples, no tokens and no backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.formats import F32
from ...kernels.quote import quote
from ..graph import Graph, Value
from ..kinds import MODEL, expect_kind
from ..mel import N_MELS
from ..tokenizer import DEFAULT_PRE
from .config import ModelError, absent_fields, read_config
from .qwen3 import DecoderConfig, Head, Inject, build_decoder

if TYPE_CHECKING:
    from ..gguf import GGUFFile

ARCHITECTURE = "moss_audio"
TIME_MARKERS_DEFAULT = True  # published files lack the key
# Sizes that no tensor of a file bears out; no model comes near.
MAX_CONTEXT = 1 << 24  # tokens
MAX_WINDOW = 1 << 14  # half the frames of a window
MAX_TAPS = 64
MEL_FILTERS = "audio.mel_filters"
ENCODER_TENSORS, DECODER_TENSORS = 15, 11  # of each layer

# Parts of the model, for totals: the first pattern that matches a tensor's name.
PARTS: tuple[tuple[str, str], ...] = (
    ("encoder", "enc.*"),
    ("adapter", "adapter.*"),
    ("deepstack", "deepstack.*"),
    ("embedding", "llm.embed.*"),
    ("head", "llm.lm_head.*"),
    ("decoder", "llm.*"),
    ("other", "*"),
)
PART_NAMES = tuple(part for part, _ in PARTS)


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    return next(part for part, pattern in PARTS if fnmatchcase(name, pattern))


@dataclass(frozen=True)
class EncoderConfig:
    """The keys `moss_audio.enc.*`. Published files lack `n_window`: half the frames of a window."""

    num_mel_bins: int
    encoder_layers: int
    d_model: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    downsample_rate: int
    downsample_hidden_size: int
    max_source_positions: int
    encoder_attention_window_size: int
    output_dim: int
    layer_norm_eps: float
    n_window: int = 200

    @property
    def window_frames(self) -> int:
        """Mel frames of a full window."""
        return 2 * self.n_window


@dataclass(frozen=True)
class MossAudioConfig:
    """All that decides the shape of the model. `taps`: encoder layers whose output is injected."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    taps: tuple[int, ...]
    n_inject: int
    adapter_hidden: int
    tied: bool

    @property
    def n_rows(self) -> int:
        """Row sets an audio token brings along: the adapter's and one a merger."""
        return 1 + self.n_inject


def read_moss_audio(file: GGUFFile) -> MossAudioConfig:
    """The configuration of a model file. Raises GGUFError or ModelError naming the key that is missing or wrong."""
    expect_kind(file, MODEL, ModelError, "a model is wanted here")
    architecture = file.require("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise ModelError(f"{file.where}: architecture is {quote(architecture)}; this engine runs {ARCHITECTURE!r}")
    n_taps = file.require("moss_audio.deepstack.num_taps", int, within=(0, MAX_TAPS))
    config = MossAudioConfig(
        encoder=read_config(EncoderConfig, file, "moss_audio.enc"),
        decoder=read_config(DecoderConfig, file, "moss_audio.llm"),
        taps=tuple(file.require(f"moss_audio.deepstack.tap.{k}", int) for k in range(n_taps)),
        n_inject=min(n_taps, file.require("moss_audio.deepstack.num_inject_layers", int)),
        adapter_hidden=file.require("moss_audio.adapter.hidden_size", int),
        tied="llm.lm_head.weight" not in file.tensors,
    )
    check_config(config, file.where, len(file.tensors))
    check_tensors(config, file)
    return config


def assumed_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that decide what a model computes and that a file lacks, with what is assumed in their place: as published
    files mean it, which lack them all. A model that was trained otherwise gives wrong answers so."""
    if metadata.get("general.architecture") != ARCHITECTURE:
        return {}
    assumed = absent_fields(EncoderConfig, metadata, f"{ARCHITECTURE}.enc")
    assumed |= absent_fields(DecoderConfig, metadata, f"{ARCHITECTURE}.llm")
    assumed[f"{ARCHITECTURE}.time_markers"] = TIME_MARKERS_DEFAULT
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        assumed["tokenizer.ggml.pre"] = DEFAULT_PRE
    return {key: value for key, value in assumed.items() if key not in metadata}


def check_config(c: MossAudioConfig, path: str, n_tensors: int) -> None:
    """Refuses sizes that do not fit together, or that no file of `n_tensors` tensors can have."""
    e, d = c.encoder, c.decoder
    outside = [t for t in c.taps if not 0 <= t < e.encoder_layers]
    n_layer, n_tokens = e.encoder_layers + d.num_layers, e.n_window // 4
    n_least = ENCODER_TENSORS * e.encoder_layers + DECODER_TENSORS * d.num_layers
    rules = [
        (n_least <= n_tensors, f"enc.encoder_layers and llm.num_layers are {n_layer} for {n_tensors} tensors"),
        (e.n_window <= MAX_WINDOW, f"enc.n_window is above {MAX_WINDOW}"),
        (d.max_position_embeddings <= MAX_CONTEXT, f"llm.max_position_embeddings is above {MAX_CONTEXT}"),
        (n_tokens <= e.max_source_positions, f"enc.n_window {e.n_window} is above 4 x enc.max_source_positions"),
        (e.downsample_rate == 8, f"enc.downsample_rate is {e.downsample_rate}; three convolutions make it 8"),
        (e.window_frames % 8 == 0, f"enc.n_window is {e.n_window}; twice that, a window's frames, must divide by 8"),
        (e.d_model % e.encoder_attention_heads == 0, f"enc.d_model {e.d_model}: not {e.encoder_attention_heads} heads"),
        (e.d_model % 2 == 0 and e.d_model > 2, f"enc.d_model is {e.d_model}; positions need an even size above 2"),
        (d.num_heads % d.num_kv_heads == 0, f"llm.num_heads {d.num_heads} is not {d.num_kv_heads} KV heads times n"),
        (d.head_dim % 2 == 0, f"llm.head_dim is {d.head_dim}; rotary positions need an even size"),
        (not outside, f"deepstack taps {outside} lie outside the {e.encoder_layers} encoder layers"),
        (len(set(c.taps)) == len(c.taps), f"deepstack taps {list(c.taps)} repeat a layer"),
        (c.n_inject >= 0, f"deepstack.num_inject_layers is {c.n_inject}; it must not be negative"),
        (c.n_inject <= d.num_layers, f"deepstack injects into {c.n_inject} layers of a decoder of {d.num_layers}"),
    ]
    for holds, complaint in rules:
        if not holds:
            raise ModelError(f"{path}: moss_audio.{complaint}")


def check_tensors(c: MossAudioConfig, file: GGUFFile) -> None:
    """Every weight the graphs ask for must be in the file with that shape; the front end's tables may be."""
    encoder = encoder_graph(c, 1, c.encoder.window_frames, c.encoder.window_frames // 8)
    decoder = decoder_graph(c, 1, 1, head="all", with_audio=True)
    wanted = {leaf.name: leaf.shape for leaf in encoder.leaves_of("weight") + decoder.leaves_of("weight")}
    tables = {MEL_FILTERS: (201, c.encoder.num_mel_bins), "audio.mel_window": (400,)}
    for name, shape in (wanted | tables).items():
        info = file.tensors.get(name)
        if info is None:
            if name == MEL_FILTERS and c.encoder.num_mel_bins != N_MELS:
                raise ModelError(f"{file.where}: tensor {name} is missing, for other than {N_MELS} bins; convert again")
            if name in wanted:
                raise ModelError(f"{file.where}: tensor {name} is missing; convert the checkpoint again")
            continue
        if info.shape != shape:
            raise ModelError(f"{file.where}: tensor {name} is {list(info.shape)}; the keys ask for {list(shape)}")
        if name in tables and info.format is not F32:
            raise ModelError(f"{file.where}: tensor {name} is {info.format}; it must be F32")


def token_count(n_frames: int) -> int:
    """Audio tokens of a window of `n_frames`: three convolutions of stride 2."""
    for _ in range(3):
        n_frames = (n_frames - 1) // 2 + 1
    return n_frames


def clip_windows(c: EncoderConfig, n_frames: int) -> list[int]:
    """Frames of each window of a clip: full ones, then the rest."""
    full, rest = divmod(n_frames, c.window_frames)
    return [c.window_frames] * full + [rest] * (rest > 0)


def clip_tokens(c: EncoderConfig, n_frames: int) -> int:
    return sum(token_count(n) for n in clip_windows(c, n_frames))


def sinusoids(n_positions: int, d: int) -> np.ndarray:
    """[n_positions, d]: sines, then cosines, of position * 10000^(-i / (d/2 - 1)) (Whisper's)."""
    half = d // 2
    rates = np.exp(np.float32(-math.log(10000.0) / (half - 1)) * np.arange(half, dtype=np.float32))
    angles = np.arange(n_positions, dtype=np.float32)[:, None] * rates
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


# Encoder.


def encoder_graph(c: MossAudioConfig, n_windows: int, n_frames: int, n_rows: int) -> Graph:
    """The encoder and adapters for a batch of windows, each padded to `n_frames`.

    Inputs: `mel` [n_windows, 1, n_mels, n_frames], `lengths` [n_windows] int32 (valid tokens of each window), and
    `valid` [n_rows] int32 (the flat numbers of the tokens to keep: all valid ones, in order).
    Stages: `enc.stem_proj`, `enc.blk.N` [n_windows, n_tokens, d_model]; `enc.out`, `enc.tap.K` [n_rows, output_dim];
    `adapter`, `deepstack.K` [n_rows, hidden].
    """
    g, e = Graph(), c.encoder
    mel = g.input("mel", (n_windows, 1, e.num_mel_bins, n_frames))
    lengths = g.input("lengths", (n_windows,), "i32")
    valid = g.input("valid", (n_rows,), "i32")

    x = g.stage("enc.stem_proj", build_stem(g, e, mel))  # [W, T, d_model]
    size = x.shape[1:]
    x = g.add(x, g.constant(f"positions.{size[0]}", size, lambda: sinusoids(*size)))
    taps: dict[int, Value] = {}
    for n in range(e.encoder_layers):
        x = g.stage(f"enc.blk.{n}", build_encoder_block(g, e, n, x, lengths))
        if n in c.taps:
            taps[c.taps.index(n)] = x

    def keep(x: Value) -> Value:
        """The valid tokens of a batch, in the size the adapters take: [n_rows, output_dim]."""
        x = g.take_rows(g.reshape(x, shape=(x.shape[0] * x.shape[1], e.d_model)), valid)
        if e.output_dim == e.d_model:
            return x
        return g.linear(x, g.weight("enc.out_proj.weight", (e.output_dim, e.d_model)))

    out = g.stage("enc.out", keep(build_norm(g, e, "enc.norm", x)))
    g.stage("adapter", build_adapter(g, c, "adapter", out))
    for k in range(c.n_inject):
        g.stage(f"deepstack.{k}", build_adapter(g, c, f"deepstack.{k}", g.stage(f"enc.tap.{k}", keep(taps[k]))))
    return g


def build_stem(g: Graph, e: EncoderConfig, mel: Value) -> Value:
    """Three convolutions that halve time and frequency, and a projection: -> [W, T, d_model]."""
    x = mel
    for n in (1, 2, 3):
        shape = (e.downsample_hidden_size, x.shape[1], 3, 3)
        weight, bias = g.weight(f"enc.conv{n}.weight", shape), g.weight(f"enc.conv{n}.bias", shape[:1])
        x = g.gelu(g.conv2d(x, weight, bias, stride=2, padding=1))  # [W, channels, mels, frames]
    n_windows, n_channels, n_mels, n_tokens = x.shape
    x = g.permute(x, dims=(0, 3, 1, 2))
    x = g.reshape(x, shape=(n_windows, n_tokens, n_channels * n_mels))  # frequency runs fastest
    return build_linear(g, "enc.stem_proj", x, e.d_model)


def build_linear(g: Graph, name: str, x: Value, n_out: int, bias: bool = True) -> Value:
    weight = g.weight(f"{name}.weight", (n_out, x.shape[-1]))
    return g.linear(x, weight, g.weight(f"{name}.bias", (n_out,)) if bias else None)


def build_norm(g: Graph, e: EncoderConfig, name: str, x: Value) -> Value:
    weight, bias = (g.weight(f"{name}.{part}", (e.d_model,)) for part in ("weight", "bias"))
    return g.layer_norm(x, weight, bias, eps=e.layer_norm_eps)


def build_encoder_block(g: Graph, e: EncoderConfig, n: int, x: Value, lengths: Value) -> Value:
    """x + attention(norm(x)), then + fc2(gelu(fc1(norm(x)))): [W, T, d_model] -> [W, T, d_model]."""
    name = f"enc.blk.{n}"
    n_head = e.encoder_attention_heads
    heads = (*x.shape[:2], n_head, e.d_model // n_head)

    h = build_norm(g, e, f"{name}.attn_norm", x)
    q, k, v = (
        g.reshape(build_linear(g, f"{name}.attn.{part}", h, e.d_model, bias=part != "k"), shape=heads) for part in "qkv"
    )
    mixed = g.reshape(g.window_attention(q, k, v, lengths), shape=x.shape)
    x = g.add(x, build_linear(g, f"{name}.attn.o", mixed, e.d_model))
    h = build_norm(g, e, f"{name}.ffn_norm", x)
    h = g.gelu(build_linear(g, f"{name}.ffn.fc1", h, e.encoder_ffn_dim))
    return g.add(x, build_linear(g, f"{name}.ffn.fc2", h, e.d_model))


def build_adapter(g: Graph, c: MossAudioConfig, name: str, x: Value) -> Value:
    """down(silu(gate(x)) * up(x)): [n, output_dim] -> [n, hidden]."""
    gate = build_linear(g, f"{name}.gate", x, c.adapter_hidden, bias=False)
    up = build_linear(g, f"{name}.up", x, c.adapter_hidden, bias=False)
    return build_linear(g, f"{name}.down", g.mul(g.silu(gate), up), c.decoder.hidden_size, bias=False)


# Decoder.


def decoder_graph(c: MossAudioConfig, n_tokens: int, n_ctx: int, *, head: Head, with_audio: bool) -> Graph:
    """The decoder for `n_tokens` tokens. With audio there are inputs `audio.index` [n_tokens] int32 and
    `audio.rows.K` [n_tokens, hidden]: K = 0 from the adapter, K = 1 … from merger K - 1."""
    g, inject = Graph(), None
    if with_audio:
        index = g.input("audio.index", (n_tokens,), "i32")
        rows = [g.input(f"audio.rows.{k}", (n_tokens, c.decoder.hidden_size)) for k in range(c.n_rows)]
        inject = Inject(index, rows[0], dict(enumerate(rows[1:])))
    build_decoder(g, c.decoder, n_tokens, n_ctx, inject=inject, tied=c.tied, head=head)
    return g
