"""A summary, for people."""

from rich.console import Group, RenderableType
from rich.table import Table

from loadtests.load import Distribution, LoadSpec, LoadSummary

_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def summary_table(spec: LoadSpec, summary: LoadSummary) -> RenderableType:
    """How it was asked, how much came, and how long it took."""
    times = Table("ms", box=None)
    for column in _COLUMNS:
        times.add_column(column, justify="right")
    rows = {
        "TTFT": summary.ttft_ms,
        "ITL": summary.itl_ms,
        "TPOT": summary.tpot_ms,
        "E2E": summary.e2e_ms,
    }
    if spec.rate is not None:
        rows["sent late by"] = summary.delay_ms
    for name, values in rows.items():
        times.add_row(name, *_cells(values))
    totals = Table(show_header=False, box=None)
    for name, text in _facts(spec, summary).items():
        totals.add_row(name, text)
    return Group(totals, "", times)


def _facts(spec: LoadSpec, summary: LoadSummary) -> dict[str, str]:
    counts = [f"{count} {reason}" for reason, count in summary.finish_reasons.items()]
    counts += [f"{count} failed with {code}" for code, count in summary.failures.items()]
    if summary.failures:
        counts.append(f"{summary.rejects_with_retry_info} said when to try again")
    workload = spec.workload
    return {
        "load": f"{_load(spec)}; prompt {workload.prompt}, output {workload.output}, seed "
        f"{workload.seed}",
        "requests": f"{summary.requests} in {summary.seconds:.1f} s: {', '.join(counts)}",
        "rate": f"{summary.requests_per_s:.2f} requests/s, "
        f"{summary.output_tokens_per_s:.1f} output tokens/s",
        "client": f"{summary.client_cpu:.2f} of one core at its busiest{_wait(summary)}"
        + (", too much: do not count this run" if summary.client_bound else ""),
    }


def _wait(summary: LoadSummary) -> str:
    if summary.client_wait is None:
        return ""
    return f", waited {summary.client_wait:.3f} s per second for a core"


def _load(spec: LoadSpec) -> str:
    if spec.rate is None:
        return f"closed loop, {spec.shape}, {spec.users} users"
    return (
        f"open loop, {spec.shape}, {spec.rate:g} requests/s by at most {spec.users} users; times "
        "count from the arrival"
    )


def stage_table(spec: LoadSpec, summary: LoadSummary) -> Table:
    """A row for each stage."""
    table = Table(box=None)
    unit = "users" if spec.rate is None else "rate/s"
    for name in (
        "from, s", unit, "begun", "failed", "req/s", "tok/s",
        "TTFT p50", "p99", "E2E p50", "p99",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for stage in summary.stages:
        table.add_row(
            f"{stage.start:.1f}",
            f"{stage.load:.1f}",
            str(stage.started),
            str(stage.failed),
            f"{stage.served_per_s:.2f}",
            f"{stage.output_tokens_per_s:.1f}",
            *(_cells(stage.ttft_ms)[at] for at in (1, 4)),
            *(_cells(stage.e2e_ms)[at] for at in (1, 4)),
        )
    return table


def _cells(values: Distribution | None) -> list[str]:
    if values is None:
        return ["-"] * len(_COLUMNS)
    return [f"{getattr(values, column):.1f}" for column in _COLUMNS]
