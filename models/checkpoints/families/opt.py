"""OPT: learned positions from row 2 on, norms before or behind, sometimes narrow embeddings."""

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import ACTIVATIONS, Family, even_head_dim, read_model
from models.checkpoints.names import NameMap, source
from models.config import HeadConfig, ModelConfig

_POSITION_OFFSET = 2
_NAMES = NameMap(
    model={
        "embed_tokens": source("decoder.embed_tokens"),
        "embed_projection": source("decoder.project_in"),
        "embed_positions": source("decoder.embed_positions"),
        "final_norm": source("decoder.final_layer_norm"),
        "output_projection": source("decoder.project_out"),
        "lm_head": source("lm_head"),
    },
    layer={
        "attention_norm": source("self_attn_layer_norm"),
        "mlp_norm": source("final_layer_norm"),
        "attention.qkv": source("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": source("self_attn.out_proj"),
        "mlp.up": source("fc1"),
        "mlp.down": source("fc2"),
    },
    layer_prefix="decoder.layers.{layer}.",
)


def _parse(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("layer_norm_elementwise_affine", True)
    head_dim = even_head_dim(fields)
    num_heads, hidden_size = fields.count("num_attention_heads"), fields.integer("hidden_size")
    num_positions = fields.integer("max_position_embeddings", 2048)
    embedding_size = fields.integer("word_embed_proj_dim", hidden_size)
    norm_before = fields.flag("do_layer_norm_before", True)
    bias = fields.flag("enable_bias", True)
    return read_model(
        fields,
        "opt",
        (HeadConfig(num_heads, num_heads, head_dim),) * fields.count("num_hidden_layers"),
        tied=True,
        intermediate_size=fields.integer("ffn_dim"),
        max_position_embeddings=num_positions,
        learned_positions=num_positions + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        embedding_size=None if embedding_size == hidden_size else embedding_size,
        norm="layer_norm",
        norm_eps=1e-5,
        residual="pre_norm" if norm_before else "post_norm",
        final_norm=norm_before and not fields.flag("_remove_final_layer_norm", False),
        activation=fields.choice("activation_function", ACTIVATIONS, "relu"),
        gated_mlp=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


OPT = Family(parse=_parse, names=lambda config: _NAMES, prefix="model.")
