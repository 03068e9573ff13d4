"""Llama 2 and 3 and what is closest to them: Mistral, Qwen2, Qwen3."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import (
    Family,
    read_gated_model,
    read_heads,
    read_layer_types,
    refuse_layer_types,
)
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import HeadConfig, ModelConfig, QKNorm
from models.errors import ConfigError

LLAMA_NAMES = NameMap(
    model={
        "embed_tokens": source("model.embed_tokens"),
        "final_norm": source("model.norm"),
        "lm_head": source("lm_head"),
    },
    layer={
        "attention_norm": source("input_layernorm"),
        "mlp_norm": source("post_attention_layernorm"),
        "attention.qkv": source("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.query_norm": source("self_attn.q_norm"),
        "attention.key_norm": source("self_attn.k_norm"),
        "attention.output": source("self_attn.o_proj"),
        "mlp.up": source("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": source("mlp.down_proj"),
    },
    layer_prefix="model.layers.{layer}.",
)


def _parse_llama(fields: ConfigFields) -> ModelConfig:
    num_layers = fields.count("num_hidden_layers")
    fields.refuse_unless("sliding_window")
    refuse_layer_types(fields, num_layers)
    heads = read_heads(fields)
    max_positions = fields.integer("max_position_embeddings", 2048)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions)
    attention_bias = fields.flag("attention_bias", False)
    return read_gated_model(
        fields,
        "llama",
        (dataclasses.replace(heads, rope=rope),) * num_layers,
        max_position_embeddings=longest_context(rope, max_positions),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _parse_mistral(fields: ConfigFields) -> ModelConfig:
    num_layers = fields.count("num_hidden_layers")
    window = fields.integer_or_none("sliding_window", 4096)
    refuse_layer_types(fields, num_layers, slides=window is not None)
    fields.refuse_unless("attention_bias", False)
    heads = read_heads(fields, num_kv_heads=8)
    max_positions = fields.integer("max_position_embeddings", 131_072)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions)
    return read_gated_model(
        fields,
        "mistral",
        (dataclasses.replace(heads, rope=rope, window=window),) * num_layers,
        max_position_embeddings=longest_context(rope, max_positions),
    )


def _parse_qwen2(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("use_mrope", False)
    fields.refuse_unless("dual_chunk_attention_config")
    return _parse_qwen(fields, "qwen2", read_heads(fields, num_kv_heads=32), qkv_bias=True)


def _parse_qwen3(fields: ConfigFields) -> ModelConfig:
    heads = read_heads(fields, num_kv_heads=32, head_dim=128)
    norm = QKNorm("rms_norm", "head", eps=fields.number("rms_norm_eps", 1e-6))
    bias = fields.flag("attention_bias", False)
    return _parse_qwen(
        fields,
        "qwen3",
        dataclasses.replace(heads, qk_norm=norm),
        qkv_bias=bias,
        output_bias=bias,
    )


def _parse_qwen(
    fields: ConfigFields, family: str, heads: HeadConfig, **biases: bool
) -> ModelConfig:
    num_layers = fields.count("num_hidden_layers")
    window = fields.integer_or_none("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    first_sliding = fields.integer("max_window_layers", 28)
    types = read_layer_types(
        fields, num_layers, slides=lambda index: window is not None and index >= first_sliding
    )
    if any(types) and window is None:
        raise ConfigError(
            "layer_types", "sliding_attention", "full_attention without use_sliding_window"
        )
    max_positions = fields.integer("max_position_embeddings", 32_768)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions)
    return read_gated_model(
        fields,
        family,
        tuple(
            dataclasses.replace(heads, rope=rope, window=window if slides else None)
            for slides in types
        ),
        max_position_embeddings=longest_context(rope, max_positions),
        **biases,
    )


LLAMA = Family(parse=_parse_llama, names=lambda config: LLAMA_NAMES)
MISTRAL = Family(parse=_parse_mistral, names=lambda config: LLAMA_NAMES)
QWEN2 = Family(parse=_parse_qwen2, names=lambda config: LLAMA_NAMES)
QWEN3 = Family(parse=_parse_qwen3, names=lambda config: LLAMA_NAMES)
