"""GPT-2: learned positions, and matrices that are stored as [in, out]."""

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families.family import ACTIVATIONS, Family
from models.checkpoints.names import NameMap, source
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError

_NAMES = NameMap(
    model={
        "embed_tokens": source("wte"),
        "embed_positions": source("wpe"),
        "final_norm": source("ln_f"),
        "lm_head": source("lm_head"),
    },
    layer={
        "attention_norm": source("ln_1"),
        "mlp_norm": source("ln_2"),
        "attention.qkv": source("attn.c_attn", transposed=True),
        "attention.output": source("attn.c_proj", transposed=True),
        "mlp.up": source("mlp.c_fc", transposed=True),
        "mlp.down": source("mlp.c_proj", transposed=True),
    },
    layer_prefix="h.{layer}.",
)


def _parse(fields: ConfigFields) -> ModelConfig:
    hidden_size = fields.integer("n_embd")
    num_heads, num_layers = fields.integer("n_head"), fields.integer("n_layer")
    if hidden_size < 1:
        raise ConfigError("n_embd", hidden_size, "1 or more")
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError("n_head", num_heads, f"a divisor of n_embd={hidden_size}")
    fields.refuse_unless("add_cross_attention", False)
    head_dim = hidden_size // num_heads
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
    num_positions = fields.integer("n_positions", 1024)
    return ModelConfig(
        family="gpt2",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("n_inner", 4 * hidden_size),
        layers=tuple(
            HeadConfig(
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=head_dim,
                scale=scale / (index + 1 if by_layer else 1),
            )
            for index in range(num_layers)
        ),
        max_position_embeddings=num_positions,
        learned_positions=num_positions,
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=fields.dtype(),
    )


GPT2 = Family(
    parse=_parse,
    names=lambda config: _NAMES,
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)
