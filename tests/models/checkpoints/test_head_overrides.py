"""Heads of single layers: counts as transformers writes them, settings under our own key."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from models import load_model
from models.checkpoints.loader import read_config
from models.config import HeadConfig
from models.errors import ConfigError
from tests import checkpoints
from tests.models.checkpoints.config_files import LLAMA_V4

TOKENS = torch.arange(0, 120, 7)[None]


def write(directory: Path, **fields: object) -> Path:
    (directory / "config.json").write_text(json.dumps(LLAMA_V4 | fields))
    return directory


def heads_of(directory: Path, layer: int) -> HeadConfig:
    return read_config(directory).layers[layer]


def test_head_counts_of_single_layers_equal_transformers_modules(tmp_path: Path) -> None:
    """Their model, with the attention modules of two layers replaced by others of their own."""
    counts = {0: {"num_key_value_heads": 1}, 2: {"num_attention_heads": 6}}
    config = LlamaConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config)
    for index, changes in counts.items():
        own = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(own, name, value)
        theirs.model.layers[index].self_attn = LlamaAttention(own, index)
    checkpoints.randomise(theirs)
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["per_layer_config"] = {str(index): changes for index, changes in counts.items()}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = load_model(tmp_path)
    assert [heads.label for heads in ours.config.layers] == ["h4kv1d16", "h4kv2d16", "h6kv2d16"]
    with torch.inference_mode():
        expected = theirs(TOKENS).logits
    assert (ours.logits(TOKENS) - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1, "logits that all agree prove nothing"


def test_settings_of_our_own_apply_to_all_layers_and_single_ones(tmp_path: Path) -> None:
    layers = {"*": {"window": 8, "sink_tokens": 2}, "1": {"window": [4, None, 8, 8]}}
    write(tmp_path, headroom={"layers": layers})
    assert heads_of(tmp_path, 0).windows == (8,) * 4
    assert heads_of(tmp_path, 1).windows == (4, None, 8, 8)
    assert {heads.sink_tokens for heads in read_config(tmp_path).layers} == {2}
    layers["1"] = {"window": None, "softcap": 2.0, "scale": 0.5, "temperature": [1, 2, 3, 4]}
    write(tmp_path, headroom={"layers": layers})
    changed = heads_of(tmp_path, 1)
    assert changed.window is None
    assert (changed.softcap, changed.scale, changed.temperature) == (2.0, 0.5, (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("headroom", "field"),
    [
        ({"layer": {}}, "headroom.layer"),
        ({"layers": {"3": {"window": 4}}}, "headroom.layers.3"),
        ({"layers": {"all": {"window": 4}}}, "headroom.layers.all"),
        ({"layers": {"0": {"windows": 4}}}, "headroom.layers.0.windows"),
        ({"layers": {"0": {"window": "4"}}}, "window"),
        ({"layers": {"0": {"window": 0}}}, "window"),
        ({"layers": {"0": {"window": [4, 4]}}}, "window"),
        ({"layers": {"0": {"window": [4, 4, 4, True]}}}, "window"),
        ({"layers": {"0": {"sink_tokens": -1}}}, "sink_tokens"),
        ({"layers": {"0": {"softcap": 0}}}, "softcap"),
        ({"layers": {"0": {"temperature": [1.0]}}}, "temperature"),
        ({"layers": []}, "headroom.layers"),
        ({"layers": {"0": 0}}, "headroom.layers.0"),
        ({"layers": {"0": {"scale": 0}}}, "scale"),
        ({"layers": {"0": {"window": 10**30}}}, "window"),
        ({"projection_rank": 0}, "projection_rank"),
        ({"projection_rank": "8"}, "headroom.projection_rank"),
        (7, "headroom"),
    ],
)
def test_wrong_settings_are_refused_by_name(headroom: object, field: str, tmp_path: Path) -> None:
    write(tmp_path, headroom=headroom)
    with pytest.raises(ConfigError, match=field):
        read_config(tmp_path)
