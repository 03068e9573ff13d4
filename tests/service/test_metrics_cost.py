"""Metrics take less than a hundredth of a step. `pytest -s` shows the figures."""

import statistics
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import pytest

from models import load_model
from service.config import DEMO_DIRECTORY
from service.engine import Engine, EngineConfig, SamplingParams
from service.engine.engine import EngineRequest
from service.engine.kv_reads import KVReads
from service.engine.stats import Progress, StepStats
from service.metrics.engine import EngineMetrics

P = ParamSpec("P")
T = TypeVar("T")
_STEPS = 60


class Stopwatch:
    """Seconds in functions since the last reading."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def timed(self, function: Callable[P, T]) -> Callable[P, T]:
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._seconds += time.perf_counter() - started
            return result

        return call

    def read(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@pytest.mark.parametrize("num_seqs", [1, 64])
def test_metrics_take_less_than_a_hundredth_of_a_step(
    num_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = EngineMetrics(prefix_caching=False)
    watch = Stopwatch()
    # Everything that is done for the sake of metrics only.
    record, end = watch.timed(metrics.on_step), watch.timed(metrics.on_finish)
    monkeypatch.setattr(KVReads, "count", watch.timed(KVReads.count))
    monkeypatch.setattr(Progress, "add_token", watch.timed(Progress.add_token))
    costs: list[float] = []
    steps: list[float] = []

    def on_step(stats: StepStats) -> None:
        record(stats)
        costs.append(watch.read())
        steps.append(stats.seconds)

    model = load_model(DEMO_DIRECTORY)
    engine = Engine(model, EngineConfig(num_threads=1), on_step=on_step, on_finish=end)
    params = SamplingParams(max_tokens=_STEPS, temperature=0, ignore_eos=True)
    for index in range(num_seqs):
        engine.add(EngineRequest([index + 5] * 8, params, request_id=str(index)))
    while engine.has_unfinished:
        engine.step()
    assert len(steps) >= _STEPS
    # Medians: on a busy machine some of either are interrupted. Each request ends once, in one of
    # its steps.
    cost = statistics.median(costs) + max(costs) / _STEPS
    step = statistics.median(steps)
    print(f"{num_seqs} sequences: {1e6 * cost:.0f} of {1e6 * step:.0f} us, {cost / step:.2%}")
    assert cost < step / 100
