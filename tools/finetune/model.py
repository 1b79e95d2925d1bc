"""The oracle's MossAudio for training: many requests at a time, without padding, with an auxiliary head.

The maths is the oracle's, row by row (tests compare the logits); only the order of work differs: linear layers run
on the real tokens alone, attention on rows filled up to the longest. Knows batches; knows no files and no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..oracle.model import MossAudio
from .batches import IGNORED, Batch
from .passes import RMSNorm, Rotate


class Tensors(NamedTuple):
    """A Batch on the device."""

    windows: Tensor
    n_frames: Tensor
    n_padded: Tensor
    ids: Tensor
    audio_rows: Tensor
    rows: Tensor
    columns: Tensor
    positions: Tensor
    branches: Tensor
    labels: Tensor
    weights: Tensor
    aims: Tensor
    sounds: Tensor
    places: Tensor


class Losses(NamedTuple):
    """Means over a batch: of the answers' tokens (weighted), of what is heard in each audio token, of where it stands,
    and of where one head looks for what an answer says."""

    answer: Tensor
    sounds: Tensor
    places: Tensor
    aims: Tensor


@dataclass
class Inside:
    """What is looked at inside the decoder: of half of its layers what they make of the audio tokens [n_audio,
    d_model]; of the next layer's first head the log of the attention that it pays where a token is aimed [n_aimed]."""

    halfway: Tensor | None = None
    looks: Tensor | None = None


def to_tensors(batch: Batch, device: str | torch.device = "cpu") -> Tensors:
    return Tensors(*(torch.from_numpy(getattr(batch, part.name)).to(device) for part in fields(Batch)))


class Block(NamedTuple):
    """Attention of some neighbouring rows, filled up to the longest of them."""

    asking: slice  # of the flat queries
    asked: slice  # of the flat keys and values
    asking_at: Tensor  # place of each query in [n_rows, n_queries]
    asked_at: Tensor  # place of each key in [n_rows, n_keys]
    mask: Tensor  # [n_rows, 1, n_queries, n_keys] bool, where a query sees a key


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
    """[n_queries, n_head, d_head] and two of [n_keys, n_kv_head, d_head] -> [n_queries, n_head * d_head]."""
    n_group = q.shape[1] // k.shape[1]
    outputs = []
    for block in blocks:
        n_rows, _, n_queries, n_keys = block.mask.shape
        queries = _spread(q[block.asking], block.asking_at, n_rows, n_queries)
        keys, values = (_spread(part[block.asked], block.asked_at, n_rows, n_keys) for part in (k, v))
        if n_group > 1:
            keys, values = keys.repeat_interleave(n_group, dim=1), values.repeat_interleave(n_group, dim=1)
        out = F.scaled_dot_product_attention(queries, keys, values, block.mask)
        outputs.append(out.transpose(1, 2).reshape(n_rows * n_queries, -1)[block.asking_at])
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def make_blocks(rows: Tensor, branches: Tensor, wanted: Tensor | None = None) -> list[Block]:
    """Blocks in which a token sees itself and, of what comes before it, the shared part and its own branch.

    `rows` [n_tokens], ascending, `branches` [n_tokens]; `wanted`: the tokens that ask, ascending, by default all.
    """
    lengths = rows.bincount()
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(len(rows), device=rows.device) - starts[rows]
    wanted = torch.arange(len(rows), device=rows.device) if wanted is None else wanted
    blocks = []
    for first, last in _cut(lengths.tolist()):
        asked = slice(int(starts[first]), int(starts[last - 1] + lengths[last - 1]))
        asking = slice(
            *torch.searchsorted(wanted, torch.tensor([asked.start, asked.stop], device=rows.device)).tolist()
        )
        if asking.start < asking.stop:
            row, column, branch = rows[asked] - first, columns[asked], branches[asked]
            blocks.append(_make_block(asking, asked, row, column, branch, wanted[asking] - asked.start))
    return blocks


