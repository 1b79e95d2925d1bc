"""The worker of other benchmarks that runs the PyTorch model: `peer_torch.py MODEL THREADS DTYPE [DEVICE]`.

The model of `tools/oracle` (transformers' parts, attention by `scaled_dot_product_attention` as is their default) in
the shape of a model file, with random weights of its own: time does not depend on what they are.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from turns import serve

from auricle.engine import load
from auricle.engine.memory import peak_bytes
from auricle.engine.models.moss_audio import MossAudioConfig
from auricle.tools.bench import CLIP_SECONDS, SAMPLE_RATE, hear, make_speech
from auricle.tools.oracle.model import MossAudio, Oracle

POOL = 1_048_583  # weights repeat after so many; prime, so that no two rows of a matrix are alike


def checkpoint_config(c: MossAudioConfig) -> dict[str, Any]:
    """What the config.json of such a model would say."""
    e, d = c.encoder, c.decoder
    audio = {
        "num_mel_bins": e.num_mel_bins,
        "encoder_layers": e.encoder_layers,
        "d_model": e.d_model,
        "encoder_attention_heads": e.encoder_attention_heads,
        "encoder_ffn_dim": e.encoder_ffn_dim,
        "downsample_hidden_size": e.downsample_hidden_size,
        "output_dim": e.output_dim,
        "layer_norm_eps": e.layer_norm_eps,
        "n_window": e.n_window,
        "deepstack_encoder_layer_indexes": list(c.taps),
    }
    language = {
        "hidden_size": d.hidden_size,
        "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "intermediate_size": d.intermediate_size,
        "vocab_size": d.vocab_size,
        "max_position_embeddings": d.max_position_embeddings,
        "rope_theta": d.rope_theta,
        "rms_norm_eps": d.rms_norm_eps,
    }
    return {
        "audio_config": audio,
        "language_config": language,
        "adapter_hidden_size": c.adapter_hidden,
        "deepstack_num_inject_layers": c.n_inject,
    }


def build_model(c: MossAudioConfig, dtype: torch.dtype) -> MossAudio:
    """Instantiated without memory, then filled matrix by matrix, on the default device."""
    with torch.device("meta"):
        model = MossAudio(checkpoint_config(c))
    torch.manual_seed(0)
    pool = torch.randn(POOL)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(draw(value.shape, pool, dtype), requires_grad=False)
    model.language_model.rotary_emb = Qwen3RotaryEmbedding(config=model.language_model.config)
    model.language_model.config._attn_implementation = "sdpa"
    for layer in model.audio_encoder.layers:
        layer.self_attn.config._attn_implementation = "sdpa"
    for module in (model.audio_encoder.conv1, *model.audio_encoder.layers):  # mels, positions and masks are float32
        module.register_forward_pre_hook(lambda _, given: tuple(x.to(dtype) for x in given))
    device = torch.get_default_device()  # ids and mels come from numpy, and with them they go there
    model.language_model.embed_tokens.register_forward_pre_hook(lambda _, given: (given[0].to(device),))
    model.audio_encoder.register_forward_pre_hook(lambda _, given: ([mel.to(device) for mel in given[0]], given[1]))
    return model.eval()


def draw(shape: torch.Size, pool: Tensor, dtype: torch.dtype) -> Tensor:
    """Ones for a vector; for others normal weights that keep the size of what they are applied to."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    scaled = (pool / math.sqrt(math.prod(shape[1:]))).to(dtype)
    out = torch.empty(math.prod(shape), dtype=dtype)
    for start in range(0, len(out), POOL):
        part = out[start : start + POOL]
        part.copy_(scaled[: len(part)])
    return out.view(shape)


class Reference:
    """The tasks, over one model."""

    def __init__(self, path: str, threads: int, dtype: torch.dtype, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        torch.set_default_device(device)
        self.dtype, self.device = dtype, device
        with torch.device("cpu"), load(path, backend="reference") as model:
            self.config = model.config
            self.file = path
        self.oracle = Oracle(build_model(self.config, dtype))

    def clip(self, n_new: int, clip_s: float = CLIP_SECONDS) -> dict[str, float]:
        """One clip to one token, and to `n_new`. `encoder_s`: to the rows that the decoder takes."""
        (first, encoder), n_first = self._answer(1, clip_s), 1
        whole = self._answer(n_new, clip_s)[0] if n_new > n_first else first
        return {"first_token_s": first, "encoder_s": encoder, "real_time_factor": whole / clip_s}

    def _answer(self, n_new: int, clip_s: float) -> tuple[float, float]:
        """Seconds of the whole and of the encoder."""
        samples = np.resize(make_speech(CLIP_SECONDS), round(clip_s * SAMPLE_RATE))
        # For its tokens alone; opening it is not counted.
        with torch.device("cpu"), load(self.file, backend="reference") as model:
            start = time.perf_counter()
            heard, prompt = hear(model, samples, SAMPLE_RATE, n_new)
        last, clock = (f"deepstack.{self.config.n_inject - 1}" if self.config.n_inject else "adapter"), [self._wait()]

        def look(name: str, value: Tensor) -> None:
            if name == last:
                clock.append(self._wait())

        self.oracle.trace(heard.mels, prompt.ids, prompt.audio_rows >= 0, look, n_new, all_logits=False)
        return self._wait() - start, clock[1] - clock[0]

    def _wait(self) -> float:
        """The time when all that was asked for is done."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def decode(self, context: int, n_new: int) -> float:
        """Tokens a second after `context` tokens."""
        model, d = self.oracle.model, self.config.decoder
        cache = DynamicCache()
        for n in range(d.num_layers):
            k, v = torch.randn(2, 1, d.num_kv_heads, context, d.head_dim, dtype=self.dtype)
            cache.update(k, v, n)
        token = torch.tensor([[100]])
        clock = []
        for _ in range(n_new + 1):  # the first is not counted
            clock.append(self._wait())
            out = model.language_model(input_ids=token, past_key_values=cache, use_cache=True)
            token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
        return n_new / (self._wait() - clock[1])

    def peak(self) -> int:
        """Bytes of this process, or those on the card."""
        return peak_bytes() if self.device == "cpu" else torch.cuda.max_memory_allocated()


def main() -> None:
    reference = Reference(sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]), *sys.argv[4:])
    serve({name: getattr(reference, name) for name in ("clip", "decode", "peak")})


if __name__ == "__main__":
    main()
