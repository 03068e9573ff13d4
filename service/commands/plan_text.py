"""A capacity plan as text that can be read at a glance."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from protos.headroom.v1.models_pb2 import CapacityPlan, PlanCapacityResponse, StepPrediction

_BOUND = {
    "fixed": "what every step costs",
    "weights": "reading the weights",
    "cache": "reading keys and values",
    "arithmetic": "arithmetic",
}


def plan_text(answer: "PlanCapacityResponse") -> Group:
    """For a rich console."""
    table = Table(show_header=False, box=None)
    for name, text in _facts(answer.plan):
        table.add_row(name, text)
    return Group(table, *(_changes(answer) if answer.changes else ()))


def _facts(plan: "CapacityPlan") -> Iterator[tuple[str, str]]:
    cache = ", keys and values of 8 bits" if plan.kv_cache_dtype == "int8" else ""
    yield "heads", f"{plan.head_label}, {plan.dtype}{cache}"
    yield "kv", f"{plan.kv_bytes_per_token:,} bytes per token"
    yield "weights", _size(plan.weight_bytes)
    tokens = f" = {plan.tokens:,} tokens" if plan.HasField("tokens") else ""
    blocks = f"{plan.num_blocks:,} blocks of {plan.block_size}{tokens}"
    yield "cache", f"{_size(plan.kv_cache_bytes)}, {blocks}"
    yield "longest", f"{plan.longest_request:,} tokens of prompt and output"
    yield (
        "holds",
        f"{plan.concurrent:,} requests at once, whatever their age; "
        f"about {plan.concurrent_mean:,} on average",
    )
    if plan.concurrent > plan.max_num_seqs:
        yield "", f"of which max_num_seqs lets {plan.max_num_seqs} run"
    yield "waste", f"{plan.waste:.1%} of the memory of blocks in use: part-empty ones"
    if plan.HasField("prediction"):
        yield from _prediction(plan)
    else:
        yield "step", f"not predicted: {plan.no_prediction}"
        if plan.concurrent:
            yield "", "--fit takes a step model from a sweep; --measure, the limits of this machine"


def _prediction(plan: "CapacityPlan") -> Iterator[tuple[str, str]]:
    time = plan.prediction
    basis = "" if time.fitted else " at copy bandwidth"
    milliseconds = f"{1000 * time.step_seconds:.2f} ms{basis}"
    yield "step", f"{milliseconds} for {plan.running} sequences: {_parts(time)}"
    rate = time.decode_tokens_per_s
    yield (
        "speed",
        f"{rate:,.0f} tokens/s{basis}, {rate / plan.running:,.1f} for each sequence; "
        "prompts not counted",
    )
    untold = time.weight_seconds == 0 and time.bound_by == "fixed"
    yield "bound by", f"{_BOUND[time.bound_by]}{', the weights with it' if untold else ''}"
    if time.weight_seconds == 0:
        yield "", "the step model does not tell what reading the weights costs: fixed has it too"
    if time.extrapolated:
        yield (
            "",
            "the step model was fitted to fewer or more bytes or operations: this is an "
            "extrapolation",
        )
    intensities = {"weights": plan.weight_flops_per_byte, "cache": plan.kv_flops_per_byte}
    for part in time.arithmetic_bound:
        yield (
            "",
            f"arithmetic takes longer than {_BOUND[part]} here ({intensities[part]:.3g} operations "
            "per byte): bytes alone say too little",
        )


def _parts(time: "StepPrediction") -> str:
    told = time.weight_seconds > 0
    parts = (
        ("fixed" if told else "fixed and weights", time.fixed_seconds),
        *([("weights", time.weight_seconds)] if told else []),
        ("cache", time.cache_seconds),
        ("arithmetic", time.arithmetic_seconds),
    )
    return ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in parts)


def _changes(answer: "PlanCapacityResponse") -> Iterator[Table | str]:
    reaching = [change for change in answer.changes if change.reaches]
    if answer.reaches:
        yield "\nThis reaches the target; so does each of these changes:"
    elif reaching:
        yield "\nEach of these reaches the target:"
    else:
        yield "\nNone of these reaches the target alone:"
    table = Table(box=None)
    for column in ("change", "KV bytes per token", "at once", "tokens/s"):
        table.add_column(column, justify="left" if column == "change" else "right")
    for change in reaching or answer.changes:
        plan = change.plan
        rate = plan.prediction.decode_tokens_per_s if plan.HasField("prediction") else None
        table.add_row(
            change.change,
            f"{plan.kv_bytes_per_token:,}",
            f"{min(plan.concurrent, plan.max_num_seqs):,}",
            "" if rate is None else f"{rate:,.0f}",
        )
    yield table
    costs: dict[str, list[str]] = {}
    for change in reaching or answer.changes:
        costs.setdefault(change.cost, []).append(change.change)
    for cost, changes in costs.items():
        yield f"{', '.join(changes)}: {cost}"


def _size(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.2f} GiB"
    return f"{num_bytes / 2**20:,.1f} MiB"
