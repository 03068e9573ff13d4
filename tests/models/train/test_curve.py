"""The picture of the losses is valid XML, and its points are where the numbers say."""

from xml.etree import ElementTree

import pytest

from models.train.curve import loss_curve
from models.train.state import Point

POINTS = [
    Point(10, 8.0, 7.5, 9.5, 1.0),
    Point(20, 4.0, 5.0, 5.0, 2.0),
    Point(40, 2.0, 3.0, 0.0, 4.0),
]
SVG = "{http://www.w3.org/2000/svg}"


def test_points_are_where_the_numbers_say() -> None:
    root = ElementTree.fromstring(loss_curve(POINTS, "a < b"))
    assert root.findtext(f"{SVG}title") == "a < b"
    lines = [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        for line in root.iter(f"{SVG}polyline")
    ]
    assert len(lines) == 3
    # The frame is 640 x 312 at (56, 40); the axes go to step 40 and 10 nats.
    for field, line in zip(("loss", "validation_loss", "repeat_loss"), lines, strict=True):
        expected = [
            (56 + 640 * p.step / 40, 40 + 312 * (1 - getattr(p, field) / 10)) for p in POINTS
        ]
        assert [x for x, _ in line] == pytest.approx([x for x, _ in expected], abs=0.1)
        assert [y for _, y in line] == pytest.approx([y for _, y in expected], abs=0.1)


def test_it_needs_nothing_from_outside() -> None:
    assert "http" not in loss_curve(POINTS, "losses").replace("http://www.w3.org/2000/svg", "")
