"""What the figures of a report share: how a configuration looks, axes, names at lines."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import plotly.graph_objects as go

Document: TypeAlias = dict[str, Any]
# Paul Tol's bright and muted schemes: distinct for colour-blind readers, on white and on black.
_COLOURS = (
    "#4477AA", "#EE6677", "#228833", "#AA3377", "#CC8800", "#44AAAA", "#999999", "#7755CC",
    "#CC6677", "#888833",
)  # fmt: skip
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
_GRID = "rgba(128,128,128,0.25)"
GREY = "rgba(128,128,128,0.8)"
# Names at the ends of lines are so far apart at least, as a share of the panel's height, and so
# many pixels from their points; a character is so wide.
_LABEL_GAP = 0.06
_LABEL_SHIFT = 26
_CHARACTER = 8


def log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """A logarithmic axis with ticks at round numbers, more of them where little is in sight."""
    seen = [value for value in values if value]
    if not seen:
        return {"type": "log"}
    digits = (1, 2, 5) if max(seen) / min(seen) > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    exponents = range(math.floor(math.log10(min(seen))) - 1, math.ceil(math.log10(max(seen))) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def names_of(document: Document) -> list[str]:
    return [one["name"] for one in document["spec"]["configurations"]]


def contexts_of(document: Document) -> list[tuple[int, int]]:
    loads = document["spec"]["loads"]
    return list(dict.fromkeys((load["prompt"], load["output"]) for load in loads))


def title_of(context: tuple[int, int]) -> str:
    return f"{context[0]} prompt + {context[1]} output tokens"


def line_of(
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


def colour_of(document: Document, name: str) -> str:
    return _COLOURS[names_of(document).index(name) % len(_COLOURS)]


def style_of(document: Document, name: str) -> dict[str, Any]:
    marker = _MARKERS[names_of(document).index(name) % len(_MARKERS)]
    return {
        "name": name,
        "mode": "lines+markers",
        "legendgroup": name,
        "line": {"color": colour_of(document, name), "width": 2},
        "marker": {"color": colour_of(document, name), "symbol": marker, "size": 8},
    }


def label_room(names: Sequence[str]) -> int:
    """Pixels beside a panel that the names at the ends of its lines take."""
    return _LABEL_SHIFT + _CHARACTER * max(map(len, names), default=0)


def label_ends(
    figure: go.Figure, document: Document, ends: dict[str, tuple[float, float]], column: int
) -> None:
    """Names beside the last points, each in the colour of its line and, where several end close
    to each other, moved apart, in the order of the ends, with a thin line to its own.

    Args:
        ends: clients and value of the last point of each configuration.
    """
    if not ends:
        return
    number = column if column > 1 else ""
    height = figure.layout[f"yaxis{number}"].range[1]
    ordered = sorted(ends.items(), key=lambda end: end[1][1])
    places: list[float] = []
    for _, (_, y) in ordered:
        places.append(max(y, places[-1] + _LABEL_GAP * height) if places else y)
    for index in range(len(places)):  # none above the panel
        most = (1 - _LABEL_GAP * (len(places) - 1 - index)) * height
        places[index] = min(places[index], most)
    for (name, (x, y)), place in zip(ordered, places, strict=True):
        colour = colour_of(document, name)
        figure.add_annotation(
            x=math.log10(x), y=y, ax=_LABEL_SHIFT, ay=place, ayref=f"y{number}",
            # In the text itself, because pages colour all text of a figure as their own.
            text=f'<span style="color:{colour}">{name}</span>', xanchor="left", borderpad=0,
            showarrow=True, arrowhead=0, arrowwidth=1, arrowcolor=colour, standoff=6,
            row=1, col=column,
        )  # fmt: skip


def clients_axis(
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


def finish(figure: go.Figure, height: int, right: int = 20) -> go.Figure:
    figure.update_layout(
        height=height, margin={"l": 70, "r": right, "t": 50, "b": 55}, template="none",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#555"},
        legend={"orientation": "v", "x": 1.01, "y": 1, "xanchor": "left"},
    )  # fmt: skip
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, linecolor=GREY, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, linecolor=GREY, automargin=True)
    return figure
