"""OLMo 2: norms behind each half of a layer, and over all queries and all keys together."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import Family, read_gated_model, read_heads
from models.checkpoints.families.llama import LLAMA_NAMES
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import ModelConfig, QKNorm

_NAMES = NameMap(
    model=LLAMA_NAMES.model,
    layer={
        **LLAMA_NAMES.layer,
        "attention_norm": source("post_attention_layernorm"),
        "mlp_norm": source("post_feedforward_layernorm"),
    },
    layer_prefix=LLAMA_NAMES.layer_prefix,
)


def _parse(fields: ConfigFields) -> ModelConfig:
    heads = read_heads(fields)
    eps = fields.number("rms_norm_eps", 1e-5)
    max_positions = fields.integer("max_position_embeddings", 2048)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions)
    heads = dataclasses.replace(heads, rope=rope, qk_norm=QKNorm("rms_norm", "all_heads", eps))
    bias = fields.flag("attention_bias", False)
    return read_gated_model(
        fields,
        "olmo2",
        (heads,) * fields.count("num_hidden_layers"),
        max_position_embeddings=longest_context(rope, max_positions),
        norm_eps=eps,
        residual="output_norm",
        qkv_bias=bias,
        output_bias=bias,
    )


OLMO2 = Family(parse=_parse, names=lambda config: _NAMES)
