"""Metrics take less than a hundredth of a step. `pytest -s` shows the figures."""

import statistics
import time

import pytest

from service.config import DEMO_DIRECTORY
from service.engine import Engine, EngineConfig, SamplingParams
from service.engine.engine import EngineRequest
from service.engine.sequence import Finish
from service.engine.stats import StepStats
from service.metrics.engine import EngineMetrics

_STEPS = 60


@pytest.mark.parametrize("num_seqs", [1, 64])
def test_recording_a_step_takes_less_than_a_hundredth_of_it(num_seqs: int) -> None:
    metrics = EngineMetrics(prefix_caching=False)
    recording: list[float] = []
    steps: list[float] = []

    def on_step(stats: StepStats) -> None:
        started = time.perf_counter()
        metrics.on_step(stats)
        recording.append(time.perf_counter() - started)
        steps.append(stats.seconds)

    finishes: list[Finish] = []
    engine = Engine.from_checkpoint(DEMO_DIRECTORY, EngineConfig(num_threads=1), on_step=on_step)
    params = SamplingParams(max_tokens=_STEPS, temperature=0, ignore_eos=True)
    for index in range(num_seqs):
        engine.add(EngineRequest([index + 5] * 8, params, request_id=str(index)))
    while engine.has_unfinished:
        finishes.extend(output.finish for output in engine.step() if output.finish)
    assert len(finishes) == num_seqs
    started = time.perf_counter()
    for finish in finishes:
        metrics.on_finish(finish)
    # Each request ends once, in one of its steps.
    ends = (time.perf_counter() - started) / _STEPS
    # Medians: on a busy machine some of either are interrupted.
    step, cost = statistics.median(steps), statistics.median(recording) + ends
    print(f"{num_seqs} sequences: {1e6 * cost:.0f} of {1e6 * step:.0f} us, {cost / step:.2%}")
    assert cost < step / 100
