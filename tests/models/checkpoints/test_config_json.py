"""Both dialects of config.json mean the same; fields are read by their types."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, GPT2Config, LlamaConfig

from models.checkpoints.config_json import ConfigFields, read_json
from models.checkpoints.families import FAMILIES
from models.checkpoints.loader import read_config
from models.config import HeadConfig, ModelConfig
from models.errors import CheckpointError, ConfigError
from models.positions import RopeConfig
from tests.models.checkpoints.config_files import GPT2_V4, LLAMA_V4, parse


def test_both_dialects_of_llama_mean_the_same(tmp_path: Path) -> None:
    v5 = tmp_path / "v5"
    LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=128,
        num_attention_heads=4,
        num_hidden_layers=3,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        vocab_size=259,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(v5)
    fields = json.loads((v5 / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= set(fields), "else this is not the newer dialect"
    assert not {"rope_theta", "torch_dtype"} & set(fields)
    expected = ModelConfig(
        family="llama",
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        layers=(HeadConfig(4, 2, 16, rope=RopeConfig(theta=50_000.0, rotary_dim=16)),) * 3,
        max_position_embeddings=128,
        norm="rms_norm",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        eos_token_ids=(2,),
        dtype="bfloat16",
        name="same",
    )
    assert read_config(v5).replace(name="same") == expected
    assert parse(tmp_path, LLAMA_V4).replace(name="same") == expected


def test_both_dialects_of_gpt2_mean_the_same(tmp_path: Path) -> None:
    v5 = tmp_path / "v5"
    GPT2Config(
        n_embd=64, n_head=4, n_layer=2, n_positions=128, vocab_size=259, eos_token_id=258
    ).save_pretrained(v5)
    expected = ModelConfig(
        family="gpt2",
        vocab_size=259,
        hidden_size=64,
        intermediate_size=256,
        layers=(HeadConfig(num_heads=4, num_kv_heads=4, head_dim=16, scale=0.25),) * 2,
        max_position_embeddings=128,
        norm="layer_norm",
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated_mlp=False,
        learned_positions=128,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        eos_token_ids=(258,),
        name="same",
    )
    assert read_config(v5).replace(name="same") == expected
    assert parse(tmp_path, GPT2_V4).replace(name="same") == expected


def test_the_name_is_the_directorys(tmp_path: Path) -> None:
    directory = tmp_path / "tiny-llama"
    directory.mkdir()
    assert parse(directory, LLAMA_V4).name == "tiny-llama"


# Names that each family has for sizes; heads enough for every default number of key/value heads.
_SIZES: dict[str, int] = {"vocab_size": 300_000, "hidden_size": 2048, "num_attention_heads": 32}
_GPT_SIZES: dict[str, int] = {"vocab_size": 300_000, "n_embd": 2048, "n_head": 32, "n_layer": 12}
_OWN_SIZES: dict[str, dict[str, int]] = {
    "gpt2": _GPT_SIZES,
    "gpt_bigcode": _GPT_SIZES,
    "gptj": _GPT_SIZES,
    "bloom": {"vocab_size": 300_000, "hidden_size": 2048, "n_head": 32, "n_layer": 12},
    "mpt": {"vocab_size": 300_000, "d_model": 2048, "n_heads": 32, "n_layers": 12},
    "falcon": _SIZES | {"num_hidden_layers": 12},
    "opt": _SIZES | {"num_hidden_layers": 12, "ffn_dim": 512},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_have_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    # Twelve layers, so that a layer of every type is among them.
    usual = _SIZES | {"num_hidden_layers": 12, "intermediate_size": 512}
    sizes = _OWN_SIZES.get(family, usual)
    CONFIG_MAPPING[family](**sizes).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert len(fields) > len(sizes) + 10, "else nothing is left to a default"
    complete = parse(tmp_path, fields)
    # Which token ends a generation is nobody's guess.
    assert parse(tmp_path, {"model_type": family, **sizes}) == complete.replace(eos_token_ids=())


@pytest.mark.parametrize(("family", "absent"), [("mistral", 4096), ("phi3", None)])
def test_a_window_that_is_null_is_none(tmp_path: Path, family: str, absent: int | None) -> None:
    fields = LLAMA_V4 | {"model_type": family}
    assert parse(tmp_path, fields | {"sliding_window": None}).layers[0].window is None
    assert parse(tmp_path, fields).layers[0].window == absent
    assert parse(tmp_path, fields | {"sliding_window": 9}).layers[0].window == 9


def test_gpt2_scores_may_be_unscaled_or_shrink_with_depth(tmp_path: Path) -> None:
    unscaled = parse(tmp_path, GPT2_V4 | {"scale_attn_weights": False})
    assert [heads.scale for heads in unscaled.layers] == [1.0, 1.0]
    by_layer = parse(tmp_path, GPT2_V4 | {"scale_attn_by_inverse_layer_idx": True})
    assert [heads.scale for heads in by_layer.layers] == [0.25, 0.125]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"),
     ("gelu_fast", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu")],
)  # fmt: skip
def test_activations_by_their_published_names(tmp_path: Path, written: str, meant: str) -> None:
    assert parse(tmp_path, LLAMA_V4 | {"hidden_act": written}).activation == meant
    assert parse(tmp_path, GPT2_V4 | {"activation_function": written}).activation == meant


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"a": }',
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"null",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=["empty", "half", "hole", "no utf-8", "list", "text", "null", "huge number", "deep"],
)
def test_a_file_that_holds_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(file)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_json(tmp_path / "config.json")


def test_text_of_any_language_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": "größe"}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"name": "größe"}


def test_fields_that_are_null_are_absent() -> None:
    fields = ConfigFields({"a": None, "b": 0, "c": False})
    assert [name in fields for name in "abcd"] == [False, True, True, False]
    assert fields.integer("a", 7) == 7
    assert fields.flag("a", True) is True
    assert fields.integer("b", 7) == 0, "0 is a value"
    assert fields.flag("c", True) is False


def test_null_can_mean_off_instead_of_the_default() -> None:
    fields = ConfigFields({"null": None, "three": 3})
    assert fields.integer_or_none("null", 7) is fields.number_or_none("null", 7.0) is None
    assert fields.integer_or_none("absent", 7) == fields.number_or_none("absent", 7.0) == 7
    assert fields.integer_or_none("three", 7) == fields.number_or_none("three", 7.0) == 3
    assert fields.integer_or_none("absent", None) is fields.number_or_none("absent", None) is None


def test_the_spelling_in_use_is_found() -> None:
    fields = ConfigFields({"new": None, "old": 2})
    assert fields.spelling("new", "old") == "old"
    assert fields.spelling("new", "newer") == "new", "which is then reported as missing"


def test_fields_that_nobody_asked_for_are_noticed() -> None:
    fields = ConfigFields({"asked": 1, "off": False, "null": None, "unasked": 2})
    assert fields.integer("asked") == 1
    fields.refuse_unread("asked", "off", "null", "absent")
    with pytest.raises(ConfigError, match="unasked is 2; allowed: False or 'absent'"):
        fields.refuse_unread("asked", "unasked")


def test_token_ids_are_one_or_many_or_none() -> None:
    fields = ConfigFields({"one": 5, "many": [7, 5], "none": None})
    assert fields.token_ids("one") == (5,)
    assert fields.token_ids("many") == (7, 5)
    assert fields.token_ids("none") == fields.token_ids("absent") == ()


def test_whole_numbers_are_numbers_but_not_the_reverse() -> None:
    fields = ConfigFields({"whole": 3, "broken": 2.5, "flag": True, "huge": 10**400})
    assert fields.number("whole") == 3.0
    refused: list[Callable[[], float]] = [
        lambda: fields.integer("broken"),
        lambda: fields.number("flag"),
        lambda: fields.number("huge"),
    ]
    for read in refused:
        with pytest.raises(ConfigError):
            read()


def test_the_newer_name_of_the_dtype_wins() -> None:
    assert ConfigFields({"dtype": "float16", "torch_dtype": "float32"}).dtype() == "float16"
    assert ConfigFields({"torch_dtype": "bfloat16"}).dtype() == "bfloat16"
    assert ConfigFields({}).dtype() == "float32"
