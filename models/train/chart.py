"""Lines over two axes as a picture: SVG that needs nothing from outside."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT = 720, 400, 56, 48, 24
_LEGEND_TOP, _LEGEND_ROW, _LEGEND_COLUMN, _LEGEND_COLUMNS = 28, 18, 150, 4
_MAX_Y_STEPS = 10
# With markers points can be told apart; many would hide the line.
_MAX_MARKERS = 12


@dataclass(frozen=True, slots=True)
class Line:
    """One line, and its place in the legend.

    Attributes:
        points: x and y of each.
        colour: as SVG says it.
        dashes: lengths of dashes and gaps, as SVG says them; empty is a whole line.
        band: lowest and highest y at each point, drawn behind the line; empty is none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashes: str = ""
    band: Sequence[tuple[float, float]] = ()


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_name: str,
    y_name: str,
    x_ticks: Sequence[float],
    y_from: float = 0.0,
    log_x: bool = False,
) -> str:
    """An SVG on white, whatever the page's own colour is.

    Args:
        x_ticks: where the x axis is named; its ends belong to them.
        y_from: where the y axis begins, below the highest point; it ends at the whole step above
            that.
        log_x: equal factors, not equal differences, take equal room.
    """
    edges = [edge for line in lines for _, edge in (*line.points, *line.band)]
    highest = max(edges)
    step = _step(highest - y_from)
    num_steps = max(math.ceil((highest - y_from) / step), 1)
    top = _LEGEND_TOP + _LEGEND_ROW * (-(-len(lines) // _LEGEND_COLUMNS) - 1) + 12
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - top - _BOTTOM
    scale: Callable[[float], float] = math.log if log_x else float
    first, last = scale(min(x_ticks)), scale(max(x_ticks))

    def x(value: float) -> float:
        return _LEFT + width * (scale(value) - first) / (last - first)

    def y(value: float) -> float:
        return top + height * (1 - (value - y_from) / (num_steps * step))

    def pairs(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="#333"><title>{escape(title)}</title>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="16" font-size="14">{escape(title)}</text>',
    ]
    for index in range(num_steps + 1):
        value = y_from + index * step
        parts.append(
            f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text x="{x(tick):.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{tick:,}</text>'
        )
    parts.append(
        f'<text x="{_LEFT + width / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
        f'<text transform="translate(14 {top + height / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_name)}</text>'
    )
    for line in lines:
        if line.band:
            places = [at for at, _ in line.points]
            low, high = (
                list(zip(places, edge, strict=True)) for edge in zip(*line.band, strict=True)
            )
            parts.append(
                f'<polygon points="{pairs(low)} {pairs(high[::-1])}" fill="{line.colour}" '
                'fill-opacity="0.2"/>'
            )
    for index, line in enumerate(lines):
        row, column = divmod(index, _LEGEND_COLUMNS)
        left, middle = _LEFT + _LEGEND_COLUMN * column, _LEGEND_TOP + _LEGEND_ROW * row
        stroke = f'stroke="{line.colour}" stroke-width="2"'
        if line.dashes:
            stroke += f' stroke-dasharray="{line.dashes}"'
        parts.append(
            f'<polyline points="{pairs(line.points)}" fill="none" {stroke}/>'
            f'<path d="M{left} {middle}h20" {stroke}/>'
            f'<text x="{left + 26}" y="{middle + 4}">{escape(line.name)}</text>'
        )
        if len(line.points) <= _MAX_MARKERS:
            parts += [
                f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{line.colour}"/>'
                for at, value in line.points
            ]
    return "\n".join([*parts, "</svg>\n"])


def _step(span: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that divides a span into few parts."""
    power = 10.0 ** math.floor(math.log10(span / _MAX_Y_STEPS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * _MAX_Y_STEPS >= span)
