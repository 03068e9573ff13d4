"""Granite: Llama with a factor on embeddings, scores, residuals and logits."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import Family, read_gated_model, read_heads
from models.checkpoints.families.llama import LLAMA_NAMES
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import ModelConfig
from models.errors import ConfigError


def _parse(fields: ConfigFields) -> ModelConfig:
    heads = read_heads(fields)
    max_positions = fields.integer("max_position_embeddings", 2048)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions)
    scale = fields.number("attention_multiplier", 1.0)
    divisor = fields.number("logits_scaling", 1.0)
    if divisor == 0:
        raise ConfigError("logits_scaling", divisor, "not 0")
    bias = fields.flag("attention_bias", False)
    return read_gated_model(
        fields,
        "granite",
        (dataclasses.replace(heads, rope=rope, scale=scale),) * fields.count("num_hidden_layers"),
        max_position_embeddings=longest_context(rope, max_positions),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / divisor,
    )


GRANITE = Family(parse=_parse, names=lambda config: LLAMA_NAMES)
