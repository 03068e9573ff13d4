"""GPT-2, whose matrices are stored as [in, out], and GPT-BigCode, its multi-query variant."""

import dataclasses

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import ACTIVATIONS, Family, even_head_dim, read_model
from models.checkpoints.names import NameMap, source
from models.config import HeadConfig, ModelConfig


def _names(*, transposed: bool = False, grouped: bool = False) -> NameMap:
    return NameMap(
        model={
            "embed_tokens": source("wte"),
            "embed_positions": source("wpe"),
            "final_norm": source("ln_f"),
            "lm_head": source("lm_head"),
        },
        layer={
            "attention_norm": source("ln_1"),
            "mlp_norm": source("ln_2"),
            "attention.qkv": source("attn.c_attn", transposed=transposed, grouped=grouped),
            "attention.output": source("attn.c_proj", transposed=transposed),
            "mlp.up": source("mlp.c_fc", transposed=transposed),
            "mlp.down": source("mlp.c_proj", transposed=transposed),
        },
        layer_prefix="h.{layer}.",
    )


_GPT2_NAMES = _names(transposed=True)
_MULTI_QUERY_NAMES, _MULTI_HEAD_NAMES = _names(), _names(grouped=True)


def _parse_gpt2(fields: ConfigFields) -> ModelConfig:
    # `reorder_and_upcast_attn` asks for what is always done here: scores in float32.
    fields.flag("reorder_and_upcast_attn", False)
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
    return _parse(fields, "gpt2", activation="gelu_new", by_layer=by_layer)


def _parse_bigcode(fields: ConfigFields) -> ModelConfig:
    multi_query = fields.flag("multi_query", True)
    return _parse(fields, "gpt_bigcode", activation="gelu_pytorch_tanh", multi_query=multi_query)


def _parse(
    fields: ConfigFields,
    family: str,
    *,
    activation: str,
    by_layer: bool = False,
    multi_query: bool = False,
) -> ModelConfig:
    fields.refuse_unless("add_cross_attention", False)
    hidden = fields.spelling("n_embd", "hidden_size")
    num_heads = fields.spelling("n_head", "num_attention_heads")
    head_dim = even_head_dim(fields, hidden=hidden, heads=num_heads)
    count = fields.count(num_heads)
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    heads = HeadConfig(count, 1 if multi_query else count, head_dim)
    num_positions = fields.integer(fields.spelling("n_positions", "max_position_embeddings"), 1024)
    return read_model(
        fields,
        family,
        tuple(
            dataclasses.replace(heads, scale=scale / (index + 1 if by_layer else 1))
            for index in range(fields.count(fields.spelling("n_layer", "num_hidden_layers")))
        ),
        tied=True,
        hidden=hidden,
        intermediate_size=fields.integer("n_inner", 4 * fields.integer(hidden)),
        max_position_embeddings=num_positions,
        learned_positions=num_positions,
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", ACTIVATIONS, activation),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _bigcode_names(config: ModelConfig) -> NameMap:
    return _MULTI_QUERY_NAMES if config.layers[0].kind == "mqa" else _MULTI_HEAD_NAMES


_IGNORED = ("*.attn.bias", "*.attn.masked_bias")
GPT2 = Family(
    parse=_parse_gpt2,
    names=lambda config: _GPT2_NAMES,
    prefix="transformer.",
    ignored=_IGNORED,
)
GPT_BIGCODE = Family(
    parse=_parse_bigcode, names=_bigcode_names, prefix="transformer.", ignored=_IGNORED
)
