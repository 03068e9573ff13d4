"""Configurations name the field that cannot work, and count their own cache."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import MAX_WINDOW, DTypeName, HeadConfig, ModelConfig, Retention
from models.errors import ConfigError
from models.positions import Alibi, DynamicNtkScaling, LongRopeScaling, RopeConfig
from tests.models import tiny


@pytest.mark.parametrize(
    ("heads", "field", "allowed"),
    [
        ((0, 1, 8), "num_heads", "1 or more"),
        ((-4, 2, 8), "num_heads", "1 or more"),
        ((4, 0, 8), "num_kv_heads", "1 or more"),
        ((4, 2, 0), "head_dim", "1 or more"),
        ((4, 3, 8), "num_kv_heads", "a divisor of num_heads=4"),
        ((4, 8, 8), "num_kv_heads", "a divisor of num_heads=4"),
    ],
)
def test_head_config_names_the_wrong_field(
    heads: tuple[int, int, int], field: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        HeadConfig(*heads)
    value = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))[field]
    assert caught.value.field == field
    assert str(caught.value) == f"{field} is {value}; allowed: {allowed}"


@pytest.mark.parametrize(
    ("num_kv_heads", "kind", "group"),
    [(12, "mha", 1), (4, "gqa", 3), (2, "gqa", 6), (1, "mqa", 12)],
)
def test_number_of_kv_heads_decides_the_kind(num_kv_heads: int, kind: str, group: int) -> None:
    heads = HeadConfig(num_heads=12, num_kv_heads=num_kv_heads, head_dim=64)
    assert heads.kind == kind
    assert heads.num_queries_per_kv == group
    assert heads.label == f"h12kv{num_kv_heads}d64"


def test_a_single_head_is_multi_head() -> None:
    assert HeadConfig(num_heads=1, num_kv_heads=1, head_dim=8).kind == "mha"


def test_scale_is_inverse_root_of_the_width_unless_given() -> None:
    assert HeadConfig(4, 2, 64).softmax_scale == 0.125
    assert HeadConfig(4, 2, 64, scale=0.5).softmax_scale == 0.5


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(field: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.llama(**{field: value})
    assert caught.value.field == field
    assert str(caught.value) == f"{field} is {value}; allowed: 1 or more"


def test_a_model_has_layers() -> None:
    with pytest.raises(ConfigError, match="at least one layer") as caught:
        tiny.llama(layers=())
    assert caught.value.field == "layers"


@pytest.mark.parametrize("rotary_dim", [10, 16])
def test_no_more_than_a_head_is_rotated(rotary_dim: int) -> None:
    with pytest.raises(ConfigError) as caught:
        HeadConfig(2, 1, 8, rope=RopeConfig(1e4, rotary_dim))
    assert str(caught.value) == f"rotary_dim is {rotary_dim}; allowed: 1 to head_dim=8"
    assert HeadConfig(2, 1, 7, rope=RopeConfig(1e4, 6)).rope is not None, "the rest stays"


@pytest.mark.parametrize(
    ("changes", "field", "allowed"),
    [
        ({"window": 0}, "window", f"1 to {MAX_WINDOW}"),
        ({"window": (4, -1, None, 2)}, "window", f"1 to {MAX_WINDOW}"),
        ({"window": (4, 4)}, "window", "one for each of 4 heads"),
        ({"window": 10**30}, "window", f"1 to {MAX_WINDOW}"),
        ({"scale": 0.0}, "scale", "a finite number above 0"),
        ({"scale": -0.5}, "scale", "a finite number above 0"),
        ({"softcap": math.nan}, "softcap", "a finite number above 0"),
        ({"temperature": (1.0, math.nan, 1.0, 1.0)}, "temperature", "finite numbers"),
        ({"sink_tokens": -1}, "sink_tokens", "0 or more"),
        ({"softcap": 0.0}, "softcap", "a finite number above 0"),
        ({"clip_qkv": -1.0}, "clip_qkv", "a finite number above 0"),
        ({"temperature": (1.0,)}, "temperature", "one for each of 4 heads"),
        ({"alibi": Alibi((0.5,) * 3)}, "alibi", "one for each of 4 heads"),
    ],
)
def test_settings_that_cannot_work_are_named(
    changes: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        HeadConfig(4, 2, 8, **changes)
    assert caught.value.field == field
    assert str(caught.value).endswith(f"; allowed: {allowed}")


def test_heads_are_grouped_by_what_they_have_to_remember() -> None:
    assert HeadConfig(4, 2, 8).retentions == {Retention(): (0, 1)}
    assert HeadConfig(4, 2, 8, window=7).retentions == {Retention(7): (0, 1)}
    assert HeadConfig(4, 2, 8, sink_tokens=3).retentions == {Retention(): (0, 1)}
    mixed = HeadConfig(8, 4, 8, window=(3, 5, None, 2, 5, 1, 7, None), sink_tokens=2)
    assert mixed.retentions == {Retention(5, 2): (0, 2), Retention(): (1, 3)}


@pytest.mark.parametrize(
    ("window", "label"),
    [(None, "h4kv2d8"), (512, "h4kv2d8w512"), ((3, None, 3, 9), "h4kv2d8w3/all/9")],
)
def test_windows_are_part_of_the_label(
    window: int | tuple[int | None, ...] | None, label: str
) -> None:
    assert HeadConfig(4, 2, 8, window=window).label == label


def test_all_layers_look_the_same_way() -> None:
    both = (HeadConfig(4, 2, 8), HeadConfig(4, 2, 8, causal=False))
    with pytest.raises(ConfigError, match="allowed: the same in every layer") as caught:
        tiny.llama(layers=both)
    assert caught.value.field == "causal"
    assert tiny.llama(layers=both[:1]).is_causal
    assert not tiny.llama(layers=both[1:]).is_causal


def test_learned_positions_are_enough_for_the_longest_sequence() -> None:
    with pytest.raises(ConfigError, match="allowed: at most 62") as caught:
        tiny.gpt2(learned_positions=64, position_offset=2)
    assert caught.value.field == "max_position_embeddings"
    assert tiny.gpt2(learned_positions=66, position_offset=2).max_position_embeddings == 64


def test_a_model_rotates_by_length_where_one_layer_does() -> None:
    long = [
        RopeConfig(1e4, 8, scaling=LongRopeScaling((1.0,) * 4, (2.0,) * 4, length, 1.0))
        for length in (32, 16)
    ]
    dynamic = RopeConfig(1e4, 8, scaling=DynamicNtkScaling(2.0, 16))
    plain = HeadConfig(4, 2, 8)
    for ropes, depends, switch in (
        ((None,), False, None),
        ((None, dynamic), True, None),
        ((long[0], None, long[1]), True, 16),
    ):
        layers = tuple(replace(plain, rope=rope) for rope in ropes)
        config = tiny.gpt2(layers=layers)
        assert config.rope_depends_on_length == depends
        assert config.rope_switch_length == switch


@pytest.mark.parametrize("token_id", [-1, 61])
def test_end_of_sequence_is_a_token_of_the_vocabulary(token_id: int) -> None:
    with pytest.raises(ConfigError, match="allowed: 0 to 60") as caught:
        tiny.llama(eos_token_ids=(0, token_id))
    assert caught.value.field == "eos_token_id"
    assert tiny.llama(eos_token_ids=(0, 60)).eos_token_ids == (0, 60)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
@given(
    num_layers=st.integers(1, 5),
    num_kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    half_dim=st.integers(1, 64),
)
def test_cache_bytes_of_equal_layers(
    dtype: DTypeName, itemsize: int, num_layers: int, num_kv_heads: int, group: int, half_dim: int
) -> None:
    heads = HeadConfig(num_kv_heads * group, num_kv_heads, 2 * half_dim)
    config = tiny.llama(layers=(heads,) * num_layers, dtype=dtype)
    expected = 2 * num_layers * num_kv_heads * 2 * half_dim * itemsize
    assert config.kv_bytes_per_token() == expected


def test_cache_bytes_and_label_of_layers_that_differ() -> None:
    layers = (HeadConfig(8, 8, 4), HeadConfig(8, 2, 4), HeadConfig(8, 2, 4), HeadConfig(6, 1, 10))
    config = tiny.llama(layers=layers)
    assert config.kv_bytes_per_token() == 4 * (2 * 8 * 4 + 2 * 2 * 4 + 2 * 2 * 4 + 2 * 1 * 10)
    half = config.replace(dtype="bfloat16")
    assert half.kv_bytes_per_token() == config.kv_bytes_per_token() // 2
    eight_bits = half.replace(layers=layers[:3], kv_cache_dtype="int8")
    assert eight_bits.kv_bytes_per_token() == (2 * 8 + 2 * 2 + 2 * 2) * (4 + 4)
    assert config.head_label == "h8kv8d4+h8kv2d4+h6kv1d10"


def test_replace_changes_a_copy_and_checks_it() -> None:
    config = tiny.llama()
    changed: ModelConfig = config.replace(name="other")
    assert (config.name, changed.name) == ("model", "other")
    with pytest.raises(ConfigError):
        config.replace(vocab_size=0)
