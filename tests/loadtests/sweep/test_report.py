"""The report opens in a real browser, without network and without a word on the console."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from loadtests.sweep.analysis import analyse
from loadtests.sweep.report import write_report
from tests.loadtests.sweep.browser import open_page
from tests.loadtests.sweep.documents import SWEEP, measured, plan

NUM_FIGURES = 6


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return analyse(plan(), measured(plan()))


def test_the_page_draws_every_figure_and_the_console_is_silent(
    document: dict[str, Any], tmp_path: Path
) -> None:
    write_report(document, tmp_path)
    dom, console = open_page(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert dom.count('class="plotly-graph-div js-plotly-plot"') == NUM_FIGURES
    assert dom.count("main-svg") >= NUM_FIGURES
    assert "<td>h4kv1d16</td>" in dom
    # What a file or a machine says is text, not markup.
    assert "2 x &lt;b&gt;none&lt;/b&gt;" in dom
    assert "headroom sweep &lt;sweep.yaml&gt;" in dom


@pytest.mark.parametrize(
    "broken",
    [
        "<script>throw new Error('broken')</script>",
        "<script>console.error('broken')</script>",
        "<script>Promise.reject(new Error('broken'))</script>",
        "<script src='https://cdn.example/plotly.js'></script>",
        "<img src='missing.png'>",
    ],
)
def test_the_console_would_show_a_broken_page(broken: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>page</title><link rel=icon href=data:,>{broken}")
    _, console = open_page(page, tmp_path / "profile")
    assert console


@pytest.mark.parametrize(
    "change",
    [
        ("kv_heads: [4, 2, 1]", "kv_heads: 4"),  # nothing to compare with
        ("prompt: [16, 128]", "prompt: 16"),  # one panel
    ],
)
def test_small_sweeps_have_a_report_too(change: tuple[str, str], tmp_path: Path) -> None:
    small = plan(SWEEP.replace(*change))
    write_report(analyse(small, measured(small)), tmp_path)
    _, console = open_page(tmp_path / "report.html", tmp_path / "profile")
    assert console == []


def test_points_without_counted_runs_are_dashes(tmp_path: Path) -> None:
    document = measured(plan())
    for run in document["runs"]:
        if run["configuration"] == "h4kv2d16":
            run["why_not_counted"] = "requests failed: 1 UNAVAILABLE"
    write_report(analyse(plan(), document), tmp_path)
    _, console = open_page(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    table = (tmp_path / "report.md").read_text()
    assert re.search(r"\| h4kv2d16 \| GQA \| same shape \| [\d,]+ \| 512 \|( – \|){4}\n", table)
    assert "3 of 3 runs (requests failed: 1 UNAVAILABLE" in table


def test_what_a_fit_has_to_reach_is_said_plainly(tmp_path: Path) -> None:
    """For each fit, over its points; and every plan that misses, with what binds it."""
    document = measured(plan())
    for run in document["runs"]:
        if run["configuration"] == "h4kv1d16" and run["load"].startswith("c4"):
            run["server"]["decode_seconds"] *= 2
    document = analyse(plan(), document)
    write_report(document, tmp_path)
    html = (tmp_path / "report.html").read_text()
    markdown = (tmp_path / "report.md").read_text()
    for text in (html, markdown):
        assert "R² ≥ 0.95" in text
        assert "within 15 %" in text
    (row,) = (line for line in markdown.splitlines() if "| all points |" in line)
    r2 = document["step_model"]["r2"]
    assert "| all points | 12 |" in row
    assert f"| {r2:.3f} | {'met' if r2 >= 0.95 else 'not met'} |" in row
    assert row.endswith("| not met |")
    missed = [
        f"- {point['load']} {point['configuration']}: "
        for point in document["points"]
        if point["decode"]["planned"] and abs(point["decode"]["planned"]["off"]) > 0.2
    ]
    assert missed
    shown = [line for line in markdown.splitlines() if line.startswith("- ")]
    assert [line[: len(start)] for line, start in zip(shown, missed, strict=True)] == missed
    unplanned = sum(point["decode"]["planned"] is None for point in document["points"])
    assert unplanned > 0
    assert f"{unplanned} points have no plan: " in markdown
    assert f"{unplanned} points have no plan: " in html
    slow = [line for line in shown if "h4kv1d16" in line]
    assert slow
    assert all(line.endswith(": bound by arithmetic") for line in slow)


def test_the_table_is_markdown(document: dict[str, Any], tmp_path: Path) -> None:
    write_report(document, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in rows[:5]}) == 1, "columns as the header has"
    gains, fits = rows[5:15], rows[15:]
    assert len({line.count("|") for line in gains}) == 1
    assert len({line.count("|") for line in fits}) == 1
    assert [line.split("|")[2].strip() for line in fits[2:]] == [
        "all points",
        "points not bound by arithmetic",
    ]
    assert not any(left == right == "" for left, right in itertools.pairwise(lines))
