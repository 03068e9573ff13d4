"""gpt-oss: learned sinks, every other layer with a window, a mixture of experts."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import (
    Family,
    read_gated_model,
    read_heads,
    read_layer_types,
)
from models.checkpoints.families.llama import LLAMA_NAMES
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope, rope_settings
from models.config import ModelConfig
from models.errors import ConfigError

_NAMES = NameMap(
    model=LLAMA_NAMES.model,
    layer={
        **LLAMA_NAMES.layer,
        "attention.sinks": source("self_attn.sinks"),
        "mlp.router": source("mlp.router"),
        "mlp.up_weight": source("mlp.experts.gate_up_proj"),
        "mlp.up_bias": source("mlp.experts.gate_up_proj_bias"),
        "mlp.down_weight": source("mlp.experts.down_proj"),
        "mlp.down_bias": source("mlp.experts.down_proj_bias"),
    },
    layer_prefix=LLAMA_NAMES.layer_prefix,
)
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _parse(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_unless("swiglu_alpha", 1.702)
    num_layers = fields.count("num_hidden_layers")
    window = fields.integer_or_none("sliding_window", 128)
    types = read_layer_types(fields, num_layers, slides=lambda index: index % 2 == 0)
    if any(types) and window is None:
        raise ConfigError("sliding_window", None, "a number for the layers that slide")
    num_experts = fields.integer("num_local_experts", 128)
    num_picked = fields.integer("num_experts_per_tok", 4)
    if not 1 <= num_picked <= num_experts:
        raise ConfigError("num_experts_per_tok", num_picked, f"1 to {num_experts}")
    heads = read_heads(fields, num_kv_heads=8, head_dim=64)
    max_positions = fields.integer("max_position_embeddings", 131_072)
    has_rope = "rope_parameters" in fields or "rope_scaling" in fields
    rope = read_rope(
        fields,
        head_dim=heads.head_dim,
        max_positions=max_positions,
        settings=rope_settings(fields) if has_rope else ConfigFields(_DEFAULT_ROPE),
        theta=150_000.0,
    )
    heads = dataclasses.replace(heads, rope=rope, learned_sinks=True)
    bias = fields.flag("attention_bias", True)
    return read_gated_model(
        fields,
        "gpt_oss",
        tuple(dataclasses.replace(heads, window=window if slides else None) for slides in types),
        max_position_embeddings=longest_context(rope, max_positions),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        output_bias=bias,
        num_experts=num_experts,
        num_experts_per_token=num_picked,
        swiglu_limit=fields.number("swiglu_limit", 7.0),
    )


GPT_OSS = Family(parse=_parse, names=lambda config: _NAMES)
