"""The model families: for each, how its config.json reads and which tensors hold what.

A family is two functions of data: fields to `ModelConfig`, and `ModelConfig` to the list of
checkpoint tensors that make up each of our parameters. Adding a family adds no class.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from models.checkpoints.config_json import ConfigFields
from models.config import Activation, HeadConfig, ModelConfig
from models.errors import ConfigError

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint tensor: its name, its shape there, and whether it is stored transposed."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """How one model family is written down.

    Attributes:
        parse: config.json fields to `ModelConfig`.
        tensors: our parameter name and the pieces that, joined along their rows, make it up.
        prefix: a leading name that some exporters write and others leave out.
        ignored: endings of tensors that old exporters wrote and nothing needs.
    """

    parse: Callable[[ConfigFields], ModelConfig]
    tensors: Callable[[ModelConfig], Iterator[tuple[str, tuple[Piece, ...]]]]
    prefix: str
    ignored: tuple[str, ...]


def _parse_llama(fields: ConfigFields) -> ModelConfig:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    if num_heads < 1:
        raise ConfigError("num_attention_heads", num_heads, "1 or more")
    if "head_dim" not in fields and hidden_size % num_heads:
        raise ConfigError(
            "num_attention_heads", num_heads, f"a divisor of hidden_size={hidden_size}"
        )
    fields.refuse_unless("sliding_window")
    fields.refuse_unless("layer_types", ["full_attention"] * fields.integer("num_hidden_layers"))
    heads = HeadConfig(
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
    )
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        layers=(heads,) * fields.integer("num_hidden_layers"),
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        norm="rms_norm",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", _ACTIVATIONS, "silu"),
        gated_mlp=True,
        rope_theta=fields.rope_theta(default=10_000.0),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=fields.dtype(),
    )


def _llama_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    yield "embed_tokens.weight", (Piece("model.embed_tokens.weight", (config.vocab_size, hidden)),)
    yield "final_norm.weight", (Piece("model.norm.weight", (hidden,)),)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (Piece("lm_head.weight", (config.vocab_size, hidden)),)
    for index, heads in enumerate(config.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        queries, keys = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        for name, source in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            yield f"{ours}.{name}.weight", (Piece(f"{theirs}.{source}.weight", (hidden,)),)
        products = (
            ("attention.qkv", "self_attn", ("q_proj", "k_proj", "v_proj"), (queries, keys, keys),
             hidden, config.qkv_bias),
            ("attention.output", "self_attn", ("o_proj",), (hidden,), queries, config.output_bias),
            ("mlp.up", "mlp", ("gate_proj", "up_proj"), (wide, wide), hidden, config.mlp_bias),
            ("mlp.down", "mlp", ("down_proj",), (hidden,), wide, config.mlp_bias),
        )  # fmt: skip
        for name, block, sources, rows, columns, has_bias in products:
            yield (
                f"{ours}.{name}.weight",
                tuple(
                    Piece(f"{theirs}.{block}.{source}.weight", (row, columns))
                    for source, row in zip(sources, rows, strict=True)
                ),
            )
            if has_bias:
                yield (
                    f"{ours}.{name}.bias",
                    tuple(
                        Piece(f"{theirs}.{block}.{source}.bias", (row,))
                        for source, row in zip(sources, rows, strict=True)
                    ),
                )


def _parse_gpt2(fields: ConfigFields) -> ModelConfig:
    hidden_size = fields.integer("n_embd")
    num_heads, num_layers = fields.integer("n_head"), fields.integer("n_layer")
    if hidden_size < 1:
        raise ConfigError("n_embd", hidden_size, "1 or more")
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError("n_head", num_heads, f"a divisor of n_embd={hidden_size}")
    fields.refuse_unless("reorder_and_upcast_attn", False)
    fields.refuse_unless("add_cross_attention", False)
    head_dim = hidden_size // num_heads
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
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
        max_position_embeddings=fields.integer("n_positions", 1024),
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        rope_theta=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=fields.dtype(),
    )


def _gpt2_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    yield "embed_tokens.weight", (Piece("wte.weight", (config.vocab_size, hidden)),)
    positions = (config.max_position_embeddings, hidden)
    yield "embed_positions.weight", (Piece("wpe.weight", positions),)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (Piece("lm_head.weight", (config.vocab_size, hidden)),)
    norms = [("final_norm", "ln_f")]
    for index in range(config.num_layers):
        norms.append((f"layers.{index}.attention_norm", f"h.{index}.ln_1"))
        norms.append((f"layers.{index}.mlp_norm", f"h.{index}.ln_2"))
        for name, source, rows, columns in (
            ("attention.qkv", "attn.c_attn", 3 * hidden, hidden),
            ("attention.output", "attn.c_proj", hidden, hidden),
            ("mlp.up", "mlp.c_fc", wide, hidden),
            ("mlp.down", "mlp.c_proj", hidden, wide),
        ):
            weight = Piece(f"h.{index}.{source}.weight", (columns, rows), transposed=True)
            yield f"layers.{index}.{name}.weight", (weight,)
            yield f"layers.{index}.{name}.bias", (Piece(f"h.{index}.{source}.bias", (rows,)),)
    for name, source in norms:
        for part in ("weight", "bias"):
            yield f"{name}.{part}", (Piece(f"{source}.{part}", (hidden,)),)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        parse=_parse_llama,
        tensors=_llama_tensors,
        prefix="",
        ignored=(".rotary_emb.inv_freq",),
    ),
    "gpt2": Family(
        parse=_parse_gpt2,
        tensors=_gpt2_tensors,
        prefix="transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
}
