"""Checkpoints of random weights that are served like real ones."""

import dataclasses
import itertools
import json
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models.checkpoints.writer import save_model
from models.config import ModelConfig
from models.transformer import random_model


def write_random_checkpoint(config: ModelConfig, path: Path, *, seed: int = 0) -> None:
    """Write a Llama-style checkpoint directory: random weights and a tokenizer of bytes.

    Args:
        config: all layers have the same heads; a window goes into our own part of config.json.

    Raises:
        ConfigError: the format cannot say what the configuration says.
    """
    heads = config.layers[0]
    plain = config.replace(
        layers=tuple(dataclasses.replace(layer, window=None) for layer in config.layers)
    )
    save_model(random_model(plain, seed=seed, dtype=getattr(torch, config.dtype)), path)
    if heads.window is not None:
        file = path / "config.json"
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields["headroom"] = {"layers": {"*": {"window": heads.window}}}
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    _byte_tokenizer(config.vocab_size).save(str(path / "tokenizer.json"))


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Every id has a text, so that detokenization costs what it costs with a real model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("".join(letters) for letters in itertools.product(ascii_lowercase, repeat=4))
    tokens = itertools.islice(itertools.chain(alphabet, words), vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
