"""The state of a training on disk, whole or not at all."""

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.errors import TrainingError
from models.train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured up to a step.

    Attributes:
        loss: mean over the steps since the last point, nats per token.
        validation_loss: of text that is not trained on, nats per token.
        repeat_loss: of the second half of random tokens that come twice, nats per token.
        seconds: of training, all its parts together.
    """

    step: int
    loss: float
    validation_loss: float
    repeat_loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything that a training needs to go on as if it had not been interrupted."""

    step: int
    seconds: float
    loss_sum: float
    points: list[Point]
    model: dict[str, Any]
    optimizer: dict[str, Any]


def save_state(path: Path, config: TrainConfig, state: TrainState) -> None:
    """Replace the file at once: whatever happens, the old or the new one is there.

    Raises:
        TrainingError: the disk is full, or the directory cannot be written to.
    """
    buffer = io.BytesIO()
    torch.save({"config": asdict(config), **asdict(state)}, buffer)
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = "the one saved before is kept" if path.exists() else "there is none before it"
        raise TrainingError(
            f"the training's state at step {state.step} cannot be written to {path}: "
            f"{error.strerror}; {kept}"
        ) from error


def load_state(path: Path, config: TrainConfig) -> TrainState | None:
    """The state that was saved; None if there is none.

    Raises:
        TrainingError: the file is damaged, or belongs to a training with another configuration.
    """
    if not path.exists():
        return None
    try:
        stored = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise TrainingError(f"{path} is no readable state of a training: {error}") from error
    old, new = stored.pop("config"), asdict(config)
    for field in new:
        if old.get(field) != new[field]:
            raise TrainingError(
                f"{field} is {new[field]!r}; allowed: {old.get(field)!r}, with which the training "
                f"in {path.parent} began, or another directory"
            )
    stored["points"] = [Point(**point) for point in stored["points"]]
    return TrainState(**stored)
