"""What a model family is: how its config.json reads, and what its checkpoints call things."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.names import NameMap
from models.config import Activation, HeadConfig, ModelConfig
from models.errors import ConfigError

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Family:
    """How one model family is written down.

    Attributes:
        parse: config.json fields to `ModelConfig`.
        names: what the checkpoints of a configuration call our parameters.
        prefix: a leading name that some exporters write and others leave out.
        ignored: patterns of tensors that exporters write and nothing needs.
        old_endings: last parts of names that old exporters wrote differently.
    """

    parse: Callable[[ConfigFields], ModelConfig]
    names: Callable[[ModelConfig], NameMap]
    prefix: str = ""
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    old_endings: tuple[tuple[str, str], ...] = ()


def read_heads(
    fields: ConfigFields,
    *,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> HeadConfig:
    """The numbers of heads and their width.

    Args:
        hidden, heads: what the family calls these fields.
        num_kv_heads: the family's default of `num_key_value_heads`; None and null are `heads`.
        head_dim: the family's default; None is `hidden / heads`.
    """
    num_heads = fields.count(heads)
    kv_heads = fields.integer_or_none("num_key_value_heads", num_kv_heads)
    if "head_dim" in fields or head_dim is not None:
        width = fields.integer("head_dim", head_dim)
    else:
        width = even_head_dim(fields, hidden=hidden, heads=heads)
    return HeadConfig(num_heads, num_heads if kv_heads is None else kv_heads, width)


def even_head_dim(
    fields: ConfigFields, *, hidden: str = "hidden_size", heads: str = "num_attention_heads"
) -> int:
    """The width of a head in families where it is always `hidden / heads`."""
    hidden_size, num_heads = fields.integer(hidden), fields.count(heads)
    if hidden_size < 1:
        raise ConfigError(hidden, hidden_size, "1 or more")
    if hidden_size % num_heads:
        raise ConfigError(heads, num_heads, f"a divisor of {hidden}={hidden_size}")
    head_dim = hidden_size // num_heads
    fields.refuse_unless("head_dim", head_dim)
    return head_dim


def read_layer_types(
    fields: ConfigFields, num_layers: int, *, slides: Callable[[int], bool]
) -> tuple[bool, ...]:
    """For each layer, whether it has a sliding window: as `layer_types` says, else as the family
    decides by the layer's number."""
    types = fields.strings("layer_types")
    if types is None:
        return tuple(slides(index) for index in range(num_layers))
    if len(types) != num_layers:
        raise ConfigError("layer_types", f"{len(types)} types", f"{num_layers}, one for each layer")
    known = {"full_attention": False, "sliding_attention": True}
    for kind in types:
        if kind not in known:
            raise ConfigError("layer_types", kind, ", ".join(known))
    return tuple(known[kind] for kind in types)


def refuse_layer_types(fields: ConfigFields, num_layers: int, *, slides: bool = False) -> None:
    """For families whose layers are all alike: refuse `layer_types` that say otherwise."""
    kind = "sliding_attention" if slides else "full_attention"
    fields.refuse_unless("layer_types", [kind] * num_layers)


def read_model(
    fields: ConfigFields,
    family: str,
    layers: tuple[HeadConfig, ...],
    *,
    tied: bool,
    vocab: str = "vocab_size",
    hidden: str = "hidden_size",
    **settings: Any,
) -> ModelConfig:
    """A configuration with the fields that all families have.

    Args:
        tied: the family's default of `tie_word_embeddings`.
        hidden: what the family calls this field.
        settings: what the family decides.
    """
    return ModelConfig(
        family=family,
        vocab_size=fields.integer(vocab),
        hidden_size=fields.integer(hidden),
        layers=layers,
        tie_word_embeddings=fields.flag("tie_word_embeddings", tied),
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=fields.dtype(),
        **settings,
    )


def read_gated_model(
    fields: ConfigFields, family: str, layers: tuple[HeadConfig, ...], **settings: Any
) -> ModelConfig:
    """A configuration of the common kind with RMS norm and a gated feed-forward block without
    biases, where `settings` do not say otherwise."""
    usual: dict[str, Any] = {
        "intermediate_size": fields.integer("intermediate_size"),
        "norm": "rms_norm",
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "gated_mlp": True,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "tied": False,
    }
    if "activation" not in settings:
        usual["activation"] = fields.choice("hidden_act", ACTIVATIONS, "silu")
    return read_model(fields, family, layers, **usual | settings)
