"""Cohere Command: parallel layers, norms without bias, interleaved rotation, scaled logits."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import Family, read_gated_model, read_heads
from models.checkpoints.families.llama import LLAMA_NAMES
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import ModelConfig, QKNorm


def _parse(fields: ConfigFields) -> ModelConfig:
    heads = read_heads(fields)
    eps = fields.number("layer_norm_eps", 1e-5)
    normed = fields.flag("use_qk_norm", False)
    max_positions = fields.integer("max_position_embeddings", 8192)
    rope = read_rope(
        fields,
        head_dim=heads.head_dim,
        max_positions=max_positions,
        theta=500_000.0,
        interleaved=True,
    )
    heads = dataclasses.replace(
        heads, rope=rope, qk_norm=QKNorm("layer_norm", "each_head", eps) if normed else None
    )
    bias = fields.flag("attention_bias", False)
    return read_gated_model(
        fields,
        "cohere",
        (heads,) * fields.count("num_hidden_layers"),
        tied=True,
        max_position_embeddings=longest_context(rope, max_positions),
        norm="layer_norm",
        norm_eps=eps,
        norm_bias=False,
        qkv_bias=bias,
        output_bias=bias,
        parallel=True,
        shared_norm=True,
        logit_scale=fields.number("logit_scale", 0.0625),
    )


COHERE = Family(parse=_parse, names=lambda config: LLAMA_NAMES)
