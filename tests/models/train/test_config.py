"""A configuration that cannot work is refused, by name."""

import pytest

from models.errors import ConfigError
from models.train.config import TrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_tokens": 0},
            "batch_tokens is 0; allowed: a multiple of 256 and 1024 tokens",
        ),
        (
            {"batch_tokens": 1000},
            "batch_tokens is 1000; allowed: a multiple of 256 and 1024 tokens",
        ),
        ({"num_tokens": 100}, "num_tokens is 100; allowed: 1024 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; allowed: a finite number above 0"),
        ({"repeat_share": 1.0}, "repeat_share is 1.0; allowed: 0 to 0.9"),
        ({"repeat_growth": 1.5}, "repeat_growth is 1.5; allowed: 0 to 1"),
        (
            {"needle_share": 0.5, "repeat_share": 0.6},
            "needle_share is 0.5; allowed: 0 to 0.4, what",
        ),
        ({"needle_share": -0.1}, "needle_share is -0.1; allowed: 0 to 0.9, what repeat_share"),
        ({"head_dropout": 1.0}, "head_dropout is 1.0; allowed: 0 or more, below 1"),
        ({"head_diversity": -1.0}, "head_diversity is -1.0; allowed: a finite number, 0 or more"),
        ({"recompute": True, "head_diversity": 1.0}, "recompute is True; allowed: false, because"),
    ],
)
def test_refusals(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"num_tokens": 10_000, **changes})  # type: ignore[arg-type]


def test_steps_are_rounded_up() -> None:
    assert TrainConfig(num_tokens=2048 * 10).num_steps == 10
    assert TrainConfig(num_tokens=2048 * 10 + 1).num_steps == 11


@pytest.mark.parametrize(
    ("growth", "difficulties"),
    [(0.0, [1, 1, 1, 1]), (0.5, [0, 0.5, 1, 1]), (1.0, [0, 0.25, 0.5, 0.99])],
)
def test_repetitions_become_harder_for_a_part_of_the_steps(
    growth: float, difficulties: list[float]
) -> None:
    config = TrainConfig(num_tokens=2048 * 100, repeat_growth=growth)
    assert [config.repeat_difficulty_at(step) for step in (0, 25, 50, 99)] == difficulties
