"""Llama 2 and 3, and the many that share its layout."""

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import ACTIVATIONS, Family, read_head_dim
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import HeadConfig, ModelConfig

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
        "attention.output": source("self_attn.o_proj"),
        "mlp.up": source("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": source("mlp.down_proj"),
    },
    layer_prefix="model.layers.{layer}.",
)


def parse_llama(fields: ConfigFields) -> ModelConfig:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    head_dim = read_head_dim(fields, hidden_size, num_heads, name="num_attention_heads")
    num_layers = fields.integer("num_hidden_layers")
    fields.refuse_unless("sliding_window")
    fields.refuse_unless("layer_types", ["full_attention"] * num_layers)
    rope = read_rope(fields, head_dim=head_dim)
    heads = HeadConfig(
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rope=rope,
    )
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        layers=(heads,) * num_layers,
        max_position_embeddings=longest_context(
            fields, rope, fields.integer("max_position_embeddings", 2048)
        ),
        norm="rms_norm",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        gated_mlp=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=fields.dtype(),
    )


LLAMA = Family(parse=parse_llama, names=lambda config: LLAMA_NAMES)
