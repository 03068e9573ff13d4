"""Lines that end close to each other can be told apart by their names."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from loadtests.sweep.analysis import analyse
from loadtests.sweep.figures import throughput
from loadtests.sweep.report import write_picture_page
from tests.loadtests.sweep.browser import open_page
from tests.loadtests.sweep.documents import SWEEP, measured, plan

# What a browser drew of the texts at lines and axes: words, colour and edges in pixels.
_SEEN = """<script>addEventListener("load", () => {
  const seen = [...document.querySelectorAll("text.annotation-text, .ytick text")].map(text => {
    const edges = text.getBoundingClientRect(), own = text.querySelector("tspan") ?? text;
    return [text.textContent, getComputedStyle(own).fill,
            edges.left, edges.top, edges.right, edges.bottom];
  });
  document.body.dataset.seen = JSON.stringify(seen);
})</script>"""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Seven configurations that are about equally fast, some of long names."""
    head, rest = SWEEP.split("    heads: 4\n    kv_heads: [4, 2, 1]\n")
    shape = head.split("configurations:\n  - ")[1]
    named = ("as-long-as-names-are", "h4kv1d16-widened-more", "h8kv1d8")
    own = "".join(f"  - name: {name}\n    {shape}    heads: 4\n" for name in named)
    sweep = plan(f"{head}    heads: [2, 4, 8, 16]\n{own}{rest}")
    found = analyse(sweep, measured(sweep))
    del found["quality"]  # as in older files
    return found


def test_names_have_the_colour_and_the_order_of_their_lines(document: dict[str, Any]) -> None:
    figure = throughput(document)
    names = {one["name"] for one in document["spec"]["configurations"]}
    colours = {line.name: line.line.color for line in figure.data}
    assert len(set(colours.values())) == len(names) == 7
    ends = {(line.name, line.yaxis): line.y[-1] for line in figure.data}
    for axis in ("y", "y2"):
        labels = [one for one in figure.layout.annotations if one.showarrow and one.yref == axis]
        shown = {}
        for label in labels:
            colour, name = re.findall(r'<span style="color:(.+)">(.+)</span>', label.text)[0]
            assert colours[name] == colour == label.arrowcolor
            assert label.y == ends[name, axis], "the thin line starts at the point"
            assert (label.ayref, label.yref) == (axis, axis)
            shown[name] = label.ay
        assert set(shown) == names
        assert sorted(shown, key=lambda n: shown[n]) == sorted(
            names, key=lambda n: (ends[n, axis], list(shown).index(n))
        )
        assert max(shown.values()) <= figure.layout[f"yaxis{axis[1:]}"].range[1]


def test_names_cover_neither_each_other_nor_an_axis(
    document: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "throughput.html"
    write_picture_page(document, page)
    page.write_text(page.read_text().replace("</body>", f"{_SEEN}</body>"))
    dom, console = open_page(page, tmp_path / "profile")
    assert console == []
    seen = json.loads(html.unescape(re.findall(r'data-seen="([^"]*)"', dom)[0]))
    names = {one["name"] for one in document["spec"]["configurations"]}
    labels = [text for text in seen if text[0] in names]
    assert len(labels) == 2 * len(names)
    assert len({text[1] for text in labels}) == len(names), "colours as they are drawn"
    for index, (name, _, left, top, right, bottom) in enumerate(labels):
        assert right <= 1400, name
        for other in (*labels[:index], *(text for text in seen if text[0] not in names)):
            apart = (
                other[2] >= right or other[4] <= left or other[3] >= bottom - 3
                or other[5] <= top + 3
            )  # fmt: skip
            assert apart, (name, other[0])
