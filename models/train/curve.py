"""The losses of a training as a picture."""

from collections.abc import Sequence

from models.train.chart import Line, line_chart
from models.train.state import Point

_LINES = (
    ("loss", "training", "#4477AA"),
    ("validation_loss", "validation", "#EE6677"),
    ("repeat_loss", "second half of repeats", "#228833"),
)


def loss_curve(points: Sequence[Point], title: str) -> str:
    """An SVG: losses in nats per token over steps, from 0 up to the highest one."""
    last = max(point.step for point in points)
    return line_chart(
        [
            Line(name, [(point.step, getattr(point, field)) for point in points], colour)
            for field, name, colour in _LINES
        ],
        title=title,
        x_name="step",
        y_name="nats per token",
        x_ticks=[round(last * share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
    )
