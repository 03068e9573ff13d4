"""Rotary settings and slopes: what cannot work is refused, what is published is met."""

import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from models.errors import ConfigError
from models.positions import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
    alibi_slopes,
    mpt_alibi_slopes,
)
from tests.models import numpy_oracle

LONGROPE = LongRopeScaling((1.0,) * 4, (2.0,) * 4, original_length=16, attention_factor=1.2)


@pytest.mark.parametrize("theta", [0.0, -1.0, math.inf, math.nan])
def test_the_base_is_a_positive_number(theta: float) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeConfig(theta, 8)
    assert caught.value.field == "rope_theta"
    assert str(caught.value) == f"rope_theta is {theta}; allowed: more than 0"


@pytest.mark.parametrize("rotary_dim", [0, -2, 1, 7])
def test_dimensions_are_rotated_in_pairs(rotary_dim: int) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeConfig(1e4, rotary_dim)
    assert caught.value.field == "rotary_dim"
    assert str(caught.value) == f"rotary_dim is {rotary_dim}; allowed: an even number, 2 or more"


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_factors_are_positive_numbers(factor: float) -> None:
    for scaling in (
        LinearScaling(factor),
        DynamicNtkScaling(factor, 16),
        YarnScaling(factor, 16, 1.0),
        Llama3Scaling(factor, 1.0, 4.0, 16),
    ):
        with pytest.raises(ConfigError, match=r"rope_scaling\.factor is .*; allowed: "):
            RopeConfig(1e4, 8, scaling=scaling)


def test_dynamic_scaling_only_stretches_and_needs_two_pairs() -> None:
    """The base would become negative, and its exponent divide by zero."""
    for rotary_dim, factor in ((8, 0.5), (2, 4.0)):
        with pytest.raises(ConfigError, match="1 or more, with a rotary_dim above 2"):
            RopeConfig(1e4, rotary_dim, scaling=DynamicNtkScaling(factor, 16))
    assert RopeConfig(1e4, 4, scaling=DynamicNtkScaling(1.0, 16)).depends_on_length


@pytest.mark.parametrize("field", ["short_factor", "long_factor"])
@pytest.mark.parametrize("factors", [(), (1.0,) * 3, (1.0,) * 5, (1.0, 1.0, 0.0, 1.0)])
def test_longrope_has_a_divisor_for_every_pair(field: str, factors: tuple[float, ...]) -> None:
    lists = {"short_factor": (1.0,) * 4, "long_factor": (1.0,) * 4, field: factors}
    scaling = LongRopeScaling(**lists, original_length=16, attention_factor=1.0)
    with pytest.raises(ConfigError) as caught:
        RopeConfig(1e4, 8, scaling=scaling)
    assert caught.value.field == field
    assert f"'{len(factors)} numbers'; allowed: 4 numbers above 0" in str(caught.value)


@pytest.mark.parametrize(
    ("scaling", "depends", "switch"),
    [
        (None, False, None),
        (LinearScaling(2.0), False, None),
        (YarnScaling(4.0, 16, 1.1), False, None),
        (Llama3Scaling(8.0, 1.0, 4.0, 16), False, None),
        (DynamicNtkScaling(4.0, 16), True, None),
        (LONGROPE, True, 16),
    ],
)
def test_a_rotation_says_whether_it_depends_on_the_length(
    scaling: RopeScaling | None, depends: bool, switch: int | None
) -> None:
    rope = RopeConfig(1e4, 8, scaling=scaling)
    assert rope.depends_on_length == depends
    assert rope.switch_length == switch


@pytest.mark.parametrize("num_heads", [*range(1, 18), 31, 32, 71, 112])
def test_slopes_are_those_of_bloom(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert slopes == pytest.approx(numpy_oracle.alibi_slopes(num_heads), rel=1e-12)
    theirs = _get_alibi_slopes(num_heads, torch.device("cpu")).tolist()
    assert slopes == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("bias_max", [4, 8, 16])
@pytest.mark.parametrize("num_heads", [*range(1, 18), 31, 32, 71, 112])
def test_slopes_are_those_of_mpt(num_heads: int, bias_max: int) -> None:
    theirs = -build_mpt_alibi_tensor(num_heads, 2, bias_max)[:, 0, 0]
    assert mpt_alibi_slopes(num_heads, bias_max) == pytest.approx(theirs.tolist(), rel=1e-6)


@pytest.mark.parametrize("num_heads", [1, 3, 6, 8, 12])
def test_slopes_of_mpt_are_those_of_bloom_at_another_strength(num_heads: int) -> None:
    assert mpt_alibi_slopes(num_heads, 8) == pytest.approx(alibi_slopes(num_heads))
    squared = [slope**2 for slope in alibi_slopes(num_heads)]
    assert mpt_alibi_slopes(num_heads, 16) == pytest.approx(squared)
