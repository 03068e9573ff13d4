"""What a row of the parity matrix is, and how features are switched off in our configurations.

Sizes are such that every feature bites: windows and original lengths are shorter than the
sequences, soft-caps smaller than the scores, epsilons and factors far from their defaults.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

from models.config import HeadConfig, ModelConfig

Change = Callable[[ModelConfig], ModelConfig]


@dataclass(frozen=True)
class Row:
    """One line of the matrix.

    Attributes:
        name: family and variant.
        make: the configuration, as transformers has it.
        switches: features, and how our configuration is without them.
        lengths: tokens of the sequences whose logits are compared.
        attention: the implementation of attention in transformers.
        cached: whether transformers generates with its cache.
    """

    name: str
    make: Callable[[], PreTrainedConfig]
    switches: Mapping[str, Change] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 3, 17, 40)
    attention: Literal["eager", "sdpa"] = "eager"
    cached: bool = True

    @property
    def family(self) -> str:
        return self.name.partition(",")[0]


def model(**changes: object) -> Change:
    return lambda config: config.replace(**changes)


def heads(**changes: Any) -> Change:
    """The same change in the heads of every layer; a function is given the heads."""

    def change(old: HeadConfig) -> HeadConfig:
        values = {k: v(old) if callable(v) else v for k, v in changes.items()}
        return dataclasses.replace(old, **values)

    return lambda config: config.replace(layers=tuple(map(change, config.layers)))


def rope(**changes: object) -> Change:
    def change(old: HeadConfig) -> HeadConfig:
        assert old.rope is not None
        return dataclasses.replace(old, rope=dataclasses.replace(old.rope, **changes))  # type: ignore[arg-type]

    return lambda config: config.replace(layers=tuple(map(change, config.layers)))


def scaling(**changes: object) -> Change:
    """A change within the scaling of the rotary embedding."""

    def change(old: HeadConfig) -> HeadConfig:
        assert old.rope is not None
        assert old.rope.scaling is not None
        new = dataclasses.replace(old.rope.scaling, **changes)  # type: ignore[arg-type]
        return dataclasses.replace(old, rope=dataclasses.replace(old.rope, scaling=new))

    return lambda config: config.replace(layers=tuple(map(change, config.layers)))


def alibi(**changes: object) -> Change:
    def change(old: HeadConfig) -> HeadConfig:
        assert old.alibi is not None
        return dataclasses.replace(old, alibi=dataclasses.replace(old.alibi, **changes))  # type: ignore[arg-type]

    return lambda config: config.replace(layers=tuple(map(change, config.layers)))


def wider(by: int) -> Change:
    """Windows of another size."""
    return heads(window=lambda old: old.window and old.window + by)


def reversed_layers(config: ModelConfig) -> ModelConfig:
    """What one layer has, the other one has."""
    return config.replace(layers=config.layers[::-1])


def one_rope(config: ModelConfig) -> ModelConfig:
    """All layers rotate like the first."""
    rotation = config.layers[0].rope
    layers = (dataclasses.replace(layer, rope=rotation) for layer in config.layers)
    return config.replace(layers=tuple(layers))


WINDOWS: dict[str, Change] = {
    "window": heads(window=None),
    "window, 1 less": wider(-1),
    "window, 1 more": wider(1),
}
SCALE: dict[str, Change] = {"scale": heads(scale=lambda old: 1 / old.head_dim)}
BIASES: dict[str, Change] = {
    "qkv bias": model(qkv_bias=False),
    "output bias": model(output_bias=False),
}
MLP_BIAS: dict[str, Change] = {"mlp bias": model(mlp_bias=False)}
POSITIONS: dict[str, Change] = {"learned positions": model(learned_positions=0)}
ROPE: dict[str, Change] = {"rope": heads(rope=None)}
ROPE_SCALING: dict[str, Change] = {"rope scaling": rope(scaling=None)}
PARTIAL_ROPE: dict[str, Change] = {
    "rope": heads(rope=None),
    "partial rotation": lambda config: rope(rotary_dim=config.layers[0].head_dim)(config),
}
QK_NORM: dict[str, Change] = {"qk norm": heads(qk_norm=None)}
ALIBI: dict[str, Change] = {"alibi": heads(alibi=None)}
EPS: dict[str, Change] = {"norm eps": model(norm_eps=1e-6)}
# The two curves are at most 5e-4 apart: what is left of that in the logits is small, and far
# above the bar of parity all the same.
FINE = ("exact gelu", "tanh gelu")
GELU: dict[str, Change] = {"exact gelu": model(activation="gelu_tanh")}
GELU_TANH: dict[str, Change] = {"tanh gelu": model(activation="gelu")}

TOKENS = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
SMALL = TOKENS | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = SMALL | {"max_position_embeddings": 64}
PLAIN = LONG | {"intermediate_size": 96, "tie_word_embeddings": False}
GROUPED = PLAIN | {"num_key_value_heads": 2}
GPT = TOKENS | {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}


def scaled(kind: str, **settings: object) -> dict[str, object]:
    usual = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    return {"rope_parameters": usual | settings}


LONGROPE = scaled(
    "longrope",
    short_factor=[1 + 0.1 * i for i in range(8)],
    long_factor=[2.0 + i for i in range(8)],
)
