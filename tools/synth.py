"""Writes a model file of a published shape with random weights and an invented vocabulary: benchmarks need no other.

Sizes, names, types and metadata are those a converted checkpoint has; what such a model says means nothing. Weights
are drawn as stored blocks and never encoded. Those of quantised types are fresh random bits throughout. Plain numbers
come out of one pool of normal draws, used in turns: its length is prime, so no two rows of a matrix are alike.
Does not know which recipe gives a tensor which type, how a block is decoded, or how the engine runs the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import numpy as np

from ..convert.hyperparameters import Hyperparameters
from ..convert.names import moss_audio as names
from ..convert.names.table import evaluate_shape, expand
from ..convert.plan import describe_types
from ..convert.recipes import choose_formats, find_recipe
from ..convert.vocabulary import Vocabulary
from ..engine.fields import Fields
from ..engine.gguf import Typed, boolean, string, u32
from ..engine.gguf_write import GGUFWriter, Layout, plan_layout
from ..engine.mel import hann_window, mel_filters
from ..engine.models.moss_audio import PART_NAMES, part_of
from ..kernels.dequantize import dequantize, unpack_scales_k4
from ..kernels.errors import AuricleError
from ..kernels.formats import BF16, F16, F32, Q2_K, Q4_1, Q4_K, Q5_1, Q5_K, Format
from ..kernels.quantize import pack_scales_k4, quantize
from .synth_vocabulary import invent_vocabulary

_ENCODER = {
    "enc.num_mel_bins": 128,
    "enc.encoder_layers": 32,
    "enc.d_model": 1280,
    "enc.encoder_attention_heads": 20,
    "enc.encoder_ffn_dim": 5120,
    "enc.downsample_rate": 8,
    "enc.downsample_hidden_size": 480,
    "enc.max_source_positions": 1500,
    "enc.encoder_attention_window_size": 100,
    "enc.output_dim": 1280,
    "enc.layer_norm_eps": 1e-5,
    "enc.n_window": 200,
}
_DECODER = {
    "llm.num_layers": 36,
    "llm.num_heads": 32,
    "llm.num_kv_heads": 8,
    "llm.head_dim": 128,
    "llm.vocab_size": 151936,
    "llm.max_position_embeddings": 40960,
    "llm.rope_theta": 1e6,
    "llm.rms_norm_eps": 1e-6,
}
_4B = _ENCODER | _DECODER | {"adapter.hidden_size": 8192, "llm.hidden_size": 2560, "llm.intermediate_size": 9728}
_8B = _4B | {"llm.hidden_size": 4096, "llm.intermediate_size": 12288}
# Small enough for tests; every row fills whole blocks of 256.
_TINY = _4B | {
    "enc.encoder_layers": 4,
    "enc.d_model": 256,
    "enc.encoder_attention_heads": 4,
    "enc.encoder_ffn_dim": 512,
    "enc.downsample_hidden_size": 32,
    "enc.output_dim": 256,
    "adapter.hidden_size": 256,
    "llm.hidden_size": 256,
    "llm.num_layers": 4,
    "llm.num_heads": 4,
    "llm.num_kv_heads": 2,
    "llm.head_dim": 64,
    "llm.intermediate_size": 768,
    "llm.vocab_size": 8192,
}


def _shape(values: dict[str, int | float], *taps: int) -> Hyperparameters:
    return Hyperparameters(values | {"deepstack.num_inject_layers": len(taps)}, taps, frozenset({"untied"}))


SHAPES: dict[str, Hyperparameters] = {
    "moss-audio-4b": _shape(_4B, 8, 16, 24),
    "moss-audio-8b": _shape(_8B, 8, 16, 24),
    "tiny": _shape(_TINY, 0, 1, 2),
}

# Standard deviation of a matrix's weights times the root of what they sum over; the first pattern that matches wins.
# Branches that are added to the residual stream are small, so that it keeps its size through all layers.
GAINS = (
    ("*.attn.o.weight", 0.3),
    ("*.ffn.down.weight", 0.3),
    ("*.ffn.fc2.weight", 0.3),
    ("*", 1.0),
)
EMBEDDING = "llm.embed.weight"  # sums over nothing: rows of standard deviation 1
SPREAD = 0.1  # of norms about 1 and of biases about 0

Progress = Callable[[int, int], None]


class SynthError(AuricleError):
    """A synthetic file that cannot be made as asked."""


@dataclass(frozen=True)
class SynthPlan:
    """A file before it is written: its bytes follow from the plan alone."""

    shape: Hyperparameters
    seed: int
    metadata: dict[str, Typed]
    layout: Layout

    def bytes_by_part(self) -> dict[str, int]:
        """Tensor bytes of each part of the model, every part named."""
        totals = dict.fromkeys(PART_NAMES, 0)
        for name, info in self.layout.tensors.items():
            totals[part_of(name)] += info.nbytes
        return totals


class PlannedFile(Fields):
    """What is asked of a model file but its weights, of one that has not been written. Raises SynthError as
    `plan_synth` does."""

    def __init__(self, shape_name: str, type_name: str) -> None:
        plan = plan_synth(shape_name, type_name)
        self.path, self.tensors = shape_name, plan.layout.tensors
        self.metadata = {key: typed.value for key, typed in plan.metadata.items()}
        super().__init__(self.metadata, shape_name, SynthError, "it is a made-up file")


def plan_synth(shape_name: str, type_name: str, seed: int = 0) -> SynthPlan:
    """Plan a file of the shape `shape_name` (a key of SHAPES) in the recipe `type_name`.

    Raises SynthError for an unknown shape or a negative seed, ConversionError for an unknown recipe.
    """
    shape = SHAPES.get(shape_name.lower())
    if shape is None:
        raise SynthError(f"there is no shape {shape_name!r}: choose one of {', '.join(SHAPES)}")
    if seed < 0:
        raise SynthError(f"the seed is {seed}: it must be 0 or more")
    recipe = find_recipe(type_name)
    targets = expand(names.TENSORS, shape.values, shape.flags).values()
    dims = {target.name: target.shape for target in targets}
    dims |= {name: evaluate_shape(formula, shape.values) for name, formula in names.DERIVED}
    vocabulary = invent_vocabulary(shape.values["llm.vocab_size"])
    metadata = {
        "general.architecture": string(names.ARCHITECTURE),
        "general.name": string(f"{shape_name.lower()} with random weights (synthetic, seed {seed})"),
        **describe_types(recipe),
        **shape.metadata(),
        f"{names.ARCHITECTURE}.time_markers": boolean(True),
        **_describe_tokens(vocabulary),
        **vocabulary.metadata(),
    }
    formats = choose_formats(recipe, dims)
    layout = plan_layout(metadata, [(name, dims[name], formats[name].format) for name in dims])
    return SynthPlan(shape, seed, metadata, layout)


def write_synth(plan: SynthPlan, out_path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Write the file a plan describes; `out_path` appears when it is complete, or not at all.

    `progress(done, total)` counts bytes of weights. The same plan gives the same bytes. Raises OutputError when the
    file cannot be written (a full disk: with the bytes needed).
    """
    weights = RandomWeights(plan.seed)
    done, total = 0, sum(info.nbytes for info in plan.layout.tensors.values())
    with GGUFWriter(out_path, plan.layout) as writer:
        for name, info in plan.layout.tensors.items():
            at = 0
            for data in _draw_tensor(weights, name, info.shape, info.format):
                writer.write(name, data, at)
                at += data.nbytes
                done += data.nbytes
                if progress:
                    progress(done, total)


