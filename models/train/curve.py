"""The losses of a training as a picture."""

import math
from collections.abc import Sequence
from html import escape

from models.train.state import Point

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 400, 56, 48, 40, 16
_LINES = (
    ("loss", "training", "#4477AA"),
    ("validation_loss", "validation", "#EE6677"),
    ("repeat_loss", "second half of repeats", "#228833"),
)


def loss_curve(points: Sequence[Point], title: str) -> str:
    """An SVG: losses in nats per token over steps, from 0 up to the highest one."""
    last = max(point.step for point in points)
    highest: int = math.ceil(max(getattr(p, field) for p in points for field, _, _ in _LINES))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + width * step / last

    def y(loss: float) -> float:
        return _TOP + height * (1 - loss / highest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="#333"><title>{escape(title)}</title>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="16" font-size="14">{escape(title)}</text>',
    ]
    for loss in range(highest + 1):
        parts.append(
            f'<path d="M{_LEFT} {y(loss):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>'
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        step = round(last * share)
        parts.append(
            f'<text x="{x(step):.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{step}</text>'
        )
    parts.append(
        f'<text x="{_LEFT + width / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">step</text>'
        f'<text transform="translate(14 {_TOP + height / 2:.0f}) rotate(-90)" '
        'text-anchor="middle">nats per token</text>'
    )
    for index, (field, name, colour) in enumerate(_LINES):
        line = " ".join(f"{x(p.step):.1f},{y(getattr(p, field)):.1f}" for p in points)
        left = _LEFT + 150 * index
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<path d="M{left} 28h20" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{left + 26}" y="32">{name}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
