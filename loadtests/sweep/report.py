"""The report of a sweep: one HTML file that needs no network, and a Markdown table."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
import plotly.offline
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from loadtests.sweep import figures
from loadtests.sweep.fits import MAX_SLOPE_SPREAD, MIN_R2, TOLERANCE

_CONFIG = {"displayModeBar": False, "responsive": True}


def write_report(document: dict[str, Any], directory: Path) -> None:
    """Write report.html and report.md into the folder of the results."""
    environment = _environment()
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.j2").render(_context(document))
        (directory / name).write_text(text, encoding="utf-8")


def write_picture_page(document: dict[str, Any], file: Path) -> None:
    """Write a page that holds one compact figure, to be photographed."""
    template = _environment().get_template("throughput.html.j2")
    figure = figures.throughput(document, height=420)
    # Not all that a report needs: the files of older sweeps lack some of it.
    page = template.render(doc=document, figure=figure, plotlyjs=_plotlyjs())
    file.write_text(page, encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loadtests.sweep"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": _number,
        "gain": lambda value: "–" if value is None else f"{value:.2f}",
        "percent": lambda value: "–" if value is None else f"{100 * value:+.0f} %",
        "met": lambda value: {True: "met", False: "not met", None: "cannot be said"}[value],
        "mib": lambda value: "–" if value is None else f"{value / 2**20:,.1f}",
        "plot": _plot,
    }
    return environment


def _context(document: dict[str, Any]) -> dict[str, Any]:
    points = {(point["configuration"], point["load"]): point for point in document["points"]}
    return {
        "doc": document,
        "spec": document["spec"],
        "configurations": document["spec"]["configurations"],
        "loads": document["spec"]["loads"],
        "points": points,
        "figures": figures,
        "plotlyjs": _plotlyjs(),
        "tolerance": TOLERANCE,
        "min_r2": MIN_R2,
        "max_spread": MAX_SLOPE_SPREAD,
        "quality": document["quality"],
        "steps_off": [
            point
            for point in document["points"]
            if point["decode"] and abs(point["decode"]["prediction_off"] or 0) > TOLERANCE
        ],
        "planned_off": [
            point
            for point in document["points"]
            if point["decode"]
            and point["decode"]["planned"]
            and abs(point["decode"]["planned"]["off"]) > TOLERANCE
        ],
        "unplanned": [p for p in document["points"] if p["decode"] and not p["decode"]["planned"]],
        "planned": [p for p in document["points"] if p["decode"] and p["decode"]["planned"]],
        "arithmetic": [
            point
            for point in document["points"]
            if point["decode"] and point["decode"]["arithmetic_bound"]
        ],
        "not_counted": [point for point in document["points"] if point["not_counted"]],
    }


def _plotlyjs() -> Markup:
    return Markup(plotly.offline.get_plotlyjs())  # noqa: S704, a library's own code


def _plot(figure: go.Figure) -> Markup:
    """A figure as a `div` and its script; plotly.js is in the page already."""
    html = plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, config=_CONFIG)
    return Markup(html)  # noqa: S704, plotly escapes what it is given


def _number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, never in exponents; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(digits - len(f"{abs(value):.0f}"), 0) if abs(value) >= 1 else digits
    return f"{value:,.{decimals}f}"
