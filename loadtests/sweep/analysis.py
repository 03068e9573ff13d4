"""From runs to figures: medians, the fitted step models, and what bytes would have predicted."""

import statistics
from collections.abc import Iterable
from typing import Any

from loadtests.sweep.fits import fit_points, plan_unseen, summarise_fits
from loadtests.sweep.plan import Plan
from models.config import ModelConfig
from service.capacity import StepModel
from service.capacity.machine import MachineLimits
from service.capacity.step_time import decode_step, step_time

_PERCENTILES = ("p50", "p95", "p99")


def analyse(plan: Plan, document: dict[str, Any]) -> dict[str, Any]:
    """The document with `points`, `step_model`, `fits`, `ratios` and `max_concurrent`
    added."""
    limits = MachineLimits.from_dict(document["limits"])
    points = [
        _point(configuration.to_dict(), load, document["runs"])
        for load in plan.spec()["loads"]
        for configuration in plan.configurations
    ]
    models = {one.name: one.model for one in plan.configurations}
    for point in points:
        _describe_step(point, models[point["configuration"]], limits)
    step_model, reason = fit_points(points)
    for point in points:
        _predict(point, step_model)
    for configuration in plan.configurations:
        plan_unseen(plan, configuration, points, limits)
    return document | {
        "points": points,
        "step_model": None if step_model is None else step_model.to_dict(),
        "step_model_reason": reason,
        "fits": summarise_fits(points),
        "ratios": list(_ratios(points, plan.configurations[0].name)),
        "max_concurrent": [
            {
                "configuration": one.name,
                "load": load.name,
                "prompt": load.prompt,
                "output": load.output,
                "sequences": plan.max_concurrent(one.model, load),
            }
            for load in {(load.prompt, load.output): load for load in plan.loads}.values()
            for one in plan.configurations
        ],
    }


def _point(
    configuration: dict[str, Any], load: dict[str, Any], runs: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Medians over the counted runs of one load on one configuration; None without any."""
    own = [
        run
        for run in runs
        if run["configuration"] == configuration["name"] and run["load"] == load["name"]
    ]
    counted = [run for run in own if run["why_not_counted"] is None]
    rates = [run["summary"]["output_tokens_per_s"] for run in counted]
    point: dict[str, Any] = {
        "configuration": configuration["name"],
        "load": load["name"],
        **{key: load[key] for key in ("clients", "prompt", "output", "requests")},
        "weight_bytes": configuration["weight_bytes"],
        "runs": len(own),
        "counted": len(counted),
        "not_counted": sorted({run["why_not_counted"] for run in own} - {None}),
        "output_tokens_per_s": _median(rates),
        "output_tokens_per_s_range": [min(rates), max(rates)] if rates else None,
        "server_cores": _median(run["server_cores"] for run in counted),
        "client_cpu": _median(run["summary"]["client_cpu"] for run in counted),
        "preemptions": sum(run["server"]["preemptions"] for run in counted),
        "decode": _decode([run["server"] for run in counted]),
    }
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        point[name] = {
            percentile: _median(
                run["summary"][name][percentile] for run in counted if run["summary"][name]
            )
            for percentile in _PERCENTILES
        }
    return point


def _decode(servers: list[dict[str, float]]) -> dict[str, float] | None:
    """The mean decode step of each run, and the median over runs; None where there was none."""
    servers = [server for server in servers if server["decode_steps"]]
    if not servers:
        return None

    def each(total: str) -> float:
        return statistics.median(server[total] / server["decode_steps"] for server in servers)

    return {
        "steps": sum(server["decode_steps"] for server in servers),
        "step_s": each("decode_seconds"),
        "kv_bytes": each("decode_kv_bytes"),
        "sequences": each("decode_sequences"),
        "tokens_per_s": each("decode_sequences") / each("decode_seconds"),
    }


def _describe_step(point: dict[str, Any], model: ModelConfig, limits: MachineLimits) -> None:
    """Add to a point's decode step what it computes, and how long a copy of its bytes takes."""
    decode = point["decode"]
    if decode is None:
        return
    step = decode_step(model, decode["sequences"], point["weight_bytes"], decode["kv_bytes"])
    copied = step_time(step, model, None, limits)
    assert copied is not None, "the machine is measured"
    decode["flops"] = step.flops
    decode["copy_s"] = copied.seconds
    decode["arithmetic_bound"] = list(copied.arithmetic_bound or ())


def _predict(point: dict[str, Any], step_model: StepModel | None) -> None:
    """Add to a point's decode step what the fit says of it."""
    decode = point["decode"]
    if decode is None:
        return
    decode["predicted_s"] = decode["prediction_off"] = None
    if step_model is not None:
        predicted = step_model.predict(point["weight_bytes"], decode["kv_bytes"], decode["flops"])
        decode["predicted_s"] = predicted
        decode["prediction_off"] = predicted / decode["step_s"] - 1


def _ratios(points: list[dict[str, Any]], reference: str) -> Iterable[dict[str, Any]]:
    """For every load, how much faster each configuration is than the first one, and how much
    faster bytes alone and the fitted model say that it is."""
    first = {point["load"]: point for point in points if point["configuration"] == reference}
    for point in points:
        base = first[point["load"]]
        if point is base or not (point["decode"] and base["decode"]):
            continue
        own, other = point["decode"], base["decode"]
        fitted = None
        if own["predicted_s"] is not None:
            per_token = other["predicted_s"] / other["sequences"]
            fitted = per_token / (own["predicted_s"] / own["sequences"])
        measured = own["tokens_per_s"] / other["tokens_per_s"]
        read = (base["weight_bytes"] + other["kv_bytes"]) / other["sequences"]
        own_read = (point["weight_bytes"] + own["kv_bytes"]) / own["sequences"]
        yield {
            "configuration": point["configuration"],
            "reference": reference,
            "load": point["load"],
            "throughput": point["output_tokens_per_s"] / base["output_tokens_per_s"],
            "decode": measured,
            "bytes": read / own_read,
            "fit": fitted,
            "bytes_off": read / own_read / measured - 1,
            "fit_off": None if fitted is None else fitted / measured - 1,
        }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
