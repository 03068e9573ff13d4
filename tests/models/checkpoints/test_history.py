"""A history is read as it was written, or refused."""

from pathlib import Path

import pytest

from models.checkpoints.history import Step, Training, read_history, write_history
from models.errors import CheckpointError

STEPS = [
    Step("base", "train base", Training(12, 2e-3, 3.5, "bfloat16", {"cpu": "some", "threads": 2})),
    Step("gqa", "convert base"),
]


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    write_history(tmp_path, STEPS)
    assert read_history(tmp_path) == STEPS


@pytest.mark.parametrize(
    "content",
    ["", "{", "1", "[1]", '[{"name": "a"}]', '[{"name": "a", "command": "b", "cost": 1}]'],
)
def test_a_damaged_one_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "history.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"history\.json is no history of a model"):
        read_history(tmp_path)
