"""Rotary settings of a config.json, from either dialect.

transformers 5 writes `rope_parameters`; version 4, which most published checkpoints use, writes
`rope_theta`, `rope_scaling` and, for a partly rotated head, a share of it, all at the top level.
"""

import math
import sys
from collections.abc import Mapping

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

_KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "yarn", "llama3", "longrope")}
_SETTINGS = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
    "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "short_factor",
    "long_factor", "finetuned",
)  # fmt: skip


def rope_settings(fields: ConfigFields) -> ConfigFields:
    """The object that holds the rotary settings, whatever the dialect calls it.

    Raises:
        ConfigError: both dialects are there and differ.
    """
    if "rope_scaling" not in fields:
        return fields.nested("rope_parameters")
    if "rope_parameters" in fields and fields.raw("rope_parameters"):
        fields.refuse_unless("rope_scaling", fields.raw("rope_parameters"))
    return fields.nested("rope_scaling")


def read_rope(
    fields: ConfigFields,
    *,
    head_dim: int,
    max_positions: int,
    settings: ConfigFields | None = None,
    theta: float = 10_000.0,
    theta_field: str = "rope_theta",
    share: float | None = None,
    share_field: str = "partial_rotary_factor",
    interleaved: bool = False,
    original_length: int | None = None,
    old_kinds: Mapping[str, str] | None = None,
) -> RopeConfig:
    """The rotary embedding of a model, or of its layers of one type.

    Args:
        max_positions: what `max_position_embeddings` says.
        settings: where the settings are; None looks where both dialects have them.
        theta, theta_field: the family's default base, and what the older dialect calls it.
        share, share_field: likewise for the part of a head that is rotated; None is a family
            that always rotates all of it.
        original_length: the family's default of `original_max_position_embeddings` beside
            (not in) the settings.
        old_kinds: other names of scalings in old checkpoints of the family.

    Raises:
        ConfigError: a setting is missing, wrong or not supported.
    """
    settings = rope_settings(fields) if settings is None else settings
    settings.refuse_others(*_SETTINGS)
    if share is None:
        for place in (settings, fields):
            place.refuse_unless("partial_rotary_factor", 1)
        rotated = 1.0
    elif "partial_rotary_factor" in settings:
        rotated = settings.number("partial_rotary_factor")
    else:
        rotated = fields.number(share_field, share)
    if "rope_theta" in settings:
        theta = settings.number("rope_theta")
    else:
        theta = fields.number(theta_field, theta)
    if not 0 < rotated <= 1:
        raise ConfigError(share_field, rotated, "more than 0, at most 1")
    return RopeConfig(
        theta=theta,
        rotary_dim=int(head_dim * rotated),
        interleaved=interleaved,
        scaling=_read_scaling(
            settings,
            fields,
            theta=theta,
            max_positions=max_positions,
            original_length=original_length,
            old_kinds=old_kinds or {},
        ),
    )


def longest_context(rope: RopeConfig, max_positions: int) -> int:
    """Tokens that a model handles whose config.json says `max_position_embeddings`.

    Linear and dynamic scaling, and YaRN beside its original length, stretch what the field says;
    checkpoints with the other scalings write the stretched length.
    """
    match rope.scaling:
        case LinearScaling(factor) | DynamicNtkScaling(factor, _):
            stretched = max_positions * factor
        case YarnScaling(factor, original_length):
            stretched = max(max_positions, original_length * factor)
        case _:
            return max_positions
    if stretched > sys.maxsize:
        raise ConfigError("rope_scaling.factor", factor, "less")
    return int(stretched)


def _read_scaling(
    settings: ConfigFields,
    fields: ConfigFields,
    *,
    theta: float,
    max_positions: int,
    original_length: int | None,
    old_kinds: Mapping[str, str],
) -> RopeScaling | None:
    name = "rope_type" if "rope_type" in settings else "type"
    kind = settings.choice(name, _KINDS | dict(old_kinds), "default")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(settings.number("factor"))
    if kind == "dynamic":
        return DynamicNtkScaling(settings.number("factor"), max_positions)
    # The field of the model wins over the one of the settings, as it does in transformers.
    name = "original_max_position_embeddings"
    if name in fields or original_length is not None:
        original_length = fields.integer(name, original_length)
    else:
        original_length = settings.integer(name, max_positions)
    if original_length < 2:
        raise ConfigError(name, original_length, "2 or more")
    if kind == "llama3":
        return _read_llama3(settings, original_length)
    factor = settings.number("factor", max_positions / original_length)
    if kind == "yarn":
        if theta <= 1:
            raise ConfigError("rope_theta", theta, "more than 1 with YaRN")
        return YarnScaling(
            factor=factor,
            original_length=original_length,
            attention_factor=_yarn_attention_factor(settings, factor),
            beta_fast=_positive(settings, "beta_fast", 32.0),
            beta_slow=_positive(settings, "beta_slow", 1.0),
            truncate=settings.flag("truncate", True),
        )
    grown = math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
    return LongRopeScaling(
        short_factor=settings.numbers("short_factor"),
        long_factor=settings.numbers("long_factor"),
        original_length=original_length,
        attention_factor=_positive(settings, "attention_factor", grown),
    )


def _positive(settings: ConfigFields, name: str, default: float) -> float:
    value = settings.number(name, default)
    if value <= 0:
        raise ConfigError(f"rope_scaling.{name}", value, "more than 0")
    return value


def _read_llama3(settings: ConfigFields, original_length: int) -> Llama3Scaling:
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    for name in ("low_freq_factor", "high_freq_factor"):
        _positive(settings, name, 1.0)
    if high <= low:
        raise ConfigError("rope_scaling.high_freq_factor", high, f"more than low_freq_factor={low}")
    return Llama3Scaling(
        factor=settings.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_length=original_length,
    )


def _yarn_attention_factor(settings: ConfigFields, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    inferred = mscale(1.0)
    if "mscale" in settings and "mscale_all_dim" in settings:
        inferred = mscale(_positive(settings, "mscale", 1.0)) / mscale(
            _positive(settings, "mscale_all_dim", 1.0)
        )
    return _positive(settings, "attention_factor", inferred)
