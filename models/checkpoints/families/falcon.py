"""Falcon: 7B (multi-query), 40B and 11B (grouped-query) and RefinedWeb (ALiBi)."""

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import ACTIVATIONS, Family, even_head_dim, read_model
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError
from models.positions import Alibi, alibi_slopes


def _parse(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("apply_residual_connection_post_layernorm", False)
    hidden = fields.spelling("n_embed", "hidden_size")
    head_dim = even_head_dim(fields, hidden=hidden)
    num_heads = fields.count("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings", 2048)
    parallel, shared_norm = _read_layout(fields)
    alibi, rope, longest = None, None, max_positions
    if fields.flag("alibi", False):
        alibi = Alibi(alibi_slopes(num_heads), before_scale=True, bfloat16=True)
    else:
        rope = read_rope(fields, head_dim=head_dim, max_positions=max_positions)
        longest = longest_context(rope, max_positions)
    heads = HeadConfig(
        num_heads, _read_kv_heads(fields, num_heads), head_dim, rope=rope, alibi=alibi
    )
    bias = fields.flag("bias", False)
    return read_model(
        fields,
        "falcon",
        (heads,) * fields.count("num_hidden_layers"),
        tied=True,
        hidden=hidden,
        intermediate_size=fields.integer("ffn_hidden_size", 4 * fields.integer(hidden)),
        max_position_embeddings=longest,
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation", ACTIVATIONS, "gelu"),
        gated_mlp=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        parallel=parallel,
        shared_norm=shared_norm,
    )


def _read_kv_heads(fields: ConfigFields, num_heads: int) -> int:
    multi_query = fields.flag("multi_query", True)  # of the older architecture only
    if fields.flag("new_decoder_architecture", False):
        return fields.integer("num_kv_heads", num_heads)
    if multi_query:
        return 1
    fields.refuse_unless("num_kv_heads", num_heads)
    return num_heads


def _read_layout(fields: ConfigFields) -> tuple[bool, bool]:
    """Whether layers are parallel, and whether both halves then share a norm."""
    parallel = fields.flag("parallel_attn", True)
    if not fields.flag("new_decoder_architecture", False):
        fields.refuse_unless("num_ln_in_parallel_attn", 1)
        return parallel, parallel
    if not parallel:
        raise ConfigError("parallel_attn", False, "true with new_decoder_architecture")
    num_norms = fields.integer("num_ln_in_parallel_attn", 2)
    if num_norms not in (1, 2):
        raise ConfigError("num_ln_in_parallel_attn", num_norms, "1 or 2")
    return parallel, num_norms == 1


def _names(config: ModelConfig) -> NameMap:
    two_norms = config.parallel and not config.shared_norm
    return NameMap(
        model={
            "embed_tokens": source("word_embeddings"),
            "final_norm": source("ln_f"),
            "lm_head": source("lm_head"),
        },
        layer={
            "attention_norm": source("ln_attn" if two_norms else "input_layernorm"),
            "mlp_norm": source("ln_mlp" if two_norms else "post_attention_layernorm"),
            # A single group is all queries, the key, the value: the same as ungrouped.
            "attention.qkv": source("self_attention.query_key_value", grouped=True),
            "attention.output": source("self_attention.dense"),
            "mlp.up": source("mlp.dense_h_to_4h"),
            "mlp.down": source("mlp.dense_4h_to_h"),
        },
        layer_prefix="h.{layer}.",
    )


FALCON = Family(
    parse=_parse,
    names=_names,
    prefix="transformer.",
    ignored=("*.rotary_emb.inv_freq", "*.maybe_rotary.inv_freq"),
)
