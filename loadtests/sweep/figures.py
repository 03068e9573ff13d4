"""The figures of a report. Colours and markers are the same for a configuration everywhere."""

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loadtests.sweep.drawing import (
    GREY,
    Document,
    clients_axis,
    colour_of,
    contexts_of,
    finish,
    label_ends,
    label_room,
    line_of,
    log_axis,
    names_of,
    style_of,
    title_of,
)

_MIB = 2**20
# Pixels that a page gives a figure, and that the values and the title of an axis take of them.
_WIDTH = 1160
_AXIS = 50


def throughput(document: Document, height: int = 430) -> go.Figure:
    """Output tokens per second against clients, one panel per prompt and output length."""
    contexts = contexts_of(document)
    right = label_room(names_of(document))
    between = (right + _AXIS) / (_WIDTH - right)
    figure = make_subplots(
        cols=len(contexts), subplot_titles=[title_of(context) for context in contexts],
        horizontal_spacing=min(between, 0.6 / max(len(contexts) - 1, 1)),
    )  # fmt: skip
    for column, context in enumerate(contexts, 1):
        ends: dict[str, tuple[float, float]] = {}
        most = 0.0
        for name in names_of(document):
            points = line_of(document, name, context, "output_tokens_per_s")
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
                **style_of(document, name),
                showlegend=False,
                row=1,
                col=column,
            )
            if points:
                ends[name] = (points[-1]["clients"], rates[-1])
                most = max(most, *(high for _, high in ranges))
        figure.update_yaxes(range=[0, 1.05 * most or 1.0], row=1, col=column)
        label_ends(figure, document, ends, column)
        clients_axis(figure, document, context, row=1, col=column)
    figure.update_yaxes(title_text="output tokens/s", row=1, col=1)
    return finish(figure, height, right=right)


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
                **style_of(document, name) | {"mode": "markers+text"},
                text=[name], textposition="top center", showlegend=False, row=1, col=column,
            )  # fmt: skip
    context = title_of((load["prompt"], load["output"]))
    figure.update_xaxes(title_text="KV bytes per token", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(
        title_text=f"output tokens/s, {load['clients']} clients, {context}", rangemode="tozero",
        row=1, col=2,
    )  # fmt: skip
    figure.update_yaxes(title_text="bits per byte", row=1, col=1)
    return finish(figure, 430, right=60)


def latency(document: Document, name: str, title: str) -> go.Figure:
    """Percentiles of one latency against clients: a row per percentile, a column per context."""
    contexts, percentiles = contexts_of(document), ("p50", "p95", "p99")
    figure = make_subplots(
        rows=len(percentiles), cols=len(contexts), shared_xaxes=True, vertical_spacing=0.05,
        column_titles=[title_of(context) for context in contexts],
    )  # fmt: skip
    for column, context in enumerate(contexts, 1):
        for row, percentile in enumerate(percentiles, 1):
            shown: list[float | None] = []
            for configuration in names_of(document):
                points = line_of(document, configuration, context, "output_tokens_per_s")
                values = [point[name][percentile] for point in points]
                shown += values
                figure.add_scatter(
                    x=[point["clients"] for point in points],
                    y=values,
                    **style_of(document, configuration),
                    showlegend=row == column == 1,
                    row=row,
                    col=column,
                )
            figure.update_yaxes(log_axis(shown), row=row, col=column)
            last = row == len(percentiles)
            clients_axis(figure, document, context, row=row, col=column, title=last)
    for row, percentile in enumerate(percentiles, 1):
        figure.update_yaxes(title_text=f"{title} {percentile}, ms", row=row, col=1)
    return finish(figure, 760)


def memory(document: Document) -> go.Figure:
    """KV bytes per token, and how many sequences the KV budget holds at once."""
    contexts = contexts_of(document)
    figure = make_subplots(
        cols=1 + len(contexts), shared_yaxes=True, horizontal_spacing=0.06,
        subplot_titles=["KV bytes per token"]
        + [f"sequences of {prompt} + {output} tokens" for prompt, output in contexts],
    )  # fmt: skip
    names = names_of(document)
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
            marker_color=[colour_of(document, name) for name in names],
            text=[f"{value:,}" for value in values], textposition="outside", cliponaxis=False,
        )  # fmt: skip
        figure.update_xaxes(range=[0, 1.35 * max(values)], nticks=4, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    return finish(figure, 130 + 30 * len(names))


def step_time(document: Document) -> go.Figure:
    """Decode step time against the keys and values it reads, what the fit says, its residuals."""
    figure = make_subplots(
        rows=2, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.65, 0.35]
    )  # fmt: skip
    decodes = [point["decode"] for point in document["points"] if point["decode"]]
    for name in names_of(document):
        points = [p for p in document["points"] if p["configuration"] == name and p["decode"]]
        points.sort(key=lambda point: point["decode"]["kv_bytes"])
        if not points:
            continue
        read = [point["decode"]["kv_bytes"] / _MIB for point in points]
        style = style_of(document, name) | {"mode": "markers"}
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
            level, line={"color": GREY, "width": 1, "dash": "dot" if level else "solid"},
            row=2, col=1,
        )  # fmt: skip
    figure.update_xaxes(log_axis(decode["kv_bytes"] / _MIB for decode in decodes))
    figure.update_yaxes(log_axis(1000 * decode["step_s"] for decode in decodes), row=1, col=1)
    figure.update_xaxes(title_text="keys and values read per step, MiB", row=2, col=1)
    figure.update_yaxes(title_text="decode step, ms", row=1, col=1)
    figure.update_yaxes(title_text="fit less measured, %", row=2, col=1)
    return finish(figure, 620)


def ratios(document: Document) -> go.Figure:
    """Measured gain in decode rate over the first configuration, against the predicted one."""
    figure = go.Figure()
    rows = document["ratios"]
    values = [row[key] for row in rows for key in ("decode", "bytes", "fit") if row[key]]
    low, high = (min(values) / 1.15, max(values) * 1.15) if values else (0.5, 2.0)
    for factor, dash in ((1.0, "solid"), (1.2, "dot"), (1 / 1.2, "dot")):
        figure.add_scatter(
            x=[low, high], y=[low / factor, high / factor], mode="lines", showlegend=False,
            line={"color": GREY, "width": 1, "dash": dash}, hoverinfo="skip",
        )  # fmt: skip
    for name in names_of(document)[1:]:
        own = [row for row in rows if row["configuration"] == name]
        style = style_of(document, name) | {"mode": "markers"}
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
    axis = log_axis(values) | {"range": [math.log10(low), math.log10(high)]}
    figure.update_xaxes(axis, title_text="predicted times as fast")
    figure.update_yaxes(axis, title_text="measured times as fast")
    return finish(figure, 520)
