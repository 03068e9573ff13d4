"""BLOOM and MPT: sequential layers that know positions by linear biases only."""

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import Family, even_head_dim, read_model
from models.checkpoints.names import NameMap, source
from models.config import HeadConfig, ModelConfig
from models.positions import Alibi, alibi_slopes, mpt_alibi_slopes

_BLOOM_NAMES = NameMap(
    model={
        "embed_tokens": source("word_embeddings"),
        "embed_norm": source("word_embeddings_layernorm"),
        "final_norm": source("ln_f"),
        "lm_head": source("lm_head"),
    },
    layer={
        "attention_norm": source("input_layernorm"),
        "mlp_norm": source("post_attention_layernorm"),
        "attention.qkv": source("self_attention.query_key_value", grouped=True),
        "attention.output": source("self_attention.dense"),
        "mlp.up": source("mlp.dense_h_to_4h"),
        "mlp.down": source("mlp.dense_4h_to_h"),
    },
    layer_prefix="h.{layer}.",
)
_MPT_NAMES = NameMap(
    model={
        "embed_tokens": source("wte"),
        "final_norm": source("norm_f"),
        "lm_head": source("lm_head"),
    },
    layer={
        "attention_norm": source("norm_1"),
        "mlp_norm": source("norm_2"),
        "attention.qkv": source("attn.Wqkv"),
        "attention.output": source("attn.out_proj"),
        "mlp.up": source("ffn.up_proj"),
        "mlp.down": source("ffn.down_proj"),
    },
    layer_prefix="blocks.{layer}.",
)


def _parse_bloom(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("apply_residual_connection_post_layernorm", False)
    hidden = fields.spelling("n_embed", "hidden_size")
    heads_field = fields.spelling("n_head", "num_attention_heads")
    head_dim = even_head_dim(fields, hidden=hidden, heads=heads_field)
    num_heads = fields.count(heads_field)
    heads = HeadConfig(num_heads, num_heads, head_dim, alibi=Alibi(alibi_slopes(num_heads)))
    num_layers = fields.count(fields.spelling("n_layer", "num_hidden_layers"))
    return read_model(
        fields,
        "bloom",
        (heads,) * num_layers,
        tied=True,
        hidden=hidden,
        intermediate_size=4 * fields.integer(hidden),
        # Nothing in the model ends here; it is what the published ones were trained with.
        max_position_embeddings=fields.integer("seq_length", 2048),
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        embedding_norm=True,
    )


def _parse_mpt(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("no_bias", True)
    fields.refuse_unless("expansion_ratio", 4)
    fields.refuse_unless("logit_scale")
    fields.refuse_unless("norm_type", "low_precision_layernorm", "layernorm")
    fields.refuse_unless("ffn_config", {"ffn_type": "mptmlp"})
    hidden = fields.spelling("d_model", "hidden_size")
    heads_field = fields.spelling("n_heads", "num_attention_heads")
    head_dim = even_head_dim(fields, hidden=hidden, heads=heads_field)
    num_layers = fields.count(fields.spelling("n_layers", "num_hidden_layers"))
    heads = _mpt_heads(fields.nested("attn_config"), fields.count(heads_field), head_dim)
    return read_model(
        fields,
        "mpt",
        (heads,) * num_layers,
        tied=True,
        hidden=hidden,
        intermediate_size=4 * fields.integer(hidden),
        max_position_embeddings=fields.integer("max_seq_len", 2048),
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        norm_bias=False,
        activation="gelu",
        gated_mlp=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )


def _mpt_heads(attention: ConfigFields, num_heads: int, head_dim: int) -> HeadConfig:
    attention.refuse_unless("attn_type", "multihead_attention")
    # `alibi: false` would mean learned positions, and more than one key/value head count or a
    # window is of models that share the name only.
    attention.refuse_unless("alibi", True)
    for name in ("qk_ln", "qk_gn", "prefix_lm", "attn_uses_sequence_id", "rope"):
        attention.refuse_unless(name, False)
    attention.refuse_unless("kv_n_heads", num_heads)
    attention.refuse_unless("sliding_window_size", -1)
    # transformers computes with 8 whatever the field says, so nothing else can be compared.
    attention.refuse_unless("alibi_bias_max", 8)
    return HeadConfig(
        num_heads,
        num_heads,
        head_dim,
        scale=attention.number_or_none("softmax_scale", None),
        # 0 switches the clamp off.
        clip_qkv=attention.number_or_none("clip_qkv", None) or None,
        alibi=Alibi(mpt_alibi_slopes(num_heads, bias_max=8)),
    )


BLOOM = Family(parse=_parse_bloom, names=lambda config: _BLOOM_NAMES, prefix="transformer.")
MPT = Family(parse=_parse_mpt, names=lambda config: _MPT_NAMES, prefix="transformer.")
