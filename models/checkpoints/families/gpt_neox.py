"""GPT-NeoX and GPT-J of EleutherAI: parallel layers with partly rotated heads."""

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import ACTIVATIONS, Family, even_head_dim, read_model
from models.checkpoints.names import NameMap, source
from models.checkpoints.rope_fields import longest_context, read_rope
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError
from models.positions import RopeConfig

_NEOX_NAMES = NameMap(
    model={
        "embed_tokens": source("gpt_neox.embed_in"),
        "final_norm": source("gpt_neox.final_layer_norm"),
        "lm_head": source("embed_out"),
    },
    layer={
        "attention_norm": source("input_layernorm"),
        "mlp_norm": source("post_attention_layernorm"),
        "attention.qkv": source("attention.query_key_value", grouped=True),
        "attention.output": source("attention.dense"),
        "mlp.up": source("mlp.dense_h_to_4h"),
        "mlp.down": source("mlp.dense_4h_to_h"),
    },
    layer_prefix="gpt_neox.layers.{layer}.",
)
_GPTJ_NAMES = NameMap(
    model={
        "embed_tokens": source("transformer.wte"),
        "final_norm": source("transformer.ln_f"),
        "lm_head": source("lm_head"),
    },
    layer={
        "attention_norm": source("ln_1"),
        "attention.qkv": source("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "attention.output": source("attn.out_proj"),
        "mlp.up": source("mlp.fc_in"),
        "mlp.down": source("mlp.fc_out"),
    },
    layer_prefix="transformer.h.{layer}.",
)


def _parse_neox(fields: ConfigFields) -> ModelConfig:
    head_dim = even_head_dim(fields)
    num_heads = fields.count("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings", 2048)
    rope = read_rope(
        fields,
        head_dim=head_dim,
        max_positions=max_positions,
        theta_field="rotary_emb_base",
        share=0.25,
        share_field="rotary_pct",
    )
    # Names of other families; here they are not what the model is computed with.
    fields.refuse_unless("rope_theta", rope.theta)
    fields.refuse_unless("partial_rotary_factor", rope.rotary_dim / head_dim)
    bias = fields.flag("attention_bias", True)
    heads = HeadConfig(num_heads, num_heads, head_dim, rope=rope)
    return read_model(
        fields,
        "gpt_neox",
        (heads,) * fields.count("num_hidden_layers"),
        tied=False,
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=longest_context(rope, max_positions),
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated_mlp=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        parallel=fields.flag("use_parallel_residual", True),
    )


def _parse_gptj(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("rotary", True)
    # The projection to the vocabulary has a bias of its own, which tied ones do not.
    fields.refuse_unless("tie_word_embeddings", False)
    hidden = fields.spelling("n_embd", "hidden_size")
    heads_field = fields.spelling("n_head", "num_attention_heads")
    head_dim = even_head_dim(fields, hidden=hidden, heads=heads_field)
    rotary_dim = fields.integer_or_none("rotary_dim", 64)
    if rotary_dim is None:
        raise ConfigError("rotary_dim", None, f"2 to head_dim={head_dim}")
    num_heads = fields.count(heads_field)
    rope = RopeConfig(10_000.0, rotary_dim, interleaved=True)
    heads = HeadConfig(num_heads, num_heads, head_dim, rope=rope)
    num_layers = fields.count(fields.spelling("n_layer", "num_hidden_layers"))
    return read_model(
        fields,
        "gptj",
        (heads,) * num_layers,
        tied=False,
        hidden=hidden,
        intermediate_size=fields.integer("n_inner", 4 * fields.integer(hidden)),
        max_position_embeddings=fields.integer(
            fields.spelling("n_positions", "max_position_embeddings"), 2048
        ),
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=True,
        parallel=True,
        shared_norm=True,
        lm_head_bias=True,
    )


GPT_NEOX = Family(
    parse=_parse_neox,
    names=lambda config: _NEOX_NAMES,
    ignored=("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias"),
)
GPTJ = Family(
    parse=_parse_gptj,
    names=lambda config: _GPTJ_NAMES,
    ignored=("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions"),
)
