"""What a plan needs that its models, its KV budget or this machine do not have."""

from loadtests.sweep.plan import Plan
from loadtests.sweep.source import Source
from loadtests.sweep.spec import MAX_POINTS
from service.console import require_free_port
from service.engine.memory import available_memory

# What a server process takes beside weights and KV cache: torch, Ray, buffers of a step.
_PROCESS_BYTES = 512 * 2**20


def check_plan(plan: Plan, source: Source) -> None:
    """Remember what is too large, or does not fit into a model or its KV cache."""
    num_points = len(plan.configurations) * len(plan.loads) * plan.repeats
    if num_points > MAX_POINTS:
        source.refuse(("loads",), f"make {num_points} measurements; allowed: at most {MAX_POINTS}")
        return
    _check_positions(plan, source)
    _check_budget(plan, source)


def check_machine(plan: Plan, source: Source) -> None:
    """What measuring needs, beside a plan that can run.

    Raises:
        SweepError: this machine has too little memory, or something listens on a port.
    """
    _check_memory(plan, source)
    _check_ports(plan, source)
    source.raise_if_mistaken()


def _check_positions(plan: Plan, source: Source) -> None:
    longest = max(plan.loads, key=lambda load: load.prompt + load.output)
    for one in plan.configurations:
        if longest.prompt + longest.output > one.model.max_position_embeddings:
            source.refuse(
                one.place,
                f"({one.name}) knows {one.model.max_position_embeddings} positions; load "
                f"{longest.name} needs {longest.prompt + longest.output}",
            )


def _check_budget(plan: Plan, source: Source) -> None:
    """One mistake, told by the load and configuration that need most."""
    short: list[tuple[int, str]] = []
    for one in plan.configurations:
        for load in plan.loads:
            if load.prompt + load.output > one.model.max_position_embeddings:
                continue  # refused already
            holds = plan.max_concurrent(one.model, load)
            wanted = 1 if load.waiting else load.clients
            if holds < wanted:
                text = (
                    f"holds {holds} sequences of load {load.name} in configuration {one.name}; "
                    f"needed: {wanted}{', or `waiting: true` in the load' if holds else ''}"
                )
                tokens = wanted * (load.prompt + load.output)
                short.append((tokens * one.model.kv_bytes_per_token(), text))
    if short:
        _, worst = max(short)
        others = f"; {len(short) - 1} more do not fit either" if len(short) > 1 else ""
        source.refuse(
            ("engine", "kv_cache_bytes"),
            f"is {plan.engine.kv_cache_bytes}, which {worst}{others}",
        )


def _check_memory(plan: Plan, source: Source) -> None:
    budget = plan.engine.kv_cache_bytes
    assert budget is not None, "a sweep has a KV budget"
    needed = sum(one.weight_bytes + budget + _PROCESS_BYTES for one in plan.configurations)
    available = available_memory()
    if needed > available:
        source.refuse(
            ("configurations",),
            f"need {needed / 2**30:.1f} GiB together (weights, KV caches and 0.5 GiB for each "
            f"process); available: {available / 2**30:.1f} GiB",
        )


def _check_ports(plan: Plan, source: Source) -> None:
    several = len(plan.configurations)
    counts = {
        "port": several if plan.runtime == "standalone" else 1,
        "http_port": 1 if plan.runtime == "ray" else 0,
        "metrics_port": several,
    }
    taken: dict[int, str] = {}
    for key, count in counts.items():
        first = getattr(plan, key)
        for port in range(first, first + count) if first is not None else ():
            if port in taken:
                source.refuse((key,), f"counts on to {port}, as {taken[port]} does")
            taken[port] = key
            try:
                require_free_port("127.0.0.1", port, key)
            except OSError as error:
                source.refuse((key,), f"is {first}: {error}")
