"""Bundled models are named; everything else is a directory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.checkpoints.bundled import BUNDLED_MODELS, checkpoint_directory
from models.checkpoints.loader import load_model, read_config


def test_a_name_or_a_directory() -> None:
    assert checkpoint_directory("demo") == checkpoint_directory(Path("demo"))
    assert checkpoint_directory("demo").is_absolute()
    assert checkpoint_directory("some/demo") == Path("some/demo")


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_each_is_there_with_its_tokenizer_and_card(name: str) -> None:
    directory = checkpoint_directory(name)
    config = read_config(directory)
    assert config.name == name
    num_kv_heads = sum(heads.num_kv_heads for heads in config.layers)
    assert num_kv_heads == {"mha": 40, "gqa": 10, "mqa": 5, "pruned": 30}[directory.name]
    assert (directory / "tokenizer.json").is_file()
    assert (directory / "MODEL_CARD.md").is_file()


@pytest.mark.parametrize("name", BUNDLED_MODELS)
@torch.inference_mode()
def test_logits_are_as_exact_as_those_of_transformers(name: str) -> None:
    """Logits reach 22, where float32 itself has errors of some 1e-5: what is asked for is that
    ours are not further from float64 than those of transformers are."""
    directory = checkpoint_directory(name)
    config = read_config(directory)
    if len(set(config.layers)) > 1:
        pytest.skip("layers with different numbers of heads: transformers' Llama has none")
    ids = torch.randint(3, config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    theirs = {
        dtype: AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)(ids).logits
        for dtype in (torch.float32, torch.float64)
    }
    exact = theirs[torch.float64]
    ours = load_model(directory).logits(ids)
    assert (ours - exact).abs().max() <= 2 * (theirs[torch.float32] - exact).abs().max()