def _describe_tokens(vocabulary: Vocabulary) -> dict[str, Typed]:
    texts = [(key, text) for key, text in names.TEXT_TOKENS] + [(key, text) for key, _, text in names.AUDIO_TOKENS]
    return {f"{names.ARCHITECTURE}.{key}": u32(vocabulary.ids[text]) for key, text in texts}


def _draw_tensor(weights: RandomWeights, name: str, shape: tuple[int, ...], fmt: Format) -> Iterator[np.ndarray]:
    """A tensor's bytes in order: uint8 arrays of a few MiB."""
    if name == "audio.mel_filters":
        yield mel_filters(shape[1]).view(np.uint8)
    elif name == "audio.mel_window":
        yield hann_window(*shape).view(np.uint8)
    elif len(shape) == 1:
        assert fmt is F32, f"{name} is a vector of {fmt}"
        yield weights.draw_vector(shape[0], 0.0 if name.endswith(".bias") else 1.0).view(np.uint8)
    else:
        gain = next(gain for pattern, gain in GAINS if fnmatchcase(name, pattern))
        std = 1.0 if name == EMBEDDING else gain / math.sqrt(math.prod(shape[1:]))
        yield from weights.draw_blocks(fmt, fmt.tensor_bytes(shape) // fmt.block_bytes, std)


# Weights.

SLAB_BYTES = 8 << 20
POOL = 1_048_583  # prime, and more than any matrix has rows

# What a type with a minimum adds to its codes, so that a sub-block's mean is 0: the field, in units of d. Codes from 0
# to 2^b - 1 have the mean (2^b - 1) / 2. The other types are symmetric, but for half a code, which signs of d undo.
MINIMA: dict[Format, tuple[str, float]] = {
    Q4_1: ("m", -7.5),
    Q5_1: ("m", -15.5),
    Q2_K: ("dmin", 1.5),
    Q4_K: ("dmin", 7.5),
    Q5_K: ("dmin", 15.5),
}
PLAIN = (F32, F16, BF16)


class RandomWeights:
    """A stream of random weights in any storage type, repeatable by its seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._normal = self._rng.standard_normal((1, POOL), dtype=np.float32)
        self._pools: dict[tuple[Format, float], np.ndarray] = {}
        self._at = 0

    def draw_vector(self, n: int, mean: float) -> np.ndarray:
        """float32 [n]."""
        return np.float32(mean) + np.float32(SPREAD) * self._rng.standard_normal(n, dtype=np.float32)

    def draw_blocks(self, fmt: Format, n_blocks: int, std: float) -> Iterator[np.ndarray]:
        """`n_blocks` blocks that decode to weights of mean 0 and deviation `std`: uint8 arrays of a few MiB."""
        draw = self._draw_plain if fmt in PLAIN else self._draw_quantised
        step = SLAB_BYTES // fmt.block_bytes
        for start in range(0, n_blocks, step):
            yield draw(fmt, min(step, n_blocks - start), std).view(np.uint8)

    def _draw_plain(self, fmt: Format, n: int, std: float) -> np.ndarray:
        if (fmt, std) not in self._pools:
            self._pools[fmt, std] = quantize(np.float32(std) * self._normal, fmt)[0].view(fmt.layout)
        drawn = np.resize(np.roll(self._pools[fmt, std], -self._at), n)  # `resize` repeats it as often as it takes
        self._at = (self._at + n) % POOL
        return drawn

    def _draw_quantised(self, fmt: Format, n: int, std: float) -> np.ndarray:
        return random_blocks(self._rng, fmt, n, std / _unit_std(fmt))


def random_blocks(rng: np.random.Generator, fmt: Format, n: int, step: float) -> np.ndarray:
    """`n` blocks of a quantised type: random codes and sub-block scales, `d` within a quarter of `step`, and of either
    sign where the type has no minimum."""
    words = rng.integers(0, 1 << 64, -(-n * fmt.block_bytes // 8), np.uint64)
    blocks = words.view(np.uint8)[: n * fmt.block_bytes].view(fmt.layout)
    d = rng.random(n, dtype=np.float32) - np.float32(0.5)
    d = np.float32(step) * (d / 2 + (np.float32(1) if fmt in MINIMA else np.copysign(np.float32(1), d)))
    blocks["d"] = d
    if fmt in MINIMA:
        field, centre = MINIMA[fmt]
        blocks[field] = np.float32(centre) * d
    if fmt in (Q4_K, Q5_K):
        levels = unpack_scales_k4(blocks["scales"])[0] | 32  # 32 to 63, as the largest are in files of real weights
        blocks["scales"] = pack_scales_k4(levels, levels)
    elif fmt is Q2_K:
        blocks["scales"] = (blocks["scales"] & 15) * np.uint8(17)
    return blocks


@cache
def _unit_std(fmt: Format) -> float:
    """Standard deviation of the weights in random blocks of step 1."""
    blocks = random_blocks(np.random.default_rng(0), fmt, (1 << 20) // fmt.length, 1.0)
    return float(dequantize(blocks.view(np.uint8), fmt).std(dtype=np.float64))
