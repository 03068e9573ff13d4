"""Rotary settings of a config.json, from either dialect.

transformers 5 writes `rope_parameters`; version 4, which most published checkpoints use, writes
`rope_theta`, `rope_scaling` and, for a partly rotated head, a share of it, all at the top level.
"""

import math

from models.checkpoints.config_json import ConfigFields
from models.errors import ConfigError
from models.positions import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# What old checkpoints of these families called the same thing.
_OLD_KINDS = {"su": "longrope"}


def read_rope(
    fields: ConfigFields,
    *,
    head_dim: int,
    theta: float = 10_000.0,
    rotary_share: float = 1.0,
    interleaved: bool = False,
    layer_type: str | None = None,
) -> RopeConfig:
    """The rotary embedding of a model, or of its layers of one type.

    Args:
        theta: the family's default base.
        rotary_share: the family's default for the part of a head that is rotated.
        layer_type: a key of `rope_parameters` whose settings are meant, if they are nested.

    Raises:
        ConfigError: a setting is missing, wrong or not supported.
    """
    settings = fields.nested("rope_parameters")
    if layer_type is not None and layer_type in settings:
        settings = settings.nested(layer_type)
    old = fields.nested("rope_scaling")
    scaled = settings if "rope_type" in settings or "type" in settings else old
    base = settings if "rope_theta" in settings else fields
    share = settings if "partial_rotary_factor" in settings else fields
    return RopeConfig(
        theta=base.number("rope_theta", theta),
        rotary_dim=int(head_dim * share.number("partial_rotary_factor", rotary_share)),
        interleaved=interleaved,
        scaling=_read_scaling(scaled, fields),
    )


def longest_context(fields: ConfigFields, rope: RopeConfig, max_positions: int) -> int:
    """Tokens that a model handles whose config.json says `max_position_embeddings`.

    Linear and dynamic scaling, and YaRN beside its original length, stretch what the field says;
    checkpoints with the other scalings write the stretched length.
    """
    match rope.scaling:
        case LinearScaling(factor) | DynamicNtkScaling(factor, _):
            return int(max_positions * factor)
        case YarnScaling(factor, original_length):
            return max(max_positions, int(original_length * factor))
    return max_positions


def _read_scaling(scaled: ConfigFields, fields: ConfigFields) -> RopeScaling | None:
    name = "rope_type" if "rope_type" in scaled else "type"
    kinds = {kind: kind for kind in _KINDS} | _OLD_KINDS
    kind = scaled.choice(name, kinds, "default")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(scaled.number("factor"))
    max_positions = fields.integer("max_position_embeddings")
    if kind == "dynamic":
        return DynamicNtkScaling(scaled.number("factor"), max_positions)
    source = scaled if "original_max_position_embeddings" in scaled else fields
    original_length = source.integer("original_max_position_embeddings", max_positions)
    if original_length < 2:
        raise ConfigError("original_max_position_embeddings", original_length, "2 or more")
    if kind == "llama3":
        return Llama3Scaling(
            factor=scaled.number("factor"),
            low_freq_factor=scaled.number("low_freq_factor"),
            high_freq_factor=scaled.number("high_freq_factor"),
            original_length=original_length,
        )
    factor = scaled.number("factor", max_positions / original_length)
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original_length=original_length,
            attention_factor=_yarn_attention_factor(scaled, factor),
            beta_fast=scaled.number("beta_fast", 32.0),
            beta_slow=scaled.number("beta_slow", 1.0),
            truncate=scaled.flag("truncate", True),
        )
    grown = math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
    return LongRopeScaling(
        short_factor=scaled.numbers("short_factor"),
        long_factor=scaled.numbers("long_factor"),
        original_length=original_length,
        attention_factor=scaled.number("attention_factor", grown),
    )


def _yarn_attention_factor(scaled: ConfigFields, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_all = scaled.number("mscale", 0.0), scaled.number("mscale_all_dim", 0.0)
    inferred = mscale(weight) / mscale(weight_all) if weight and weight_all else mscale(1.0)
    return scaled.number("attention_factor", inferred)
