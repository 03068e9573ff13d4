"""A feature that is not supported, or a value that cannot work, is refused by its name."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from tests.models.checkpoints import version4
from tests.models.checkpoints.config_files import GPT2_V4, LLAMA_V4, parse
from tests.models.checkpoints.refusals import FAMILY_REFUSALS

LLAMA_REFUSALS: list[tuple[dict[str, object], str]] = [
    ({"rope_scaling": False}, "rope_scaling"),
    ({"rope_scaling": []}, "rope_scaling"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": -3}},
        "rope_scaling.attention_factor",
    ),
    ({"attention_chunk_size": 16}, "attention_chunk_size"),
    ({"rotary_pct": 0.5}, "rotary_pct"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rms_norm_eps": -1.0}, "norm_eps"),
    ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_scaling.type"),
    ({"rope_scaling": {"rope_type": "proportional"}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {"rope_type": "su"}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            }
        },
        "rope_scaling.high_freq_factor",
    ),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}}, "rope_scaling.long_factor"),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0]}},
        "long_factor",
    ),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": "ab", "long_factor": [1.0] * 8}},
        "rope_scaling.short_factor",
    ),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, "rope_scaling.beta_fast"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": -1.0, "mscale_all_dim": 1.0}},
        "rope_scaling.mscale",
    ),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "rope_scaling.truncate"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1}},
        "original_max_position_embeddings",
    ),
    ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_theta"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [4, 4]}},
        "rope_scaling.mrope_section",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters.full_attention",
    ),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
        "rope_scaling",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ({"rope_parameters": ["default"]}, "rope_parameters"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": -1e4}, "rope_theta"),
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ({"per_layer_config": {"0": {"intermediate_size": 2}}}, "per_layer_config.0.intermediate_size"),
    ({"per_layer_config": {"0": {"num_key_value_heads": 3}}}, "num_kv_heads"),
    ({"per_layer_config": {"3": {"num_key_value_heads": 1}}}, "per_layer_config.3"),
    ({"num_hidden_layers": 10**15}, "num_hidden_layers"),
    ({"num_attention_heads": 10**15}, "num_attention_heads"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method"),
    ({"quantization_config": "int8"}, "quantization_config"),
    ({"model_type": "mamba"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"hidden_act": "quick_gelu"}, "hidden_act"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 66}, "num_attention_heads"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 15}, "rotary_dim"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"attention_bias": "false"}, "attention_bias"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"eos_token_id": [2, True]}, "eos_token_id"),
    ({"eos_token_id": 259}, "eos_token_id"),
    ({"torch_dtype": "int8"}, "torch_dtype"),
    ({"torch_dtype": ["float32"]}, "torch_dtype"),
    ({"dtype": "float64"}, "dtype"),
]
GPT2_REFUSALS: list[tuple[dict[str, object], str]] = [
    ({"reorder_and_upcast_attn": "yes"}, "reorder_and_upcast_attn"),
    ({"head_dim": 32}, "head_dim"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"n_head": 5}, "n_head"),
    ({"n_head": 0}, "n_head"),
    ({"n_embd": None}, "n_embd"),
    ({"n_embd": 0}, "n_embd"),
    ({"n_inner": "wide"}, "n_inner"),
    ({"scale_attn_weights": 0.5}, "scale_attn_weights"),
    ({"activation_function": 7}, "activation_function"),
]
_OF_FAMILY = {str(fields["model_type"]): fields for fields in reversed(version4.CONFIGS.values())}
# What the configuration calls it, where it is not what config.json calls it.
_OUR_NAMES = {
    "num_key_value_heads": "num_kv_heads",
    "num_hidden_layers": "layers",
    "n_embd": "hidden_size",
}


@pytest.mark.parametrize(
    ("base", "changes", "field"),
    [
        *(pytest.param(LLAMA_V4, *refusal, id=str(refusal[0])) for refusal in LLAMA_REFUSALS),
        *(pytest.param(GPT2_V4, *refusal, id=str(refusal[0])) for refusal in GPT2_REFUSALS),
        *(
            pytest.param(_OF_FAMILY[family], *refusal, id=f"{family} {refusal[0]}")
            for family, *refusal in FAMILY_REFUSALS
        ),
    ],
)
def test_a_field_that_cannot_work_is_named(
    tmp_path: Path, base: dict[str, object], changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, base | changes)
    assert caught.value.field in {field, _OUR_NAMES.get(field)}
    assert str(caught.value).startswith(f"{caught.value.field} is ")
    assert "; allowed: " in str(caught.value)


def test_refusals_say_what_is_allowed(tmp_path: Path) -> None:
    for changes, words in (
        ({"model_type": "mamba"}, "model_type is 'mamba'; allowed: llama, mistral, qwen2"),
        (
            {"rope_scaling": {"type": "mrope"}},
            "'mrope'; allowed: default, linear, dynamic, yarn, llama3, longrope",
        ),
        (
            {"hidden_act": "x"},
            "allowed: silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu",
        ),
        ({"torch_dtype": "int8"}, "allowed: float32, bfloat16, float16"),
        ({"vocab_size": None}, "the field is missing"),
        ({"sliding_window": 9}, "sliding_window is 9; allowed: 'absent'"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(tmp_path, LLAMA_V4 | changes)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 50_000.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {}, "rope_scaling": {"rope_type": "default"}},
        {"pruned_heads": {}},
        {"is_encoder_decoder": False},
        {"partial_rotary_factor": 1},
        {"sliding_window": None},
        {"layer_types": ["full_attention"] * 3},
        {"quantization_config": None},
        {"head_dim": 16},
        {"head_dim": None},
        {"attention_bias": False},
        {"an_unknown_field": {"of": "the future"}},
    ],
    ids=str,
)
def test_features_that_are_switched_off_are_no_obstacle(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    assert parse(tmp_path, LLAMA_V4 | changes) == parse(tmp_path, LLAMA_V4)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["default", "linear", "dynamic", "yarn", "float32", "silu", 1e308, 10**400, -(10**400)]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "rope_type",
                    "type",
                    "rope_theta",
                    "factor",
                    "original_max_position_embeddings",
                    "full_attention",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=4,
)
# The number of layers is left to smaller numbers: a list that long would be tried.
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers")


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("base", [LLAMA_V4, GPT2_V4, *_OF_FAMILY.values()])
def test_any_value_in_any_field_is_read_or_refused_with_a_name(
    tmp_path_factory: pytest.TempPathFactory, base: dict[str, object], data: st.DataObject
) -> None:
    names = sorted(
        {*base, "rope_parameters", "rope_scaling", "head_dim", "dtype", "n_inner", "sliding_window"}
    )
    name = data.draw(st.sampled_from(names))
    value = data.draw(st.integers(-3, 50) if name in _COUNTS else _JSON)
    directory = tmp_path_factory.getbasetemp() / "any-value"
    directory.mkdir(exist_ok=True)
    # Any other exception fails the test.
    with contextlib.suppress(ConfigError):
        parse(directory, base | {name: value})
