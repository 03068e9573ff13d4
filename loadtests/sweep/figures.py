"""The figures of a report. Colours and markers are the same for a configuration everywhere."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import plotly.graph_objects as go
from plotly.subplots import make_subplots

Document: TypeAlias = dict[str, Any]
# Paul Tol's bright and muted schemes: distinct for colour-blind readers, on white and on black.
_COLOURS = (
    "#4477AA", "#EE6677", "#228833", "#AA3377", "#CC8800", "#44AAAA", "#999999", "#7755CC",
    "#CC6677", "#888833",
)  # fmt: skip
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
_GRID = "rgba(128,128,128,0.25)"
_GREY = "rgba(128,128,128,0.8)"
_MIB = 2**20
# Labels at the ends of lines are so far apart at least, as a share of the height.
_LABEL_GAP = 0.075


def throughput(document: Document, height: int = 430) -> go.Figure:
    """Output tokens per second against clients, one panel per prompt and output length."""
    contexts = _contexts(document)
    figure = make_subplots(
        cols=len(contexts), subplot_titles=[_title(context) for context in contexts],
        horizontal_spacing=0.7 / (1 + 2 * len(contexts)),
    )  # fmt: skip
    for column, context in enumerate(contexts, 1):
        ends: dict[str, tuple[float, float]] = {}
        for name in _names(document):
            points = _line(document, name, context, "output_tokens_per_s")
            rates = [point["output_tokens_per_s"] for point in points]
            ranges = [point["output_tokens_per_s_range"] for point in points]
            figure.add_scatter(
                x=[point["clients"] for point in points],
                y=rates,
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [most - rate for rate, (_, most) in zip(rates, ranges, strict=True)],
                    "arrayminus": [
                        rate - least for rate, (least, _) in zip(rates, ranges, strict=True)
                    ],
                    "thickness": 1,
                },
                **_style(document, name),
                showlegend=False,
                row=1,
                col=column,
            )
            if points:
                ends[name] = (points[-1]["clients"], rates[-1])
        _label_ends(figure, ends, column)
        _clients_axis(figure, document, context, row=1, col=column)
        figure.update_yaxes(rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title_text="output tokens/s", row=1, col=1)
    return _finish(figure, height, right=160)


def speed_and_loss(document: Document) -> go.Figure:
    """Bits per byte of each checkpoint against its KV bytes per token, and against its output
    tokens per second under the load with the most tokens in flight."""
    load = max(document["spec"]["loads"], key=lambda one: one["clients"] * one["prompt"])
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.06)
    for one in document["spec"]["configurations"]:
        name = one["name"]
        if name not in document["quality"]:
            continue
        (rate,) = (
            point["output_tokens_per_s"]
            for point in document["points"]
            if (point["configuration"], point["load"]) == (name, load["name"])
        )
        for column, x in enumerate((one["kv_bytes_per_token"], rate), 1):
            figure.add_scatter(
                x=[x], y=[document["quality"][name]["bits_per_byte"]],
                **_style(document, name) | {"mode": "markers+text"},
                text=[name], textposition="top center", showlegend=False, row=1, col=column,
            )  # fmt: skip
    context = _title((load["prompt"], load["output"]))
    figure.update_xaxes(title_text="KV bytes per token", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(
        title_text=f"output tokens/s, {load['clients']} clients, {context}", rangemode="tozero",
        row=1, col=2,
    )  # fmt: skip
    figure.update_yaxes(title_text="bits per byte", row=1, col=1)
    return _finish(figure, 430, right=60)


def latency(document: Document, name: str, title: str) -> go.Figure:
    """Percentiles of one latency against clients: a row per percentile, a column per context."""
    contexts, percentiles = _contexts(document), ("p50", "p95", "p99")
    figure = make_subplots(
        rows=len(percentiles), cols=len(contexts), shared_xaxes=True, vertical_spacing=0.05,
        column_titles=[_title(context) for context in contexts],
    )  # fmt: skip
    for column, context in enumerate(contexts, 1):
        for row, percentile in enumerate(percentiles, 1):
            shown: list[float | None] = []
            for configuration in _names(document):
                points = _line(document, configuration, context, "output_tokens_per_s")
                values = [point[name][percentile] for point in points]
                shown += values
                figure.add_scatter(
                    x=[point["clients"] for point in points],
                    y=values,
                    **_style(document, configuration),
                    showlegend=row == column == 1,
                    row=row,
                    col=column,
                )
            figure.update_yaxes(_log_axis(shown), row=row, col=column)
            last = row == len(percentiles)
            _clients_axis(figure, document, context, row=row, col=column, title=last)
    for row, percentile in enumerate(percentiles, 1):
        figure.update_yaxes(title_text=f"{title} {percentile}, ms", row=row, col=1)
    return _finish(figure, 760)


def memory(document: Document) -> go.Figure:
    """KV bytes per token, and how many sequences the KV budget holds at once."""
    contexts = _contexts(document)
    figure = make_subplots(
        cols=1 + len(contexts), shared_yaxes=True, horizontal_spacing=0.06,
        subplot_titles=["KV bytes per token"]
        + [f"sequences of {prompt} + {output} tokens" for prompt, output in contexts],
    )  # fmt: skip
    names = _names(document)
    per_token = [one["kv_bytes_per_token"] for one in document["spec"]["configurations"]]
    columns = [per_token]
    for context in contexts:
        held = {
            row["configuration"]: row["sequences"]
            for row in document["max_concurrent"]
            if (row["prompt"], row["output"]) == context
        }
        columns.append([held[name] for name in names])
    for column, values in enumerate(columns, 1):
        figure.add_bar(
            x=values, y=names, orientation="h", showlegend=False, row=1, col=column,
            marker_color=[_colour(document, name) for name in names],
            text=[f"{value:,}" for value in values], textposition="outside", cliponaxis=False,
        )  # fmt: skip
        figure.update_xaxes(range=[0, 1.35 * max(values)], nticks=4, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    return _finish(figure, 130 + 30 * len(names))


def step_time(document: Document) -> go.Figure:
    """Decode step time against the keys and values it reads, what the fit says, its residuals."""
    figure = make_subplots(
        rows=2, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.65, 0.35]
    )  # fmt: skip
    decodes = [point["decode"] for point in document["points"] if point["decode"]]
    for name in _names(document):
        points = [p for p in document["points"] if p["configuration"] == name and p["decode"]]
        points.sort(key=lambda point: point["decode"]["kv_bytes"])
        if not points:
            continue
        read = [point["decode"]["kv_bytes"] / _MIB for point in points]
        style = _style(document, name) | {"mode": "markers"}
        figure.add_scatter(
            x=read, y=[1000 * point["decode"]["step_s"] for point in points], **style, row=1, col=1
        )
        if not document["step_model"]:
            continue
        figure.add_scatter(
            x=read, y=[1000 * point["decode"]["predicted_s"] for point in points],
            **style | {"marker": style["marker"] | {"symbol": f"{style['marker']['symbol']}-open"}},
            showlegend=False, row=1, col=1,
        )  # fmt: skip
        off = [100 * point["decode"]["prediction_off"] for point in points]
        figure.add_scatter(x=read, y=off, **style, showlegend=False, row=2, col=1)
    for level in (-20, 0, 20):
        figure.add_hline(
            level, line={"color": _GREY, "width": 1, "dash": "dot" if level else "solid"},
            row=2, col=1,
        )  # fmt: skip
    figure.update_xaxes(_log_axis(decode["kv_bytes"] / _MIB for decode in decodes))
    figure.update_yaxes(_log_axis(1000 * decode["step_s"] for decode in decodes), row=1, col=1)
    figure.update_xaxes(title_text="keys and values read per step, MiB", row=2, col=1)
    figure.update_yaxes(title_text="decode step, ms", row=1, col=1)
    figure.update_yaxes(title_text="fit less measured, %", row=2, col=1)
    return _finish(figure, 620)


def ratios(document: Document) -> go.Figure:
    """Measured gain in decode rate over the first configuration, against the predicted one."""
    figure = go.Figure()
    rows = document["ratios"]
    values = [row[key] for row in rows for key in ("decode", "bytes", "fit") if row[key]]
    low, high = (min(values) / 1.15, max(values) * 1.15) if values else (0.5, 2.0)
    for factor, dash in ((1.0, "solid"), (1.2, "dot"), (1 / 1.2, "dot")):
        figure.add_scatter(
            x=[low, high], y=[low / factor, high / factor], mode="lines", showlegend=False,
            line={"color": _GREY, "width": 1, "dash": dash}, hoverinfo="skip",
        )  # fmt: skip
    for name in _names(document)[1:]:
        own = [row for row in rows if row["configuration"] == name]
        style = _style(document, name) | {"mode": "markers"}
        for key, suffix in (("fit", ""), ("bytes", "-open")):
            shown = [row for row in own if row[key]]
            figure.add_scatter(
                x=[row[key] for row in shown],
                y=[row["decode"] for row in shown],
                text=[row["load"] for row in shown],
                **style | {
                    "marker": style["marker"] | {"symbol": style["marker"]["symbol"] + suffix},
                    "name": f"{name}, by {'the fit' if key == 'fit' else 'bytes alone'}",
                },
            )  # fmt: skip
    axis = _log_axis(values) | {"range": [math.log10(low), math.log10(high)]}
    figure.update_xaxes(axis, title_text="predicted times as fast")
    figure.update_yaxes(axis, title_text="measured times as fast")
    return _finish(figure, 520)


def _log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """A logarithmic axis with ticks at round numbers, more of them where little is in sight."""
    seen = [value for value in values if value]
    if not seen:
        return {"type": "log"}
    digits = (1, 2, 5) if max(seen) / min(seen) > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    exponents = range(math.floor(math.log10(min(seen))) - 1, math.ceil(math.log10(max(seen))) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def _names(document: Document) -> list[str]:
    return [one["name"] for one in document["spec"]["configurations"]]


def _contexts(document: Document) -> list[tuple[int, int]]:
    loads = document["spec"]["loads"]
    return list(dict.fromkeys((load["prompt"], load["output"]) for load in loads))


def _title(context: tuple[int, int]) -> str:
    return f"{context[0]} prompt + {context[1]} output tokens"


def _line(
    document: Document, name: str, context: tuple[int, int], needed: str
) -> list[dict[str, Any]]:
    """The measured points of a configuration in one context, by clients."""
    points = [
        point
        for point in document["points"]
        if point["configuration"] == name
        and (point["prompt"], point["output"]) == context
        and point[needed] is not None
    ]
    return sorted(points, key=lambda point: point["clients"])


def _colour(document: Document, name: str) -> str:
    return _COLOURS[_names(document).index(name) % len(_COLOURS)]


def _style(document: Document, name: str) -> dict[str, Any]:
    marker = _MARKERS[_names(document).index(name) % len(_MARKERS)]
    return {
        "name": name,
        "mode": "lines+markers",
        "legendgroup": name,
        "line": {"color": _colour(document, name), "width": 2},
        "marker": {"color": _colour(document, name), "symbol": marker, "size": 8},
    }


def _label_ends(figure: go.Figure, ends: dict[str, tuple[float, float]], column: int) -> None:
    """Names beside the last points, moved apart where they would overlap."""
    top = max((y for _, y in ends.values()), default=1.0)
    at = -1.0
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        at = max(y / top, at + _LABEL_GAP)
        figure.add_annotation(
            x=math.log10(x), y=at * top, text=name, xanchor="left", xshift=8, showarrow=False,
            row=1, col=column,
        )  # fmt: skip


def _clients_axis(
    figure: go.Figure,
    document: Document,
    context: tuple[int, int],
    *,
    row: int,
    col: int,
    title: bool = True,
) -> None:
    loads: Sequence[dict[str, Any]] = document["spec"]["loads"]
    ticks = sorted({x["clients"] for x in loads if (x["prompt"], x["output"]) == context})
    figure.update_xaxes(
        type="log", tickvals=ticks, title_text="clients" if title else None, row=row, col=col,
        range=[math.log10(ticks[0]) - 0.08, math.log10(ticks[-1]) + 0.08],
    )  # fmt: skip


def _finish(figure: go.Figure, height: int, right: int = 20) -> go.Figure:
    figure.update_layout(
        height=height, margin={"l": 70, "r": right, "t": 50, "b": 55}, template="none",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#555"},
        legend={"orientation": "v", "x": 1.01, "y": 1, "xanchor": "left"},
    )  # fmt: skip
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, linecolor=_GREY, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, linecolor=_GREY, automargin=True)
    return figure
