"""MOSS-Audio: which tensor and which number of a Hugging Face checkpoint has which name in a GGUF file.

Data only, in the published names; files made by others with these names load here and the reverse.
Sources: the official modelling code of 2026-05 (Hugging Face side), the published files (GGUF side).
"""

from __future__ import annotations

from ...engine.gguf import ValueType
from .table import Drop, KeyRow, TensorRow

ARCHITECTURE = "moss_audio"
MODEL_TYPES = ("moss_audio",)
ARCHITECTURES = ("MossAudioModel",)

U32, F32 = ValueType.UINT32, ValueType.FLOAT32

KEYS = (
    KeyRow("enc.num_mel_bins", ("audio_config.num_mel_bins",), U32),
    KeyRow("enc.encoder_layers", ("audio_config.encoder_layers",), U32),
    KeyRow("enc.d_model", ("audio_config.d_model",), U32),
    KeyRow("enc.encoder_attention_heads", ("audio_config.encoder_attention_heads",), U32),
    KeyRow("enc.encoder_ffn_dim", ("audio_config.encoder_ffn_dim",), U32),
    KeyRow("enc.downsample_rate", ("audio_config.downsample_rate",), U32),
    KeyRow("enc.downsample_hidden_size", ("audio_config.downsample_hidden_size",), U32),
    KeyRow("enc.max_source_positions", ("audio_config.max_source_positions",), U32),
    KeyRow("enc.encoder_attention_window_size", ("audio_config.encoder_attention_window_size",), U32),
    KeyRow("enc.output_dim", ("audio_config.output_dim",), U32),
    KeyRow("enc.layer_norm_eps", ("audio_config.layer_norm_eps",), F32),
    # Checkpoints older than the windowed encoder have no n_window; the official code then takes 200.
    KeyRow("enc.n_window", ("audio_config.n_window",), U32, default=200),
    KeyRow("adapter.hidden_size", ("adapter_hidden_size",), U32),
    KeyRow("llm.hidden_size", ("language_config.hidden_size",), U32),
    KeyRow("llm.num_layers", ("language_config.num_hidden_layers",), U32),
    KeyRow("llm.num_heads", ("language_config.num_attention_heads",), U32),
    KeyRow("llm.num_kv_heads", ("language_config.num_key_value_heads",), U32),
    KeyRow("llm.head_dim", ("language_config.head_dim",), U32),
    KeyRow("llm.intermediate_size", ("language_config.intermediate_size",), U32),
    KeyRow("llm.vocab_size", ("language_config.vocab_size",), U32),
    KeyRow("llm.max_position_embeddings", ("language_config.max_position_embeddings",), U32),
    # transformers 5 writes the base of the rotation one level down.
    KeyRow("llm.rope_theta", ("language_config.rope_theta", "language_config.rope_parameters.rope_theta"), F32),
    KeyRow("llm.rms_norm_eps", ("language_config.rms_norm_eps",), F32),
)

TAPS = "audio_config.deepstack_encoder_layer_indexes"
INJECTED = "deepstack_num_inject_layers"
TIED = ("tie_word_embeddings", "language_config.tie_word_embeddings")
LAYER_COUNTS = ("enc.encoder_layers", "llm.num_layers")

# What the engine computes in one way only: where a checkpoint states one of these, it must state this.
FIXED = {
    "audio_config.activation_function": ("gelu",),
    "audio_config.downsample_rate": (8,),
    "language_config.model_type": ("qwen3",),
    "language_config.hidden_act": ("silu",),
    "language_config.attention_bias": (False,),
    "language_config.use_sliding_window": (False,),
    "language_config.rope_scaling.rope_type": ("default",),
    "language_config.rope_scaling.type": ("default",),
    "language_config.rope_parameters.rope_type": ("default",),
}
FIXED_MEL = {"mel_sr": (16000,), "mel_n_fft": (400,), "mel_hop_length": (160,)}

# Token ids: GGUF key, key in processor_config.json or config.json, Qwen's id, the placeholder's text.
AUDIO_TOKENS = (
    ("audio_token_id", 151654, "<|AUDIO|>"),
    ("audio_start_id", 151669, "<|audio_bos|>"),
    ("audio_end_id", 151670, "<|audio_eos|>"),
)
# GGUF key, the text of the token taken when no configuration file names an id.
TEXT_TOKENS = (("bos_token_id", "<|endoftext|>"), ("eos_token_id", "<|im_end|>"))

D, FF = "enc.d_model", "enc.encoder_ffn_dim"
CONV = "enc.downsample_hidden_size"
HIDDEN, VOCAB = "llm.hidden_size", "llm.vocab_size"
Q_WIDTH, KV_WIDTH = "llm.num_heads*llm.head_dim", "llm.num_kv_heads*llm.head_dim"
ADAPTER, OUT = "adapter.hidden_size", "enc.output_dim"


def _affine(source: str, target: str, shape: str, bias: str, repeat: str = "") -> tuple[TensorRow, TensorRow]:
    return (
        TensorRow(f"{source}.weight", f"{target}.weight", shape, repeat),
        TensorRow(f"{source}.bias", f"{target}.bias", bias, repeat),
    )