def _make_block(asking: slice, asked: slice, row: Tensor, column: Tensor, branch: Tensor, wanted: Tensor) -> Block:
    n_rows, n_keys = int(row[-1]) + 1, int(column.max()) + 1
    asked_at = row * n_keys + column
    key_branch = row.new_full((n_rows * n_keys,), -1).index_copy(0, asked_at, branch).view(n_rows, 1, n_keys)
    n_wanted = row[wanted].bincount(minlength=n_rows)
    n_queries = int(n_wanted.max())
    rank = torch.arange(len(wanted), device=row.device) - (n_wanted.cumsum(0) - n_wanted)[row[wanted]]
    asking_at = row[wanted] * n_queries + rank
    # A filler asks like the first token of a row: it must see something, and nobody reads its answer.
    place = row.new_zeros(n_rows * n_queries).index_copy(0, asking_at, column[wanted]).view(n_rows, n_queries, 1)
    own = row.new_zeros(n_rows * n_queries).index_copy(0, asking_at, branch[wanted]).view(n_rows, n_queries, 1)
    before = torch.arange(n_keys, device=row.device) <= place
    mask = before & ((key_branch == 0) | (key_branch == own))
    return Block(asking, asked, asking_at, asked_at, mask[:, None])


def _cut(lengths: list[int]) -> list[tuple[int, int]]:
    """Ranges of rows, one or two: where the cut leaves the least area to fill."""
    n = len(lengths)
    areas = [at * max(lengths[:at]) ** 2 + (n - at) * max(lengths[at:], default=0) ** 2 for at in range(1, n + 1)]
    at = areas.index(min(areas)) + 1
    return [(0, at), (at, n)] if at < n else [(0, n)]


