"""Sweeps that nobody measured: runs whose step times follow from bytes and operations
exactly."""

from typing import Any

from loadtests.sweep.plan import Load, Plan
from loadtests.sweep.reading import read_plan
from loadtests.sweep.source import parse_source

SWEEP = """\
runtime: standalone
repeats: 3
engine:
  kv_cache_bytes: 64MiB
configurations:
  - layers: 2
    hidden: 64
    intermediate: 96
    vocab: 300
    dtype: float32
    heads: 4
    kv_heads: [4, 2, 1]
loads:
  - clients: [1, 4]
    prompt: [16, 128]
    output: 8
"""
# Seconds of a step, per weight byte, per key/value byte and per operation.
A, C, E, F = 0.002, 3e-9, 5e-9, 1e-9
LIMITS = {
    "bytes_per_s": 1e9,
    "flops_per_s": {"float32": 1.5e9, "bfloat16": 1.5e9, "float16": 1.5e9},
}


def plan(text: str = SWEEP) -> Plan:
    return read_plan(parse_source(text, "sweep.yaml"), "sweep")


def measured(plan: Plan) -> dict[str, Any]:
    """What sweep.json holds before its analysis. The first run of every point is not counted and
    has absurd times."""
    return {
        "format": 1,
        "name": plan.name,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "headroom sweep <sweep.yaml>",
        "commit": None,
        "machine": {"cpu": "2 x <b>none</b>", "threads": 2, "torch": "2", "python": "3"},
        "versions": {"headroom": "0"},
        "limits": LIMITS,
        "spec": plan.spec(),
        "quality": {},
        "runs": [
            _run(plan, load, name, repeat, slower=1000.0 if repeat == 0 else 1.0)
            for repeat in range(plan.repeats)
            for load in plan.loads
            for name in (one.name for one in plan.configurations)
        ],
    }


def step_seconds(plan: Plan, name: str, load: Load) -> float:
    one = next(one for one in plan.configurations if one.name == name)
    return A + C * one.weight_bytes + E * kv_bytes(plan, name, load) + F * flops(plan, name, load)


def flops(plan: Plan, name: str, load: Load) -> int:
    """Every weight is used once for each sequence; every query head of 2 layers of 4 heads of 16
    multiplies each key and each value that it sees."""
    one = next(one for one in plan.configurations if one.name == name)
    attention = 2 * 4 * 16 * 2 * (load.prompt + load.output // 2)
    return load.clients * 2 * (one.num_parameters + attention)


def kv_bytes(plan: Plan, name: str, load: Load) -> int:
    one = next(one for one in plan.configurations if one.name == name)
    return load.clients * (load.prompt + load.output // 2) * one.model.kv_bytes_per_token()


def _run(plan: Plan, load: Load, name: str, repeat: int, *, slower: float) -> dict[str, Any]:
    seconds = slower * step_seconds(plan, name, load)
    steps = load.waves * load.output
    times = dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max"), 1000 * seconds)
    return {
        "configuration": name,
        "load": load.name,
        "repeat": repeat,
        "why_not_counted": None if slower == 1 else "the load generator was busy (0.95 of a core)",
        "summary": {
            "output_tokens_per_s": load.clients / seconds,
            "client_cpu": 0.1,
            **dict.fromkeys(("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"), times),
        },
        "server": {
            "decode_steps": steps,
            "decode_seconds": steps * seconds,
            "decode_sequences": steps * load.clients,
            "decode_kv_bytes": steps * kv_bytes(plan, name, load),
            "preemptions": 0,
        },
        "server_cores": 1.0,
        "samples": "samples/none",
    }
