"""Gemma 1, 2 and 3 (its text part): norms of 1 + weight, scaled embeddings, wide heads."""

import dataclasses
from typing import Any

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import (
    ACTIVATIONS,
    Family,
    read_gated_model,
    read_heads,
    read_layer_types,
)
from models.checkpoints.families.llama import LLAMA_NAMES
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import HeadConfig, ModelConfig, QKNorm
from models.errors import ConfigError
from models.positions import RopeConfig

_SANDWICH_NAMES = NameMap(
    model=LLAMA_NAMES.model,
    layer={
        **LLAMA_NAMES.layer,
        "attention_output_norm": source("post_attention_layernorm"),
        "mlp_norm": source("pre_feedforward_layernorm"),
        "mlp_output_norm": source("post_feedforward_layernorm"),
    },
    layer_prefix=LLAMA_NAMES.layer_prefix,
)


def _parse_gemma(fields: ConfigFields) -> ModelConfig:
    # Early exports say `gelu` and mean the approximation by tanh.
    fields.refuse_unless("hidden_activation", "gelu_pytorch_tanh", "gelu")
    activation = fields.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
    heads = read_heads(fields, num_kv_heads=16, head_dim=256)
    max_positions = fields.integer("max_position_embeddings", 8192)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions)
    return _gemma(
        fields,
        "gemma",
        (dataclasses.replace(heads, rope=rope),) * fields.count("num_hidden_layers"),
        activation="gelu_tanh" if activation == "gelu" else activation,
        max_position_embeddings=longest_context(rope, max_positions),
    )


def _parse_gemma2(fields: ConfigFields) -> ModelConfig:
    num_layers = fields.count("num_hidden_layers")
    heads = _gemma2_heads(fields, softcap=50.0)
    max_positions = fields.integer("max_position_embeddings", 8192)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions)
    types = read_layer_types(fields, num_layers, slides=lambda index: index % 2 == 0)
    return _gemma(
        fields,
        "gemma2",
        _windowed(fields, dataclasses.replace(heads, rope=rope), types),
        max_position_embeddings=longest_context(rope, max_positions),
        **_gemma2_settings(fields, softcap=30.0),
    )


def _parse_gemma3(fields: ConfigFields) -> ModelConfig:
    num_layers = fields.count("num_hidden_layers")
    norm = QKNorm("rms_norm", "head", eps=fields.number("rms_norm_eps", 1e-6), unit_offset=True)
    heads = dataclasses.replace(_gemma2_heads(fields, softcap=None), qk_norm=norm)
    pattern = fields.integer("sliding_window_pattern", 6)
    if pattern < 1:
        raise ConfigError("sliding_window_pattern", pattern, "1 or more")
    types = read_layer_types(fields, num_layers, slides=lambda index: (index + 1) % pattern != 0)
    max_positions = fields.integer("max_position_embeddings", 131_072)
    full, sliding = _gemma3_ropes(fields, heads.head_dim, max_positions)
    windowed = _windowed(fields, heads, types)
    return _gemma(
        fields,
        "gemma3_text",
        tuple(
            dataclasses.replace(layer, rope=sliding if slides else full)
            for layer, slides in zip(windowed, types, strict=True)
        ),
        # Checkpoints of this family write the stretched length.
        max_position_embeddings=max_positions,
        **_gemma2_settings(fields, softcap=None),
    )


def _gemma3_ropes(
    fields: ConfigFields, head_dim: int, max_positions: int
) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of full and of sliding layers, which the newer dialect nests by type."""
    nested = fields.nested("rope_parameters")
    nested.refuse_others("full_attention", "sliding_attention")
    if "rope_scaling" in fields and "full_attention" in nested:
        fields.refuse_unless("rope_scaling")
    full = read_rope(
        fields,
        head_dim=head_dim,
        max_positions=max_positions,
        settings=(
            fields.nested("rope_scaling")
            if "rope_scaling" in fields
            else nested.nested("full_attention")
        ),
        theta=1_000_000.0,
    )
    sliding = read_rope(
        fields,
        head_dim=head_dim,
        max_positions=max_positions,
        settings=nested.nested("sliding_attention"),
        theta_field="rope_local_base_freq",
    )
    return full, sliding


def _gemma2_heads(fields: ConfigFields, *, softcap: float | None) -> HeadConfig:
    heads = read_heads(fields, num_kv_heads=4, head_dim=256)
    scalar = fields.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        raise ConfigError("query_pre_attn_scalar", scalar, "more than 0")
    return dataclasses.replace(
        heads,
        scale=scalar**-0.5,
        softcap=fields.number_or_none("attn_logit_softcapping", softcap),
    )


def _gemma2_settings(fields: ConfigFields, *, softcap: float | None) -> dict[str, Any]:
    return {
        "activation": fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "residual": "sandwich_norm",
        "logit_softcap": fields.number_or_none("final_logit_softcapping", softcap),
    }


def _windowed(
    fields: ConfigFields, heads: HeadConfig, types: tuple[bool, ...]
) -> tuple[HeadConfig, ...]:
    window = fields.integer_or_none("sliding_window", 4096)
    if any(types) and window is None:
        raise ConfigError("sliding_window", None, "a number for the layers that slide")
    return tuple(dataclasses.replace(heads, window=window if slides else None) for slides in types)


def _gemma(
    fields: ConfigFields, family: str, layers: tuple[HeadConfig, ...], **settings: Any
) -> ModelConfig:
    fields.refuse_unless("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias", False)
    hidden_size = fields.integer("hidden_size")
    if hidden_size < 1:
        raise ConfigError("hidden_size", hidden_size, "1 or more")
    return read_gated_model(
        fields,
        family,
        layers,
        tied=True,
        norm_unit_offset=True,
        embedding_scale=hidden_size**0.5,
        qkv_bias=bias,
        output_bias=bias,
        **settings,
    )


GEMMA = Family(parse=_parse_gemma, names=lambda config: LLAMA_NAMES)
GEMMA2 = Family(parse=_parse_gemma2, names=lambda config: _SANDWICH_NAMES)
GEMMA3 = Family(parse=_parse_gemma3, names=lambda config: _SANDWICH_NAMES)
