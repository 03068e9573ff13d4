"""What a model family is: how its config.json reads, and what its checkpoints call things."""

from collections.abc import Callable
from dataclasses import dataclass

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.names import NameMap
from models.config import Activation, ModelConfig
from models.errors import ConfigError

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
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
        ignored: endings of tensors that exporters write and nothing needs.
    """

    parse: Callable[[ConfigFields], ModelConfig]
    names: Callable[[ModelConfig], NameMap]
    prefix: str = ""
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)


def read_head_dim(fields: ConfigFields, hidden_size: int, num_heads: int, *, name: str) -> int:
    """`head_dim`, or `hidden_size / num_heads` where the field is absent.

    Args:
        name: the field that holds the number of heads, for the message.
    """
    if num_heads < 1:
        raise ConfigError(name, num_heads, "1 or more")
    if "head_dim" in fields:
        return fields.integer("head_dim")
    if hidden_size % num_heads:
        raise ConfigError(name, num_heads, f"a divisor of hidden_size={hidden_size}")
    return hidden_size // num_heads


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
