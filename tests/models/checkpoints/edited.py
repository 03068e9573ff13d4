"""Copies of a checkpoint directory with something changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import load_model
from models.checkpoints.loader import check_checkpoint
from models.errors import CheckpointError

Tensors = dict[str, Tensor]
TOKENS = torch.arange(0, 200, 7)[None]


def copy_of(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def edit_weights(source: Path, tmp_path: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    directory = copy_of(source, tmp_path)
    file = directory / "model.safetensors"
    save_file(edit(load_file(file)), file)
    return directory


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same_model(left: Path, right: Path) -> None:
    assert torch.equal(load_model(left).logits(TOKENS), load_model(right).logits(TOKENS))


def assert_refused(directory: Path, *words: str) -> None:
    """`load_model` and `check_checkpoint` refuse with one and the same message."""
    messages = set[str]()
    for read in (load_model, check_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            read(directory)
        messages.add(str(caught.value))
    (message,) = messages
    for word in words:
        assert word in message
