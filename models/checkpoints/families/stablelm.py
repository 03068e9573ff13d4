"""StableLM: layer norms, partly rotated heads, each with a norm of its own where configured."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import Family, even_head_dim, read_gated_model, read_heads
from models.checkpoints.families.llama import LLAMA_NAMES
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import ModelConfig, QKNorm

_NAMES = NameMap(
    model=LLAMA_NAMES.model,
    layer={
        **LLAMA_NAMES.layer,
        "attention.query_norm": source("self_attn.q_layernorm.norms.{head}"),
        "attention.key_norm": source("self_attn.k_layernorm.norms.{head}"),
    },
    layer_prefix=LLAMA_NAMES.layer_prefix,
)


def _parse(fields: ConfigFields) -> ModelConfig:
    even_head_dim(fields)
    heads = read_heads(fields, num_kv_heads=32)
    eps = fields.number("layer_norm_eps", 1e-5)
    normed = fields.flag("qk_layernorm", False)
    max_positions = fields.integer("max_position_embeddings", 4096)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions, share=0.25)
    heads = dataclasses.replace(
        heads, rope=rope, qk_norm=QKNorm("layer_norm", "each_head", eps) if normed else None
    )
    parallel = fields.flag("use_parallel_residual", False)
    return read_gated_model(
        fields,
        "stablelm",
        (heads,) * fields.count("num_hidden_layers"),
        max_position_embeddings=longest_context(rope, max_positions),
        norm="layer_norm",
        norm_eps=eps,
        qkv_bias=fields.flag("use_qkv_bias", False),
        parallel=parallel,
        shared_norm=parallel,
    )


STABLELM = Family(parse=_parse, names=lambda config: _NAMES)
