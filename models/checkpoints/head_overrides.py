"""What differs from what a family's config.json says of all layers.

Head counts of single layers are under `per_layer_config`, as transformers writes them:

    "per_layer_config": {"3": {"num_attention_heads": 4, "num_key_value_heads": 2}}

Settings that no family has are under a key of our own:

    "headroom": {"layers": {"0": {"window": [128, 128, null, null], "sink_tokens": 4}}}
    "headroom": {"projection_rank": 96}

Other readers of the checkpoint ignore `headroom`. A layer is named by its number, or `*` for all;
a number wins over `*`. With a rank, each projection of the layers is stored as two matrices, which
no other reader finds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from models.checkpoints.config_json import ConfigFields
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError

_COUNTS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_FIELDS = ("window", "sink_tokens", "softcap", "scale", "temperature")


def parse_layers(parse: Callable[[ConfigFields], ModelConfig], fields: ConfigFields) -> ModelConfig:
    """A family's configuration, with the head counts that single layers have of their own.

    Raises:
        ConfigError: see `ModelConfig`; or a layer does not exist, or is given another field.
    """
    config = parse(fields)
    per_layer = fields.nested("per_layer_config")
    per_layer.refuse_others(*map(str, range(config.num_layers)))
    layers = list(config.layers)
    for index, heads in enumerate(config.layers):
        if str(index) in per_layer:
            changes = per_layer.nested(str(index))
            changes.refuse_others(*_COUNTS)
            # Another number of heads does not make them wider.
            own = parse(fields.changed_by(changes, head_dim=heads.head_dim))
            layers[index] = own.layers[index]
    return config.replace(layers=tuple(layers))


def apply_head_overrides(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """The configuration with what `headroom` changes.

    Raises:
        ConfigError: a layer or field does not exist, or has a value that cannot work.
    """
    if "headroom" not in fields:
        return config
    ours = fields.nested("headroom")
    ours.refuse_others("layers", "projection_rank")
    layers = ours.nested("layers")
    layers.refuse_others("*", *map(str, range(config.num_layers)))
    rank = ours.integer("projection_rank") if "projection_rank" in ours else None
    return config.replace(
        projection_rank=rank,
        layers=tuple(
            _override(_override(heads, layers.nested("*")), layers.nested(str(index)))
            for index, heads in enumerate(config.layers)
        ),
    )


def _override(heads: HeadConfig, fields: ConfigFields) -> HeadConfig:
    fields.refuse_others(*_FIELDS)
    changes: dict[str, Any] = {}
    if fields.has("window"):
        changes["window"] = _window(fields)
    if "sink_tokens" in fields:
        changes["sink_tokens"] = fields.integer("sink_tokens")
    for name in ("softcap", "scale"):
        if name in fields:
            changes[name] = fields.number(name)
    if "temperature" in fields:
        changes["temperature"] = fields.numbers("temperature")
    return dataclasses.replace(heads, **changes)


def _window(fields: ConfigFields) -> int | tuple[int | None, ...] | None:
    """One window, one for each query head, or null for none."""
    value = fields.raw("window")
    windows = value if isinstance(value, list) else [value]
    for window in windows:
        if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
            raise ConfigError("window", value, "a number of tokens, null, or a list of these")
    return tuple(windows) if isinstance(value, list) else windows[0]
