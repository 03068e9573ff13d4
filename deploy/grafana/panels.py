"""The kinds of panels that the dashboard has."""

from dataclasses import dataclass
from typing import Literal

from deploy.grafana.promql import SERIES, per_config, quantile

CONFIGURATION = "{{model}} {{head_config}}"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and the text of its series in the legend."""

    expr: str
    legend: str = CONFIGURATION


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: one that names a variable is shown once for each of its values.
        unit: an id of Grafana's units: `s` seconds, `Bps` bytes per second, `percentunit` a
            ratio, `reqps` requests and `ops` events per second, `short` a count.
        width: columns of 24.
        alarm: the value from which the number is red.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "bars", "heatmap", "table"] = "timeseries"
    width: int = 8
    alarm: float | None = None


def graph(
    title: str,
    description: str,
    unit: str,
    *exprs: str | Query,
    legend: str = CONFIGURATION,
    width: int = 8,
    alarm: float | None = None,
) -> Panel:
    """Lines over time; an expression without a legend of its own has the common one."""
    queries = tuple(Query(expr, legend) if isinstance(expr, str) else expr for expr in exprs)
    return Panel(title, description, unit, queries, width=width, alarm=alarm)


def quantiles(title: str, description: str, histogram: str) -> Panel:
    """p50, p95 and p99 in seconds, by head configuration."""
    queries = (
        Query(quantile(q, histogram), f"p{100 * q:.0f} {CONFIGURATION}") for q in (0.5, 0.95, 0.99)
    )
    return graph(title, description, "s", *queries)


def heatmap(title: str, description: str, histogram: str) -> Panel:
    """How what a histogram observed is spread over its buckets, for one model and head
    configuration."""
    expr = per_config(f"increase({histogram}_bucket{{{SERIES}}}[$__rate_interval])", "le")
    return Panel(title, description, "s", (Query(expr, "{{le}}"),), "heatmap", width=12)


def stat(title: str, description: str, unit: str, expr: str, alarm: float | None = None) -> Panel:
    """One number."""
    return Panel(title, description, unit, (Query(expr, ""),), "stat", width=4, alarm=alarm)


def bars(title: str, description: str, unit: str, expr: str) -> Panel:
    """One bar for each configuration."""
    return Panel(title, description, unit, (Query(expr),), "bars")


def table(title: str, description: str, expr: str) -> Panel:
    """One line for each series, one column for each label."""
    return Panel(title, description, "none", (Query(expr, ""),), "table", width=24)
