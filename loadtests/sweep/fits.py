"""Step models of a sweep's points, and what a planner that never saw a configuration says of it."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, TypeAlias

from loadtests.sweep.configurations import Configuration
from loadtests.sweep.plan import Plan
from service.capacity import (
    CapacityQuery,
    MachineLimits,
    RequestShape,
    StepModel,
    StepSample,
    UndeterminedFitError,
    fit_step_model,
    plan_capacity,
)

Point: TypeAlias = dict[str, Any]
# What a fit has to reach to be relied on.
MIN_R2 = 0.95
MAX_SLOPE_SPREAD = 0.15
# A prediction that is further off is named in the report.
TOLERANCE = 0.2


def fit_points(points: Iterable[Point]) -> tuple[StepModel | None, str | None]:
    """The step model of points, one group per configuration; or why there is none."""
    try:
        return fit_step_model(_samples(points)), None
    except UndeterminedFitError as error:
        return None, str(error)


def summarise_fits(points: list[Point]) -> list[dict[str, Any]]:
    """The fit of all points, and of bytes alone to those that arithmetic does not bind."""
    by_bytes = [p for p in points if p["decode"] and not p["decode"]["arithmetic_bound"]]
    samples = [dataclasses.replace(sample, flops=0.0) for sample in _samples(by_bytes)]
    return [
        _summary("all points", "a + c·W + e·KV + f·F", _samples(points)),
        _summary("points not bound by arithmetic", "a + c·W + e·KV", samples),
    ]


def _summary(over: str, formula: str, samples: list[StepSample]) -> dict[str, Any]:
    fit: dict[str, Any] = {"over": over, "formula": formula, "points": len(samples)}
    try:
        model = fit_step_model(samples)
    except UndeterminedFitError as error:
        return fit | {"step_model": None, "reason": str(error)}
    spread = model.slope_spread
    return fit | {
        "step_model": model.to_dict(),
        "reason": None,
        "r2_met": model.r2 >= MIN_R2,
        # Infinity is no JSON.
        "slope_spread": None if spread is None or math.isinf(spread) else spread,
        "slopes_met": None if spread is None else spread <= MAX_SLOPE_SPREAD,
    }


def plan_unseen(
    plan: Plan, configuration: Configuration, points: list[Point], limits: MachineLimits
) -> None:
    """Add to the points of a configuration what `headroom plan` says of it from a fit that leaves
    it out: its own sequences and keys and values, not the measured ones.

    Where it is off, a plan of as many sequences as the steps held on average tells whether that is
    because sequences were missing.
    """
    others = [point for point in points if point["configuration"] != configuration.name]
    step_model, _ = fit_points(others)
    for point in points:
        decode = point["decode"]
        if point["configuration"] != configuration.name or decode is None:
            continue
        decode["planned"] = None
        if step_model is None:
            continue

        def planned(clients: int, point: Point = point) -> dict[str, Any] | None:
            return _planned(plan, configuration, point, clients, (step_model, limits))

        full, held = planned(point["clients"]), planned(max(round(decode["sequences"]), 1))
        if full is not None and held is not None:
            decode["planned"] = full | {
                "held_off": held["off"],
                "cause": _cause(full, held, decode["arithmetic_bound"]),
            }


def _planned(
    plan: Plan,
    configuration: Configuration,
    point: Point,
    clients: int,
    known: tuple[StepModel, MachineLimits],
) -> dict[str, Any] | None:
    """The planned step of a point under so many clients; None where the fit does not tell."""
    assert plan.engine.kv_cache_bytes is not None, "a sweep has a KV budget"
    query = CapacityQuery(
        model=configuration.model,
        memory=plan.engine.kv_cache_bytes,
        weights_included=False,
        mix=(RequestShape(point["prompt"], point["output"]),),
        engine=plan.engine,
        clients=clients,
    )
    answer = plan_capacity(query, *known)
    if answer.step is None or answer.step_time is None:
        return None
    return {
        "sequences": answer.running,
        "kv_bytes": answer.step.kv_bytes,
        "step_s": answer.step_time.seconds,
        "tokens_per_s": answer.decode_tokens_per_s,
        "off": answer.step_time.seconds / point["decode"]["step_s"] - 1,
    }


def _cause(full: dict[str, Any], held: dict[str, Any], arithmetic_bound: list[str]) -> str | None:
    """Why a plan is off, as far as that can be told; None where it is not off, or cannot."""
    if abs(full["off"]) <= TOLERANCE:
        return None
    if held["sequences"] < full["sequences"] and abs(held["off"]) <= TOLERANCE:
        return "fewer sequences than clients"
    return "bound by arithmetic" if arithmetic_bound else None


def _samples(points: Iterable[Point]) -> list[StepSample]:
    return [
        StepSample(
            weight_bytes=point["weight_bytes"],
            kv_bytes=point["decode"]["kv_bytes"],
            seconds=point["decode"]["step_s"],
            group=point["configuration"],
            flops=point["decode"]["flops"],
        )
        for point in points
        if point["decode"]
    ]
