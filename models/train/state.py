"""The state of a training on disk, whole or not at all."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from models.errors import TrainingError
from models.train.config import TrainConfig
from models.train.files import replace_file


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
    """Everything that a training needs to go on as if it had not been interrupted.

    Attributes:
        model: its state.
        optimizer: what it remembers of each parameter, by its number.
    """

    step: int
    seconds: float
    loss_sum: float
    points: list[Point]
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]


def save_state(path: Path, config: TrainConfig, state: TrainState) -> None:
    """Replace the file at once: whatever happens, the old or the new one is there.

    Raises:
        TrainingError: the disk is full, or the directory cannot be written to.
    """
    numbers = {
        "config": asdict(config),
        "step": state.step,
        "seconds": state.seconds,
        "loss_sum": state.loss_sum,
        "points": [asdict(point) for point in state.points],
    }
    content = save(dict(_named(state)), metadata={"training": json.dumps(numbers)})
    try:
        replace_file(path, content)
    except OSError as error:
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
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["training"])
            old = asdict(TrainConfig(**numbers["config"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged file fails in many ways
        raise TrainingError(f"{path} is no readable state of a training: {error}") from error
    for field, value in asdict(config).items():
        if old[field] != value:
            raise TrainingError(
                f"{field} is {value!r}; allowed: {old[field]!r}, with which the training "
                f"in {path.parent} began, or another directory"
            )
    model: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "model":
            model[rest] = tensor
        else:
            number, _, kind = rest.partition(".")
            optimizer.setdefault(int(number), {})[kind] = tensor
    return TrainState(
        step=numbers["step"],
        seconds=numbers["seconds"],
        loss_sum=numbers["loss_sum"],
        points=[Point(**point) for point in numbers["points"]],
        model=model,
        optimizer=optimizer,
    )


def _named(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names that they have in the file; each with memory of its own, as it asks."""
    for name, tensor in state.model.items():
        yield f"model.{name}", tensor.clone()
    for number, kinds in state.optimizer.items():
        for kind, tensor in kinds.items():
            yield f"optimizer.{number}.{kind}", tensor.clone()