def _encoder_layer(source: str, target: str, shape: str, bias: str) -> tuple[TensorRow, TensorRow]:
    return _affine(f"audio_encoder.layers.{{n}}.{source}", f"enc.blk.{{n}}.{target}", shape, bias, "enc.encoder_layers")


def _decoder_layer(source: str, target: str, shape: str) -> TensorRow:
    return TensorRow(
        f"language_model.layers.{{n}}.{source}.weight", f"llm.blk.{{n}}.{target}.weight", shape, "llm.num_layers"
    )


def _gated_mlp(source: str, target: str, repeat: str = "") -> tuple[TensorRow, ...]:
    return (
        TensorRow(f"{source}.gate_proj.weight", f"{target}.gate.weight", f"{ADAPTER}, {OUT}", repeat),
        TensorRow(f"{source}.up_proj.weight", f"{target}.up.weight", f"{ADAPTER}, {OUT}", repeat),
        TensorRow(f"{source}.down_proj.weight", f"{target}.down.weight", f"{HIDDEN}, {ADAPTER}", repeat),
    )


TENSORS = (
    *_affine("audio_encoder.conv1", "enc.conv1", f"{CONV}, 1, 3, 3", CONV),
    *_affine("audio_encoder.conv2", "enc.conv2", f"{CONV}, {CONV}, 3, 3", CONV),
    *_affine("audio_encoder.conv3", "enc.conv3", f"{CONV}, {CONV}, 3, 3", CONV),
    *_affine("audio_encoder.stem_proj", "enc.stem_proj", f"{D}, {CONV}*enc.num_mel_bins/enc.downsample_rate", D),
    *_encoder_layer("self_attn_layer_norm", "attn_norm", D, D),
    *_encoder_layer("self_attn.q_proj", "attn.q", f"{D}, {D}", D),
    TensorRow(  # the one projection without a bias
        "audio_encoder.layers.{n}.self_attn.k_proj.weight",
        "enc.blk.{n}.attn.k.weight",
        f"{D}, {D}",
        "enc.encoder_layers",
    ),
    *_encoder_layer("self_attn.v_proj", "attn.v", f"{D}, {D}", D),
    *_encoder_layer("self_attn.out_proj", "attn.o", f"{D}, {D}", D),
    *_encoder_layer("final_layer_norm", "ffn_norm", D, D),
    *_encoder_layer("fc1", "ffn.fc1", f"{FF}, {D}", FF),
    *_encoder_layer("fc2", "ffn.fc2", f"{D}, {FF}", D),
    *_affine("audio_encoder.layer_norm", "enc.norm", D, D),
    TensorRow("audio_encoder.out_proj.weight", "enc.out_proj.weight", f"{OUT}, {D}", when="out_proj"),
    *_gated_mlp("audio_adapter", "adapter"),
    *_gated_mlp("deepstack_audio_merger_list.{n}", "deepstack.{n}", "deepstack.num_inject_layers"),
    TensorRow("language_model.embed_tokens.weight", "llm.embed.weight", f"{VOCAB}, {HIDDEN}"),
    _decoder_layer("input_layernorm", "attn_norm", HIDDEN),
    _decoder_layer("self_attn.q_proj", "attn.q", f"{Q_WIDTH}, {HIDDEN}"),
    _decoder_layer("self_attn.k_proj", "attn.k", f"{KV_WIDTH}, {HIDDEN}"),
    _decoder_layer("self_attn.v_proj", "attn.v", f"{KV_WIDTH}, {HIDDEN}"),
    _decoder_layer("self_attn.o_proj", "attn.o", f"{HIDDEN}, {Q_WIDTH}"),
    _decoder_layer("self_attn.q_norm", "attn.q_norm", "llm.head_dim"),
    _decoder_layer("self_attn.k_norm", "attn.k_norm", "llm.head_dim"),
    _decoder_layer("post_attention_layernorm", "ffn_norm", HIDDEN),
    _decoder_layer("mlp.gate_proj", "ffn.gate", f"llm.intermediate_size, {HIDDEN}"),
    _decoder_layer("mlp.up_proj", "ffn.up", f"llm.intermediate_size, {HIDDEN}"),
    _decoder_layer("mlp.down_proj", "ffn.down", f"{HIDDEN}, llm.intermediate_size"),
    TensorRow("language_model.norm.weight", "llm.final_norm.weight", HIDDEN),
    TensorRow("lm_head.weight", "llm.lm_head.weight", f"{VOCAB}, {HIDDEN}", when="untied"),
)

# Constants of the front end that published files carry; computed, found in no checkpoint.
DERIVED = (("audio.mel_filters", "201, enc.num_mel_bins"), ("audio.mel_window", "400"))

DROPS = (
    Drop(r"lm_head\.weight", "tied to the embedding, which is used in its place", when="tied"),
    Drop(r"language_model\.rotary_emb\.inv_freq", "computed from rope_theta"),
    Drop(r"audio_encoder\.embed_positions\.inv_timescales", "computed from d_model"),
)
