"""BERT: an encoder, in which every token sees every other; it embeds and does not generate."""

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import ACTIVATIONS, Family, even_head_dim, read_model
from models.checkpoints.names import NameMap, source
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError

_NAMES = NameMap(
    model={
        "embed_tokens": source("embeddings.word_embeddings"),
        "embed_positions": source("embeddings.position_embeddings"),
        "embed_token_types": source("embeddings.token_type_embeddings"),
        "embed_norm": source("embeddings.LayerNorm"),
    },
    layer={
        "attention_norm": source("attention.output.LayerNorm"),
        "mlp_norm": source("output.LayerNorm"),
        "attention.qkv": source(
            "attention.self.query", "attention.self.key", "attention.self.value"
        ),
        "attention.output": source("attention.output.dense"),
        "mlp.up": source("intermediate.dense"),
        "mlp.down": source("output.dense"),
    },
    layer_prefix="encoder.layer.{layer}.",
)


def _parse(fields: ConfigFields) -> ModelConfig:
    fields.refuse_unless("is_decoder", False)
    fields.refuse_unless("add_cross_attention", False)
    fields.refuse_unless("position_embedding_type", "absolute")
    head_dim = even_head_dim(fields)
    num_heads = fields.count("num_attention_heads")
    num_positions = fields.integer("max_position_embeddings", 512)
    num_types = fields.integer("type_vocab_size", 2)
    if num_types < 1:
        raise ConfigError("type_vocab_size", num_types, "1 or more")
    return read_model(
        fields,
        "bert",
        (HeadConfig(num_heads, num_heads, head_dim, causal=False),)
        * fields.count("num_hidden_layers"),
        tied=True,
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=num_positions,
        learned_positions=num_positions,
        num_token_types=num_types,
        embedding_norm=True,
        final_norm=False,
        residual="post_norm",
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


BERT = Family(
    parse=_parse,
    names=lambda config: _NAMES,
    prefix="bert.",
    # What stands on top of the encoder is not served.
    ignored=("embeddings.position_ids", "pooler.*", "cls.*"),
    old_endings=((".gamma", ".weight"), (".beta", ".bias")),
)