def _spread(x: Tensor, at: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """[n_tokens, n_head, d_head] -> [n_rows, n_head, n_columns, d_head], zeros where no token is."""
    filled = x.new_zeros(n_rows * n_columns, *x.shape[1:]).index_copy(0, at, x)
    return filled.unflatten(0, (n_rows, n_columns)).transpose(1, 2)


class Trainee(nn.Module):
    """A MossAudio with what training needs beside it: a head that tells the encoder's output as one of `n_sounds`, and
    one that tells halfway through the decoder where an audio token stands, as one of `n_places` of each kind."""

    def __init__(self, model: MossAudio, n_sounds: int = 0, n_places: Sequence[int] = (), dropout: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.dropout = dropout
        self.checkpointing = False
        d_out = model.audio_adapter.gate_proj.in_features
        self.sound_head = nn.Linear(d_out, n_sounds) if n_sounds else None
        self.n_places = tuple(n_places)
        self.place_head = nn.Linear(model.lm_head.in_features, sum(n_places)) if n_places else None

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def forward(self, batch: Tensors) -> Losses:
        encoded, taps = self.encode(batch)
        learnt = (batch.labels != IGNORED).nonzero()[:, 0]
        inside = Inside()
        hidden = self.decode(batch, encoded, taps, learnt, inside)
        loss = F.cross_entropy(self.model.lm_head(hidden), batch.labels[learnt], reduction="none")
        weights = batch.weights[learnt]
        answer = (loss * weights).sum() / weights.sum().clamp(min=1e-6)
        aims = answer.new_zeros(()) if inside.looks is None else -inside.looks.mean()
        return Losses(answer, self._tell_sounds(encoded, batch.sounds), self._tell_places(inside, batch.places), aims)

    def encode(self, batch: Tensors) -> tuple[Tensor, list[Tensor]]:
        """The encoder's output and one tensor a tap, each [n_audio, d_out]."""
        encoder = self.model.audio_encoder
        if not len(batch.windows):
            nothing = self.model.lm_head.weight.new_zeros(0, self.model.audio_adapter.gate_proj.in_features)
            return nothing, [nothing for _ in encoder.taps]
        lengths = (batch.n_frames + 7) // 8  # [n_windows]
        x = _run_stem(encoder, batch)  # [n_windows, T, d_model]
        valid = torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None]
        rows, columns = valid.nonzero(as_tuple=True)
        x = (x + _sinusoids(x.shape[1], x.shape[2]).to(x))[rows, columns]  # [n_audio, d_model]
        at = rows * int(lengths.max()) + columns
        mask = valid[:, None, None, : int(lengths.max())].expand(-1, -1, int(lengths.max()), -1)
        blocks = [Block(slice(None), slice(None), at, at, mask)]
        outputs = []
        for n, layer in enumerate(encoder.layers):
            x = self._maybe_checkpoint(_run_encoder_layer, layer, x, blocks, self._drop)
            outputs.append(x if n in encoder.taps else None)
        return encoder.out_proj(encoder.layer_norm(x)), [encoder.out_proj(outputs[tap]) for tap in encoder.taps]

    def decode(
        self,
        batch: Tensors,
        encoded: Tensor,
        taps: list[Tensor],
        wanted: Tensor | None = None,
        inside: Inside | None = None,
    ) -> Tensor:
        """The final norm's rows of the `wanted` tokens (ascending; by default all), [n_wanted, d_model]; fills
        `inside`."""
        model, llm = self.model, self.model.language_model
        at = (batch.audio_rows >= 0).nonzero()[:, 0]
        order = batch.audio_rows[at]
        x = llm.embed_tokens(batch.ids)  # [n_tokens, d_model]
        additions: list[Tensor] = []
        if len(at):
            x = x.index_copy(0, at, model.audio_adapter(encoded)[order])
            additions = [merge(tap)[order] for merge, tap in zip(model.deepstack_audio_merger_list, taps, strict=False)]
        rotation = _rotation(batch.positions, llm.config)
        blocks = make_blocks(batch.rows, batch.branches)
        last, half = len(llm.layers) - 1, len(llm.layers) // 2
        for n, layer in enumerate(llm.layers):
            if inside is not None and n == half < last:
                audio = at[order.argsort()]  # the place of each row of the encoder's output
                inside.halfway = x[audio]
                inside.looks = _look(layer, x, rotation, batch, audio)
            # Of the last layer only what is asked for: the other tokens are keys and values there.
            asking = wanted if n == last else None
            blocks = make_blocks(batch.rows, batch.branches, asking) if asking is not None else blocks
            x = self._maybe_checkpoint(_run_decoder_layer, layer, x, blocks, rotation, asking, self._drop)
            if n < len(additions):
                x = _inject(x, at, additions[n], asking)
        return _norm(llm.norm, x)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _maybe_checkpoint(self, function: Any, *arguments: Any) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _tell_sounds(self, encoded: Tensor, sounds: Tensor) -> Tensor:
        known = sounds != IGNORED
        if self.sound_head is None or not known.any():
            return encoded.new_zeros(())
        return F.cross_entropy(self.sound_head(encoded), sounds, ignore_index=IGNORED)

    def _tell_places(self, inside: Inside, places: Tensor) -> Tensor:
        known = (places != IGNORED).any(dim=1)
        if self.place_head is None or inside.halfway is None or not known.any():
            return self.model.lm_head.weight.new_zeros(())
        x = inside.halfway[known]
        told = self.place_head(F.rms_norm(x, x.shape[1:])).split(self.n_places, dim=1)
        losses = [F.cross_entropy(x, y) for x, y in zip(told, places[known].unbind(1), strict=True)]
        return torch.stack(losses).mean()


def _run_stem(encoder: nn.Module, batch: Tensors) -> Tensor:
    """Windows -> [n_windows, T, d_model].

    At inference a window ends for the convolutions where the longest of its request does. Windows that end early are
    run apart: what lies behind is zero after each convolution, as their own padding is, and not gelu(bias).
    """
    n_frames = batch.windows.shape[2]
    short = batch.n_padded < n_frames
    if not short.any():
        return _convolve(encoder, batch.windows)
    early = short.nonzero()[:, 0]
    n_early = int(batch.n_padded[early].max())
    x = _convolve(encoder, batch.windows[early][:, :, :n_early], batch.n_padded[early])
    if len(early) == len(short):
        return x
    late = (~short).nonzero()[:, 0]
    x = F.pad(x, (0, 0, 0, (n_frames + 7) // 8 - x.shape[1]))
    together = torch.cat([_convolve(encoder, batch.windows[late]), x])
    return together[torch.cat([late, early]).argsort()]


def _convolve(encoder: nn.Module, windows: Tensor, lengths: Tensor | None = None) -> Tensor:
    """[B, n_mels, n_frames] -> [B, T, d_model]; `lengths` [B] in frames where windows end."""
    x = windows[:, None].contiguous(memory_format=torch.channels_last)
    for conv in (encoder.conv1, encoder.conv2, encoder.conv3):
        x = F.gelu(conv(x))  # [B, d_conv, n_mels / 2, n_frames / 2] after the first
        if lengths is not None:
            lengths = (lengths + 1) // 2
            inside = torch.arange(x.shape[3], device=x.device)[None] < lengths[:, None]
            x = x * inside[:, None, None, :]
    return encoder.stem_proj(x.permute(0, 3, 1, 2).flatten(2))


def _run_encoder_layer(layer: nn.Module, x: Tensor, blocks: list[Block], drop: Any) -> Tensor:
    attention = layer.self_attn
    h = layer.self_attn_layer_norm(x)
    q, k, v = (
        project(h).unflatten(-1, (attention.num_heads, -1))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    x = x + drop(attention.out_proj(attend(q, k, v, blocks)))
    h = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
    return x + drop(h)


def _run_decoder_layer(
    layer: nn.Module,
    x: Tensor,
    blocks: list[Block],
    rotation: tuple[Tensor, Tensor],
    asking: Tensor | None,
    drop: Any,
) -> Tensor:
    """[n_tokens, d_model] -> the same, or only the tokens `asking`."""
    attention, d_head = layer.self_attn, layer.self_attn.head_dim
    h = _norm(layer.input_layernorm, x)
    k = attention.k_proj(h).unflatten(-1, (-1, d_head))  # [n_tokens, n_kv_head, d_head]
    k = Rotate.apply(_norm(attention.k_norm, k), *rotation)
    v = attention.v_proj(h).unflatten(-1, (-1, d_head))
    if asking is not None:
        x, h = x[asking], h[asking]
        rotation = rotation[0][asking], rotation[1][asking]
    q = Rotate.apply(_norm(attention.q_norm, attention.q_proj(h).unflatten(-1, (-1, d_head))), *rotation)
    x = x + drop(attention.o_proj(attend(q, k, v, blocks)))
    return x + drop(layer.mlp(_norm(layer.post_attention_layernorm, x)))


def _look(layer: nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor], batch: Tensors, audio: Tensor) -> Tensor | None:
    """Log of the share of its attention that each aimed token's first head gives to its aim, [n_aimed]."""
    aimed = (batch.aims != IGNORED).nonzero()[:, 0]
    if not len(aimed):
        return None
    attention, d_head = layer.self_attn, layer.self_attn.head_dim
    h = _norm(layer.input_layernorm, x)
    q, k = F.linear(h[aimed], attention.q_proj.weight[:d_head]), F.linear(h, attention.k_proj.weight[:d_head])
    k = Rotate.apply(_norm(attention.k_norm, k)[:, None], *rotation)
    q = Rotate.apply(_norm(attention.q_norm, q)[:, None], rotation[0][aimed], rotation[1][aimed])
    columns, logs = batch.columns[audio[batch.aims[aimed]]], []
    for block in make_blocks(batch.rows, batch.branches, aimed):
        n_rows, _, n_queries, n_keys = block.mask.shape
        queries = _spread(q[block.asking], block.asking_at, n_rows, n_queries)
        keys = _spread(k[block.asked], block.asked_at, n_rows, n_keys)
        scores = (queries @ keys.transpose(2, 3) * d_head**-0.5).masked_fill(~block.mask, -math.inf)
        shares = scores.log_softmax(-1).flatten(0, 2)[block.asking_at]  # [n_asking, n_keys]
        logs.append(shares.gather(1, columns[block.asking, None]))
    return torch.cat(logs)[:, 0]


def _inject(x: Tensor, at: Tensor, addition: Tensor, asking: Tensor | None) -> Tensor:
    """Add a merger's rows to the audio positions `at`, of which `asking` may have left some."""
    if asking is None:
        return x.index_add(0, at, addition)
    place = torch.searchsorted(asking, at).clamp(max=len(asking) - 1)
    left = asking[place] == at
    return x.index_add(0, place[left], addition[left])


def _rotation(positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, each [n_tokens, 1, d_head / 2]."""
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    d_head = config.head_dim
    rates = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float32, device=positions.device) / d_head)
    angles = (positions[:, None] * rates)[:, None]
    return angles.cos(), angles.sin()


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _sinusoids(n_tokens: int, d_model: int) -> Tensor:
    """Whisper's positions: [n_tokens, d_model]."""
    half = d_model // 2
    rates = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float32))
    angles = torch.arange(n_tokens, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
