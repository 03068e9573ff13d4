"""By which commands a model came to be: `history.json` beside its weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from models.errors import CheckpointError

_FILE = "history.json"


@dataclass(frozen=True, slots=True)
class Training:
    """What a command has trained, and where.

    Attributes:
        learning_rate: its peak.
        seconds: of all parts together.
        products: type of matrix products, such as bfloat16.
        machine: what times and bits depend on: cpu, cpu_capability, threads, device, torch, python.
    """

    num_tokens: int
    learning_rate: float
    seconds: float
    products: str
    machine: dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and the name of the model that it made.

    Attributes:
        command: as a shell takes it.
        training: None if nothing was trained.
    """

    name: str
    command: str
    training: Training | None = None


def read_history(directory: Path) -> list[Step]:
    """The steps to a model, in order; none if nobody has written them down.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = directory / _FILE
    if not file.exists():
        return []
    try:
        return [
            Step(**{**step, "training": step["training"] and Training(**step["training"])})
            for step in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is no history of a model: {error}") from error


def write_history(directory: Path, steps: Sequence[Step]) -> None:
    """Raises OSError: the directory cannot be written to."""
    content = json.dumps([asdict(step) for step in steps], indent=2) + "\n"
    (directory / _FILE).write_text(content, encoding="utf-8")
