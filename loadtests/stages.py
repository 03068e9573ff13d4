"""How much load there is when: users in a closed loop, requests per second in an open one."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["steady", "steps", "spike", "ramp"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
_RAMP_STAGES = 20
_SPIKE_BASE = 0.25


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of constant load.

    Attributes:
        start, end: seconds since the load began.
        load: users, or requests per second.
    """

    start: float
    end: float
    load: float


def stages(shape: Shape, peak: float, seconds: float) -> list[Stage]:
    """Cut the time into stages of equal length.

    `steady` is one stage, which may be endless; `steps` doubles up to the peak, `spike` is at a
    quarter of it before and after, `ramp` rises to it in 20 stages.
    """
    match shape:
        case "steady":
            return [Stage(0.0, seconds, peak)]
        case "spike":
            loads = [_SPIKE_BASE * peak, peak, _SPIKE_BASE * peak]
        case "ramp":
            loads = [peak * (number + 1) / _RAMP_STAGES for number in range(_RAMP_STAGES)]
        case "steps":
            halves = itertools.takewhile(
                lambda load: load >= 1, (peak / 2**number for number in itertools.count())
            )
            loads = [*reversed(list(halves))] or [peak]
    length = seconds / len(loads)
    return [
        Stage(number * length, (number + 1) * length, load) for number, load in enumerate(loads)
    ]


def load_at(plan: list[Stage], elapsed: float) -> float:
    """The load at a moment; the last stage goes on."""
    return next((stage.load for stage in plan if elapsed < stage.end), plan[-1].load)


def arrivals(plan: list[Stage], unit: Iterator[float]) -> Iterator[float]:
    """Moments of a Poisson process whose rate is the load; the last stage goes on.

    Args:
        unit: moments of a Poisson process of rate 1, which are stretched by the load.
    """
    stage_end = 0.0  # in units of `unit`: how many requests are expected until then
    moment = next(unit)
    for stage in plan:
        stage_begin, stage_end = stage_end, stage_end + stage.load * (stage.end - stage.start)
        while moment < stage_end or stage is plan[-1]:
            yield stage.start + (moment - stage_begin) / stage.load
            moment = next(unit)
