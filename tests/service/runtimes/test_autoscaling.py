"""How many replicas queue and cache ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.runtimes.autoscaling import CACHE_USAGE, WAITING, QueueAndCachePolicy


@dataclass
class Numbers:
    current_num_replicas: int = 2
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None = field(default=None)


@pytest.mark.parametrize(
    ("waiting", "usage", "replicas"),
    [
        ((0, 0), (0.0, 0.0), 0),  # Serve keeps its minimum
        ((4, 4), (0.1, 0.1), 2),
        ((9, 0), (0.1, 0.1), 3),  # the queue of one is everybody's
        ((0, 0), (0.8, 0.8), 2),
        ((0, 0), (0.9, 0.9), 3),
        ((1, 1), (1.0, 1.0), 3),  # whichever asks for more
        ((40, 40), (1.0, 1.0), 20),
    ],
)
def test_queue_and_cache_are_brought_to_their_targets(
    waiting: tuple[float, ...], usage: tuple[float, ...], replicas: int
) -> None:
    policy = QueueAndCachePolicy(waiting_per_replica=4, cache_usage=0.8)
    numbers = {WAITING: dict(enumerate(waiting)), CACHE_USAGE: dict(enumerate(usage))}
    assert policy(Numbers(aggregated_metrics=numbers)) == (replicas, {})


@pytest.mark.parametrize("metrics", [None, {}, {WAITING: {}}])
def test_without_numbers_nothing_changes(metrics: Mapping[str, Mapping[Any, float]] | None) -> None:
    assert QueueAndCachePolicy()(Numbers(current_num_replicas=5, aggregated_metrics=metrics)) == (
        5,
        {},
    )
