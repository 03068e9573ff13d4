"""The rotations of a config.json are those that transformers computes from it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.loader import read_config
from models.checkpoints.rope_fields import longest_context, read_rope
from models.errors import ConfigError
from models.positions import (
    DynamicNtkScaling,
    LinearScaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from models.rope import rotation

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 3.0] * 4}
# Settings of rotary embeddings, in the words of either dialect.
SCALINGS: list[dict[str, object]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 20},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": None, "mscale": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", "factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 20},
    {"rope_type": "longrope", **LISTS, "factor": 9.0, "original_max_position_embeddings": 20},
    {"rope_type": "longrope", **LISTS, "attention_factor": 1.3},
]
BASE: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "max_position_embeddings": 80,
    "eos_token_id": None,
}


def theirs(directory: Path, length: int) -> tuple[Tensor, Tensor]:
    config = AutoConfig.from_pretrained(directory)
    make = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    frequencies, factor = make(config, seq_len=length)
    angles = torch.arange(length)[:, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


@pytest.mark.parametrize(
    "dialect",
    [
        lambda scaling: {"rope_parameters": {"rope_theta": 500.0, **scaling}},
        lambda scaling: {"rope_theta": 500.0, "rope_scaling": scaling},
        lambda scaling: {
            "rope_theta": 500.0,
            "rope_scaling": {"type": scaling["rope_type"]}
            | {name: value for name, value in scaling.items() if name != "rope_type"},
        },
        # Beside the settings, this field wins over the one within them.
        lambda scaling: {
            "rope_theta": 500.0,
            "rope_scaling": scaling,
            "original_max_position_embeddings": 30,
        },
    ],
    ids=["version 5", "version 4", "its older form", "length beside the settings"],
)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rotations_are_those_of_transformers(
    scaling: dict[str, object],
    dialect: Callable[[dict[str, object]], dict[str, object]],
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | dialect(scaling)))
    rope = read_config(tmp_path).layers[0].rope
    assert rope is not None
    for length in (7, 30, 75, 200):
        positions = torch.arange(length)
        ours = rotation(rope, positions, torch.full_like(positions, length))
        for mine, other in zip(ours, theirs(tmp_path, length), strict=True):
            assert (mine[:, 0] - other).abs().max() <= 2e-5


def test_settings_beside_each_other_must_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    both = ConfigFields({"rope_parameters": linear, "rope_scaling": linear})
    assert read_rope(both, head_dim=8, max_positions=16).scaling == LinearScaling(2.0)
    other = ConfigFields({"rope_parameters": linear, "rope_scaling": linear | {"factor": 3.0}})
    with pytest.raises(ConfigError, match="rope_scaling is"):
        read_rope(other, head_dim=8, max_positions=16)


def test_families_decide_what_is_absent() -> None:
    fields = ConfigFields({"rotary_pct": 0.5, "rotary_emb_base": 7})
    rope = read_rope(
        fields,
        head_dim=16,
        max_positions=32,
        theta_field="rotary_emb_base",
        share=0.25,
        share_field="rotary_pct",
        interleaved=True,
    )
    assert rope == RopeConfig(7.0, 8, interleaved=True)
    assert read_rope(ConfigFields({}), head_dim=16, max_positions=32, share=0.25).rotary_dim == 4
    assert read_rope(ConfigFields({}), head_dim=16, max_positions=32, theta=5.0).theta == 5.0


def test_the_original_length_of_phi3_is_beside_the_settings() -> None:
    """transformers does not look within them: its own default comes first."""
    scaling = {"type": "longrope", **LISTS, "original_max_position_embeddings": 20}
    rope = read_rope(
        ConfigFields({"rope_scaling": scaling}),
        head_dim=16,
        max_positions=8192,
        original_length=4096,
    )
    assert isinstance(rope.scaling, LongRopeScaling)
    assert rope.scaling.original_length == Phi3Config().original_max_position_embeddings


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 80),
        (LinearScaling(3.0), 240),
        (DynamicNtkScaling(3.0, 80), 240),
        (LongRopeScaling((1.0,) * 4, (2.0,) * 4, 20, 1.0), 80),
        (YarnScaling(4.0, 20, 1.0), 80),
        (YarnScaling(4.0, 80, 1.0), 320),
    ],
)
def test_the_longest_context(scaling: object, longest: int) -> None:
    rope = RopeConfig(1e4, 8, scaling=scaling)  # type: ignore[arg-type]
    assert longest_context(rope, 80) == longest


def test_a_plain_llama_has_the_base_of_transformers() -> None:
    rope = read_rope(ConfigFields({}), head_dim=16, max_positions=32)
    assert rope.theta == LlamaConfig().rope_parameters["rope_theta"]
