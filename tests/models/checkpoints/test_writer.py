"""What is written is the same model again, here and in transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from models import load_model
from models.checkpoints.loader import check_checkpoint
from models.checkpoints.writer import save_model
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError
from models.positions import Alibi, LinearScaling, RopeConfig, alibi_slopes
from tests.models import tiny

ROPE = RopeConfig(10_000.0, 8)
TOKENS = torch.arange(0, 61, 2)[None]
CONFIGS: dict[str, ModelConfig] = {
    "gqa": tiny.llama(),
    "mha": tiny.llama(layers=(HeadConfig(4, 4, 8, rope=ROPE),)),
    "mqa-tied": tiny.llama(layers=(HeadConfig(4, 1, 8, rope=ROPE),) * 3, tie_word_embeddings=True),
    "wide-heads": tiny.llama(layers=(HeadConfig(4, 2, 20, rope=RopeConfig(500.0, 20)),) * 2),
    "biases": tiny.llama(qkv_bias=True, output_bias=True, mlp_bias=True),
    "eps": tiny.llama(norm_eps=0.25, max_position_embeddings=40),
    "silu": tiny.llama(activation="silu"),
    "gelu": tiny.llama(activation="gelu"),
    "gelu-tanh": tiny.llama(activation="gelu_tanh"),
    "relu": tiny.llama(activation="relu"),
}


MIXED_HEADS = tiny.llama(layers=(HeadConfig(4, 2, 8, rope=ROPE), HeadConfig(4, 1, 8, rope=ROPE)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_model_is_read_back_unchanged(name: str, tmp_path: Path) -> None:
    model = tiny.model(CONFIGS[name])
    save_model(model, tmp_path / "new" / "model")
    again = load_model(tmp_path / "new" / "model")
    assert again.config == model.config
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))


def test_layers_with_heads_of_their_own_are_read_back_unchanged(tmp_path: Path) -> None:
    model = tiny.model(MIXED_HEADS)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config.replace(name=tmp_path.name)
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    model = tiny.model(CONFIGS[name])
    save_model(model, tmp_path)
    theirs, report = LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        expected = theirs(TOKENS).logits
    assert expected.dtype == torch.float32
    assert (model.logits(TOKENS) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_written_and_read_as_such(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.model(tiny.llama(), dtype=dtype)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.dtype == dtype
    assert f"torch.{again.config.dtype}" == str(dtype)
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.get_tensor("model.norm.weight").dtype == dtype


@pytest.mark.parametrize(("eos", "written"), [((), None), ((5,), 5), ((5, 3), [5, 3])])
def test_ending_tokens_survive(eos: tuple[int, ...], written: object, tmp_path: Path) -> None:
    save_model(tiny.model(tiny.llama(eos_token_ids=eos)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == written
    assert check_checkpoint(tmp_path).eos_token_ids == eos


def test_tokens_that_others_read_are_written(tmp_path: Path) -> None:
    save_model(tiny.model(tiny.llama()), tmp_path, token_ids={"bos_token_id": 0, "pad_token_id": 2})
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.pad_token_id) == (0, 2)
    assert check_checkpoint(tmp_path) == tiny.llama(name=tmp_path.name)
    save_model(tiny.model(tiny.llama()), tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path).bos_token_id is None


def test_on_a_failure_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny.model(CONFIGS["mha"]), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny.model(CONFIGS["gqa"]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_second_model_replaces_the_first(tmp_path: Path) -> None:
    for name in ("mha", "mqa-tied"):
        save_model(tiny.model(CONFIGS[name]), tmp_path)
    assert load_model(tmp_path).config.layers == CONFIGS["mqa-tied"].layers


UNSPEAKABLE: dict[str, ModelConfig] = {
    "gpt2": tiny.gpt2(),
    "scale": tiny.llama(layers=(HeadConfig(4, 2, 8, rope=ROPE, scale=0.9),)),
    "window": tiny.llama(layers=(HeadConfig(4, 2, 8, rope=ROPE, window=4),)),
    "sinks": tiny.llama(layers=(HeadConfig(4, 2, 8, rope=ROPE, learned_sinks=True),)),
    "alibi": tiny.llama(layers=(HeadConfig(4, 2, 8, alibi=Alibi(alibi_slopes(4))),)),
    "no positions": tiny.llama(layers=(HeadConfig(4, 2, 8),)),
    "part of a head": tiny.llama(layers=(HeadConfig(4, 2, 8, rope=RopeConfig(10_000.0, 4)),)),
    "interleaved": tiny.llama(
        layers=(HeadConfig(4, 2, 8, rope=RopeConfig(10_000.0, 8, interleaved=True)),)
    ),
    "scaling": tiny.llama(
        layers=(HeadConfig(4, 2, 8, rope=RopeConfig(10_000.0, 8, scaling=LinearScaling(2.0))),)
    ),
    "parallel": tiny.llama(parallel=True),
    "logit scale": tiny.llama(logit_scale=0.5),
    "only qkv bias": tiny.llama(qkv_bias=True),
    "only output bias": tiny.llama(output_bias=True),
    "layer norm": tiny.llama(norm="layer_norm"),
    "plain mlp": tiny.llama(gated_mlp=False),
    "learned positions": tiny.llama(learned_positions=64),
}


@pytest.mark.parametrize("name", UNSPEAKABLE)
def test_what_the_format_cannot_say_is_refused_and_nothing_written(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        save_model(tiny.model(UNSPEAKABLE[name]), tmp_path / "model")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_refusals_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="family is 'gpt2'; allowed: llama"):
        save_model(tiny.model(UNSPEAKABLE["gpt2"]), tmp_path)
    with pytest.raises(ConfigError, match=r"scale is 0\.9; allowed: None, which is all"):
        save_model(tiny.model(UNSPEAKABLE["scale"]), tmp_path)
