"""Bundled models are named; everything else is a directory."""

from pathlib import Path

import pytest

from models.checkpoints.bundled import BUNDLED_MODELS, checkpoint_directory
from models.checkpoints.loader import read_config


def test_a_name_or_a_directory() -> None:
    assert checkpoint_directory("demo") == checkpoint_directory(Path("demo"))
    assert checkpoint_directory("demo").is_absolute()
    assert checkpoint_directory("some/demo") == Path("some/demo")


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_each_is_there_with_its_tokenizer_and_card(name: str) -> None:
    directory = checkpoint_directory(name)
    config = read_config(directory)
    heads = config.layers[0]
    assert config.name == name
    kinds = {"mha": heads.num_heads, "gqa": 2, "mqa": 1}
    assert heads.num_kv_heads == kinds[directory.name]
    assert (directory / "tokenizer.json").is_file()
    assert (directory / "MODEL_CARD.md").is_file()
