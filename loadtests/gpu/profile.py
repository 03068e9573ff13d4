"""Where the time of decode steps goes: kernels by name, and what lies between them."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from loadtests.gpu.decode import empty, fill
from service.engine.engine import Engine

_STEPS = 20
_LISTED = 12


def profile(engine: Engine, batch: int, context: int) -> dict[str, Any]:
    """Microseconds of a step, by kernel, and without any: the device waits for the host."""
    fill(engine, batch, context)
    for _ in range(5):
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_STEPS):
            engine.step()
        torch.cuda.synchronize()
    empty(engine)
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    return {"batch": batch, "context": context, **summary(kernels, _STEPS)}


def summary(kernels: Iterable[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Of kernels by name, begin and end in microseconds, of so many steps."""
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in ordered:
        by_name[name].append(end - begin)
    span = max(end for _, _, end in ordered) - ordered[0][1]
    idle = span - covered((begin, end) for _, begin, end in ordered)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "step_us": round(span / steps, 1),
        "outside_kernels_us": round(idle / steps, 1),
        "kernels_per_step": round(len(ordered) / steps, 1),
        "kernels": [
            {
                "name": name,
                "us_per_step": round(sum(times) / steps, 2),
                "calls_per_step": round(len(times) / steps, 1),
            }
            for name, times in longest[:_LISTED]
        ],
    }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals that are in order of their begin."""
    total, reached = 0.0, float("-inf")
    for begin, end in intervals:
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total
