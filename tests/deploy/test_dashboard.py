"""The dashboard: what its generator writes, and consistent with itself and with the rules."""

import json
import re
from typing import Any

import yaml

from deploy.grafana.dashboard import FILE, TTFT_TARGET, dashboard_json
from deploy.grafana.rows import ROWS

DEPLOY = FILE.parent.parent
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(f"{p['title']} {t['refId']}", t["expr"]) for p in PANELS for t in p["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def test_the_dashboard_is_what_its_generator_writes() -> None:
    assert FILE.read_text() == dashboard_json(), "run: python -m deploy.grafana.dashboard"


def test_every_panel_has_a_place_of_its_own() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_panel_has_title_description_and_unit() -> None:
    for panel in PANELS:
        assert panel["title"], panel
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_nothing_is_bound_to_one_installation() -> None:
    """Data source, job, application and replica are chosen, and every query uses the choice."""
    uids = re.findall(r'"uid": "([^"]*)"', FILE.read_text())
    assert set(uids) == {"${datasource}", "headroom"}
    for name, expr in QUERIES:
        for label in ("job", "application", "instance") * ("ALERTS{" not in expr):
            assert f'{label}=~"${label}"' in expr, name
        assert not re.search(r'job="', expr), name


def test_the_target_of_the_goodput_is_that_of_the_alerts() -> None:
    recording = (DEPLOY / "prometheus" / "recording.yml").read_text()
    assert set(re.findall(r'le="([^"]+)"', recording)) == {TTFT_TARGET}
    assert VARIABLES["ttft_target"]["current"]["value"] == TTFT_TARGET


def test_grafana_finds_the_interval_of_the_scrapes() -> None:
    """Rates over less than four scrapes would have gaps; Grafana derives them from this."""
    scrapes = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]
    provisioned = DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    source = yaml.safe_load(provisioned.read_text())["datasources"][0]
    assert source["jsonData"]["timeInterval"] == scrapes["scrape_interval"]


def test_what_two_configurations_do_is_never_one_line() -> None:
    """Every sum of the rows about a model is of one model and one head configuration; single
    numbers are of all that is chosen, and an alert or a process belongs to no model."""
    rows = ("Overview", "Latency", "Latency of $model", "Engine", "KV cache")
    panels = [(row, panel) for row in rows for panel in ROWS[row]]
    for row, panel in panels:
        for query in panel.queries:
            if panel.title in ("Alerts", "Replicas"):
                continue
            for label in ("model", "head_config"):
                assert f'{label}=~"${label}"' in query.expr, (row, panel.title)
            if panel.kind == "stat":
                continue
            sums = re.findall(r"\b(?:sum|avg|max|count)\b(?: by \(([^)]*)\))?", query.expr)
            for labels in sums:
                assert {"model", "head_config"} <= set(labels.split(", ")), (row, panel.title)


def test_a_title_that_names_a_variable_is_repeated_for_its_values() -> None:
    """A heatmap draws only one of several histograms."""
    for panel in DASHBOARD["panels"]:
        names = re.findall(r"\$(\w+)", panel["title"])
        assert panel.get("repeat") == (names[0] if names else None), panel["title"]
        assert panel["type"] != "heatmap" or names == ["head_config"], panel["title"]
