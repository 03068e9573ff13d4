"""Writes `headroom.json`, the Grafana dashboard, from `rows.py`.

python -m deploy.grafana.dashboard
"""

import itertools
import json
import re
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders.common import GraphThresholdsStyleConfig, VizTooltipOptions
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    FieldColor,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.panels import Panel, Query
from deploy.grafana.rows import ROWS

FILE = Path(__file__).parent / "headroom.json"
# The bucket that the alerts on the first token use; see deploy/prometheus/recording.yml.
TTFT_TARGET = "1.683"
# What is chosen narrows what follows; the values are those that the label has in the metric.
_VARIABLES = {
    "job": ("headroom_build_info", "Job"),
    "application": ('headroom_build_info{job=~"$job"}', "Application"),
    "model": ('headroom_model_info{job=~"$job",application=~"$application"}', "Model"),
    "head_config": (
        'headroom_model_info{job=~"$job",application=~"$application",model=~"$model"}',
        "Head configuration",
    ),
    "instance": (
        'headroom_model_info{job=~"$job",application=~"$application",model=~"$model",'
        'head_config=~"$head_config"}',
        "Replica",
    ),
}
_DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_Builder = timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel | bargauge.Panel
_Repeatable = TypeVar("_Repeatable", Row, _Builder)
_HEIGHTS = {"stat": 4, "table": 6}


def dashboard_json() -> str:
    """The dashboard as Grafana imports it."""
    dashboard = (
        Dashboard("Headroom")
        .uid("headroom")
        .description("Latency, throughput, queue and KV cache by model and head configuration.")
        .tags(["headroom"])
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for name, (metric, label) in _VARIABLES.items():
        dashboard.with_variable(
            _query_variable(name, f"label_values({metric}, {name})")
            .label(label)
            .multi(True)
            .include_all(True)
            .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
        )
    dashboard.with_variable(
        _query_variable(
            "ttft_target", "label_values(headroom_time_to_first_token_seconds_bucket, le)"
        )
        .label("First token within, s")
        .sort(VariableSort.NUMERICAL_ASC)
        .current(VariableOption(selected=True, text=TTFT_TARGET, value=TTFT_TARGET))
    )
    ids = itertools.count(1)
    for title, panels in ROWS.items():
        dashboard.with_row(_repeated(Row(title), title).id(next(ids)))
        for panel in panels:
            dashboard.with_panel(_panel(panel).id(next(ids)))
    built = dashboard.build()
    for variable in built.templating.list_val or ():
        # Of intervals, which none of these is; Grafana's schema does not know them elsewhere.
        variable.auto = variable.auto_min = variable.auto_count = None
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _query_variable(name: str, query: str) -> QueryVariable:
    return (
        QueryVariable(name)
        .datasource(_DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _repeated(builder: _Repeatable, title: str) -> _Repeatable:
    """Shown once for each value of the variable that its title names."""
    variable = re.search(r"\$(\w+)", title)
    return builder if variable is None else builder.repeat(variable[1])


def _panel(panel: Panel) -> _Builder:
    builder = _repeated(_builder(panel), panel.title)
    builder.title(panel.title).description(panel.description).unit(panel.unit)
    builder.datasource(_DATASOURCE).span(panel.width).height(_HEIGHTS.get(panel.kind, 8))
    if panel.alarm is None:
        builder.color_scheme(FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC))
    else:
        steps = [Threshold(None, "green"), Threshold(panel.alarm, "red")]
        builder.thresholds(ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    for number, query in enumerate(panel.queries):
        builder.with_target(_target(query, panel.kind).ref_id(chr(ord("A") + number)))
    return builder


def _builder(panel: Panel) -> _Builder:
    match panel.kind:
        case "timeseries":
            tooltip = VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
            lines = timeseries.Panel().min(0).fill_opacity(8).tooltip(tooltip)
            if panel.alarm is None:
                return lines
            mode = GraphThresholdsStyleMode.LINE
            return lines.thresholds_style(GraphThresholdsStyleConfig().mode(mode))
        case "stat":
            return stat.Panel()
        case "bars":
            return bargauge.Panel().min(0)
        case "heatmap":
            return heatmap.Panel().y_axis(heatmap.YAxisConfig().unit(panel.unit)).hide_legend()
        case "table":
            only_labels = DataTransformerConfig(
                id_val="organize", options={"excludeByName": {"Time": True, "Value": True}}
            )
            return table.Panel().with_transformation(only_labels)


def _target(query: Query, kind: str) -> Dataquery:
    target = Dataquery().datasource(_DATASOURCE).expr(query.expr).legend_format(query.legend)
    if kind == "table":
        return target.instant().format(PromQueryFormat.TABLE)
    if kind == "heatmap":
        return target.range().format(PromQueryFormat.HEATMAP)
    return target.range().format(PromQueryFormat.TIME_SERIES)


if __name__ == "__main__":
    FILE.write_text(dashboard_json(), encoding="utf-8")
