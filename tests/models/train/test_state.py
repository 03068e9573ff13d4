"""The state of a training is replaced as a whole, and belongs to one configuration."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.errors import TrainingError
from models.train.config import TrainConfig
from models.train.state import Point, TrainState, load_state, save_state

CONFIG = TrainConfig(num_tokens=4096)
STATE = TrainState(
    step=3,
    seconds=1.5,
    loss_sum=2.25,
    points=[Point(2, 4.0, 5.0, 6.0, 1.25)],
    model={"weight": torch.arange(6.0)},
    optimizer={0: {"step": torch.tensor(3.0)}},
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "made" / "state.safetensors"
    assert load_state(file, CONFIG) is None
    save_state(file, CONFIG, STATE)
    loaded = load_state(file, CONFIG)
    assert loaded is not None
    assert torch.equal(loaded.model.pop("weight"), torch.arange(6.0))
    assert loaded == dataclasses.replace(STATE, model={})
    assert [path.name for path in file.parent.iterdir()] == ["state.safetensors"]


def test_a_full_disk_keeps_the_old_state(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    (tmp_path / "state.partial").symlink_to("/dev/full")
    with pytest.raises(
        TrainingError,
        match=r"step 3 cannot be written to .*state\..*: No space left on device; there is none",
    ):
        save_state(file, CONFIG, STATE)
    save_state(file, CONFIG, STATE)
    before = file.read_bytes()
    (tmp_path / "state.partial").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"step 4 .*; the one saved before is kept"):
        save_state(file, CONFIG, dataclasses.replace(STATE, step=4))
    assert file.read_bytes() == before


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    save_state(file, CONFIG, STATE)
    with pytest.raises(
        TrainingError, match=r"seed is 1; allowed: 0, with which the training in .* began, or"
    ):
        load_state(file, dataclasses.replace(CONFIG, seed=1))


def test_options_that_are_newer_than_the_state_are_off_in_it(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    save_state(file, CONFIG, STATE)
    with safe_open(file, framework="pt") as handle:
        numbers = json.loads(handle.metadata()["training"])
    del numbers["config"]["distillation"]
    save_file(load_file(file), file, metadata={"training": json.dumps(numbers)})
    assert load_state(file, CONFIG) is not None
    with pytest.raises(TrainingError, match=r"distillation is 0\.5; allowed: 0\.0, with which the"):
        load_state(file, dataclasses.replace(CONFIG, distillation=0.5))


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_state_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "state.safetensors"
    save_state(file, CONFIG, STATE)
    content = {"empty": b"", "cut": file.read_bytes()[:-100], "text": b"step 3\n"}
    file.write_bytes(content[damage])
    with pytest.raises(
        TrainingError, match=r"state\.safetensors is no readable state of a training"
    ):
        load_state(file, CONFIG)
