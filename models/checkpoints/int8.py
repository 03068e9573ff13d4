"""Weights of 8 bits in a checkpoint, in the layout of compressed-tensors that vLLM and transformers
read too (https://github.com/vllm-project/compressed-tensors).

A weight `[outputs, inputs]` is int8 and has scales `[outputs, 1]` beside it; it means their
product. config.json says so, and that what such weights multiply is rounded to 8 bits as well,
with a scale for each token.
"""

import torch
from torch import Tensor

from models.checkpoints.config_json import ConfigFields
from models.errors import CheckpointError, ConfigError

_FIELD = "quantization_config"
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_GROUP = {
    "weights": {**_INT8, "strategy": "channel", "dynamic": False},
    "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
}
_REQUIRED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": _GROUP},
}
# They would change other numbers than these weights, or lay them out in another way.
_REFUSED = ("kv_cache_scheme", "sparsity_config", "transform_config")


def int8_fields() -> dict[str, object]:
    """What config.json says of such weights."""
    config = {
        **_REQUIRED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **_GROUP}},
        "ignore": ["lm_head"],
    }
    return {_FIELD: config}


def has_int8_weights(fields: ConfigFields) -> bool:
    """Whether config.json says that there are such weights.

    Raises:
        ConfigError: they are kept in another way.
    """
    if _FIELD not in fields:
        return False
    config = fields.raw(_FIELD)
    _check(config, _REQUIRED, _FIELD)
    for name in _REFUSED:
        if config.get(name):
            raise ConfigError(f"{_FIELD}.{name}", config[name], "absent")
    for name in config["config_groups"]:
        if name != "group_0":
            raise ConfigError(f"{_FIELD}.config_groups", name, "group_0 alone")
    return True


def _check(theirs: object, ours: object, name: str) -> None:
    """Refuse what differs from ours; theirs may say more."""
    if not isinstance(ours, dict):
        if theirs != ours:
            raise ConfigError(name, theirs, f"{ours!r}; other weights of few bits are not read")
    elif not isinstance(theirs, dict):
        raise ConfigError(name, theirs, "an object")
    else:
        for key, value in ours.items():
            _check(theirs.get(key), value, f"{name}.{key}")


def scale_name(weight: str) -> str:
    """What the scales of a weight are called."""
    return f"{weight}_scale"


def read_int8(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """The float32 numbers `[outputs, inputs]` that int8 `[outputs, inputs]` and scales
    `[outputs, 1]` mean.

    Raises:
        CheckpointError: a scale is negative, infinite or no number.
    """
    for value in scale.flatten().tolist():
        if not 0 <= value < float("inf"):
            raise CheckpointError(f"{name} has {value}; allowed: finite numbers, 0 or more")
    return weight * scale.to(torch.float32)
