"""Configurations name the field that cannot work, and count their own cache."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import DTypeName, HeadConfig, ModelConfig
from models.errors import ConfigError
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


def test_rotary_positions_need_even_heads_in_every_layer() -> None:
    layers = (HeadConfig(2, 1, 8), HeadConfig(2, 1, 7))
    with pytest.raises(ConfigError, match="head_dim is 7; allowed: an even number") as caught:
        tiny.llama(layers=layers)
    assert caught.value.field == "head_dim"
    assert tiny.gpt2(layers=layers).num_layers == 2, "learned positions do not pair dimensions"


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
    assert tiny.llama(layers=(heads,) * num_layers).kv_bytes_per_token(dtype) == expected


def test_cache_bytes_and_label_of_layers_that_differ() -> None:
    layers = (HeadConfig(8, 8, 4), HeadConfig(8, 2, 4), HeadConfig(8, 2, 4), HeadConfig(6, 1, 10))
    config = tiny.llama(layers=layers)
    assert config.kv_bytes_per_token() == 4 * (2 * 8 * 4 + 2 * 2 * 4 + 2 * 2 * 4 + 2 * 1 * 10)
    assert config.kv_bytes_per_token("bfloat16") == config.kv_bytes_per_token() // 2
    assert config.head_label == "h8kv8d4+h8kv2d4+h6kv1d10"


def test_replace_changes_a_copy_and_checks_it() -> None:
    config = tiny.llama()
    changed: ModelConfig = config.replace(name="other")
    assert (config.name, changed.name) == ("model", "other")
    with pytest.raises(ConfigError):
        config.replace(vocab_size=0)
