"""Phi 1 and 2 (parallel layers, partly rotated heads, biases) and Phi 3 (Llama with fused
projections and two lists of rotary divisors)."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import (
    ACTIVATIONS,
    Family,
    read_gated_model,
    read_heads,
    read_model,
    refuse_layer_types,
)
from models.checkpoints.families.llama import LLAMA_NAMES
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import ModelConfig
from models.errors import ConfigError
from models.positions import LongRopeScaling

_PHI_NAMES = NameMap(
    model={
        "embed_tokens": source("model.embed_tokens"),
        "final_norm": source("model.final_layernorm"),
        "lm_head": source("lm_head"),
    },
    layer={
        "attention_norm": source("input_layernorm"),
        "attention.qkv": source("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": source("self_attn.dense"),
        "mlp.up": source("mlp.fc1"),
        "mlp.down": source("mlp.fc2"),
    },
    layer_prefix="model.layers.{layer}.",
)
_PHI3_NAMES = NameMap(
    model=LLAMA_NAMES.model,
    layer={
        **LLAMA_NAMES.layer,
        "attention.qkv": source("self_attn.qkv_proj"),
        "mlp.up": source("mlp.gate_up_proj"),
    },
    layer_prefix=LLAMA_NAMES.layer_prefix,
)


def _parse_phi(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("qk_layernorm", False)
    # The projection to the vocabulary has a bias of its own, which tied ones do not.
    fields.refuse_unless("tie_word_embeddings", False)
    heads = read_heads(fields)
    max_positions = fields.integer("max_position_embeddings", 2048)
    rope = read_rope(fields, head_dim=heads.head_dim, max_positions=max_positions, share=0.5)
    return read_model(
        fields,
        "phi",
        (dataclasses.replace(heads, rope=rope),) * fields.count("num_hidden_layers"),
        tied=False,
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=longest_context(rope, max_positions),
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        parallel=True,
        shared_norm=True,
        lm_head_bias=True,
    )


def _parse_phi3(fields: ConfigFields) -> ModelConfig:
    num_layers = fields.count("num_hidden_layers")
    window = fields.integer_or_none("sliding_window", None)
    refuse_layer_types(fields, num_layers, slides=window is not None)
    fields.refuse_unless("attention_bias", False)
    heads = read_heads(fields)
    max_positions = fields.integer("max_position_embeddings", 4096)
    rope = read_rope(
        fields,
        head_dim=heads.head_dim,
        max_positions=max_positions,
        share=1.0,
        original_length=4096,
        # Old exports call their two lists of divisors so.
        old_kinds={"su": "longrope", "yarn": "longrope"},
    )
    if not isinstance(rope.scaling, LongRopeScaling | None):
        raise ConfigError("rope_scaling", type(rope.scaling).__name__, "longrope or null")
    return read_gated_model(
        fields,
        "phi3",
        (dataclasses.replace(heads, rope=rope, window=window),) * num_layers,
        max_position_embeddings=longest_context(rope, max_positions),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
    )


PHI = Family(parse=_parse_phi, names=lambda config: _PHI_NAMES)
PHI3 = Family(parse=_parse_phi3, names=lambda config: _PHI3_NAMES)
