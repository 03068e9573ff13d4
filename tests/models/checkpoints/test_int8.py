"""Weights of 8 bits are read as what they mean, and are what serving with 8 bits multiplies."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from models import load_model
from models.checkpoints.loader import check_checkpoint
from models.checkpoints.writer import save_model
from models.config import HeadConfig
from models.errors import CheckpointError, ConfigError
from models.positions import RopeConfig
from models.transformer import Transformer
from tests.models import tiny
from tests.models.checkpoints.edited import Tensors, assert_refused, edit_json, edit_weights
from tests.models.kernels import needs_library

CONFIG = tiny.llama(hidden_size=32, layers=(HeadConfig(4, 2, 8, rope=RopeConfig(10_000.0, 8)),) * 2)
IDS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
WEIGHT = "model.layers.1.mlp.up_proj.weight"
SCALE = f"{WEIGHT}_scale"
GROUP = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
        "group_size": None, "observer": "minmax",
    },
    "input_activations": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    },
    "output_activations": None,
}  # fmt: skip
FIELDS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": GROUP},
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
}


@pytest.fixture(scope="module")
def original() -> Transformer:
    return tiny.model(CONFIG)


@pytest.fixture(scope="module")
def directory(original: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8")
    save_model(original, path, weight_dtype="int8")
    return path


def test_every_linear_layer_but_the_head_is_rounded_and_transformers_says_the_same(
    directory: Path,
) -> None:
    stored = load_file(directory / "model.safetensors")
    config = LlamaConfig.from_pretrained(directory)
    del config.quantization_config
    theirs = LlamaForCausalLM(config).eval()
    linear = {f"{n}.weight" for n, m in theirs.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n in stored if stored[n].dtype == torch.int8} == linear - {"lm_head.weight"}
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale")}
    for name in linear - {"lm_head.weight"}:
        scale = stored[f"{name}_scale"]
        assert scale.shape == (len(plain[name]), 1)
        plain[name] = (plain[name].double() * scale.double()).float()
    theirs.load_state_dict(plain)
    with torch.inference_mode():
        expected = theirs(IDS).logits
    assert (load_model(directory).logits(IDS) - expected).abs().max() <= 1e-5


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_serving_it_with_8_bits_is_serving_the_original_with_8_bits(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    model = tiny.model(CONFIG.replace(tie_word_embeddings=tied, vocab_size=64), dtype=dtype)
    save_model(model, tmp_path, weight_dtype="int8")
    again = load_model(tmp_path)
    assert again.dtype == dtype
    for one in (model, again):
        one.pack_weights("int8")
    assert torch.equal(model.logits(IDS), again.logits(IDS))


def test_the_layout_of_others_is_read_too(directory: Path, tmp_path: Path) -> None:
    """Scales in bfloat16, more fields, and a layer that is not rounded."""
    original = load_file(directory / "model.safetensors")
    whole = original[WEIGHT] * original[SCALE]

    def edit(tensors: Tensors) -> Tensors:
        halves = {n: t.bfloat16() for n, t in tensors.items() if n.endswith("_scale")}
        del halves[SCALE], tensors[SCALE]
        return tensors | halves | {WEIGHT: whole}

    copy = edit_weights(directory, tmp_path, edit)
    edit_json(copy / "config.json", quantization_config=FIELDS)
    model = load_model(copy)
    assert torch.equal(model.state_dict()["layers.1.mlp.up.weight"][40:], whole)
    gate = "model.layers.1.mlp.gate_proj.weight"
    expected = original[gate] * original[f"{gate}_scale"].bfloat16().float()
    assert torch.equal(model.state_dict()["layers.1.mlp.up.weight"][:40], expected)


PROBLEMS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scale": (lambda t: {n: v for n, v in t.items() if n != SCALE}, f"missing {SCALE}"),
    "one scale": (
        lambda t: t | {SCALE: torch.ones(1)},
        f"{SCALE} has shape [1], the configuration needs [40, 1]",
    ),
    "scales of whole numbers": (
        lambda t: t | {SCALE: torch.ones(40, 1, dtype=torch.int64)},
        f"{SCALE} has dtype I64, allowed: F32, F16, BF16",
    ),
    "a scale of nothing": (lambda t: t | {WEIGHT: torch.ones(40, 32)}, f"unexpected {SCALE}"),
    "a norm": (
        lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
        "model.norm.weight has dtype I8, allowed: F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_fit_is_named(name: str, directory: Path, tmp_path: Path) -> None:
    edit, message = PROBLEMS[name]
    assert_refused(edit_weights(directory, tmp_path, edit), message)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_scales_that_are_none_are_refused(bad: float, directory: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        tensors[SCALE][3] = bad
        return tensors

    with pytest.raises(CheckpointError, match=f"{SCALE} has {bad}; allowed: finite numbers"):
        load_model(edit_weights(directory, tmp_path, edit))


def test_without_the_field_they_are_refused(directory: Path, tmp_path: Path) -> None:
    copy = edit_weights(directory, tmp_path, dict)
    edit_json(copy / "config.json", quantization_config=None)
    assert_refused(copy, "down_proj.weight has dtype I8, allowed: F32, F16, BF16")


def changed(**group: object) -> dict[str, object]:
    return {"config_groups": {"group_0": {**GROUP, **group}}}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format": "pack-quantized"}, "format"),
        ({"config_groups": None}, "config_groups"),
        ({"config_groups": {"group_0": GROUP, "group_1": GROUP}}, "config_groups"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "dense"}}, "sparsity_config"),
        (changed(weights={"num_bits": 4}), "config_groups.group_0.weights.num_bits"),
        (
            changed(input_activations=None),
            "config_groups.group_0.input_activations",
        ),
    ],
)
def test_other_ways_to_keep_weights_are_refused(
    changes: dict[str, object], field: str, directory: Path, tmp_path: Path
) -> None:
    copy = edit_weights(directory, tmp_path, dict)
    edit_json(copy / "config.json", quantization_config=FIELDS | changes)
    with pytest.raises(ConfigError) as caught:
        check_checkpoint(copy)
    assert caught.value.field == f"quantization_config.{field}"
