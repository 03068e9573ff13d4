"""Loads over time, and arrivals that follow them."""

import itertools
import math
import random
import statistics
from collections.abc import Iterator

import pytest

from loadtests.stages import SHAPES, Shape, Stage, arrivals, load_at, stages


@pytest.mark.parametrize("shape", SHAPES)
def test_stages_fill_the_time_without_a_gap_and_reach_the_peak(shape: Shape) -> None:
    plan = stages(shape, peak=16, seconds=60)
    assert plan[0].start == 0
    assert plan[-1].end == pytest.approx(60)
    assert all(one.end == pytest.approx(two.start) for one, two in itertools.pairwise(plan))
    assert max(stage.load for stage in plan) == 16
    assert min(stage.load for stage in plan) > 0


@pytest.mark.parametrize(
    ("shape", "loads"),
    [
        ("steady", [16]),
        ("steps", [1, 2, 4, 8, 16]),
        ("spike", [4, 16, 4]),
        ("ramp", [0.8 * number for number in range(1, 21)]),
    ],
)
def test_what_the_shapes_are(shape: Shape, loads: list[float]) -> None:
    assert [stage.load for stage in stages(shape, 16, 60)] == pytest.approx(loads)


def test_steps_to_less_than_one_have_one_step() -> None:
    assert stages("steps", 0.5, 10) == [Stage(0, 10, 0.5)]


def test_the_load_at_a_moment() -> None:
    plan = stages("spike", 8, 30)
    assert [load_at(plan, moment) for moment in (0, 9.9, 10, 20, 31)] == [2, 2, 8, 2, 2]


def unit(seed: int) -> Iterator[float]:
    rng = random.Random(seed)
    return itertools.accumulate(rng.expovariate(1) for _ in itertools.count())


def test_a_steady_rate_gives_a_poisson_process() -> None:
    moments = itertools.islice(arrivals(stages("steady", 5, math.inf), unit(0)), 20_000)
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    # Exponential: mean and standard deviation are 1/rate, and the past says nothing.
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)
    assert abs(statistics.correlation(gaps[1:], gaps[:-1])) < 0.03


def test_arrivals_of_a_shape_come_at_the_rate_of_each_stage() -> None:
    plan = stages("ramp", 1000, 20)
    moments = list(itertools.takewhile(lambda moment: moment < 20, arrivals(plan, unit(1))))
    assert moments == sorted(moments)
    for stage in plan:
        inside = [moment - stage.start for moment in moments if stage.start <= moment < stage.end]
        expected = stage.load * (stage.end - stage.start)
        assert abs(len(inside) - expected) < 5 * math.sqrt(expected)
        # Spread evenly over the stage: a uniform variable has a variance of 1/12.
        spread = 5 / math.sqrt(12 * expected)
        assert statistics.fmean(inside) / (stage.end - stage.start) == pytest.approx(
            0.5, abs=spread
        )
