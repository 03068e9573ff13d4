"""A real server under traffic, a real Prometheus with our rules, and every query people see."""

import itertools
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml

from service.client import Client, HeadroomError
from service.runtimes.ray_environment import free_ports
from tests.deploy.test_dashboard import DEPLOY, QUERIES, VARIABLES
from tests.integration.processes import Process
from tests.prometheus import Prometheus, Sample, running_prometheus

RULES = [DEPLOY / "prometheus" / f"{name}.yml" for name in ("recording", "alerts")]
WINDOWS = ("5m", "30m", "1h", "6h")
# A healthy server that has room shows 0 here; everything else has to move.
MAY_BE_ZERO = {
    "Error ratio A",
    "Alerts A",
    "Running and waiting B",
    "Age of the current step A",
    "Preemptions A",
    "head_config:headroom_requests_rejected:rate5m",
    *(f"head_config:headroom_time_to_first_token_slow:ratio_rate{w}" for w in WINDOWS),
}
SECONDS = 30


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("monitoring")
    targets, settings = directory / "targets.json", directory / "settings.yml"
    settings.write_text("engine: {enable_prefix_caching: true, num_threads: 1}")
    port, metrics_port = free_ports(2)
    arguments = [
        *("--runtime", "standalone", "--config", str(settings), "--port", str(port)),
        *("--metrics-port", str(metrics_port), "--metrics-targets", str(targets)),
    ]
    with Process("-c", "from service.cli import app; app()", "serve", *arguments) as server:
        server.wait_for(lambda line: line.startswith("ready"))
        with running_prometheus(directory, targets, rules=RULES) as prometheus:
            prometheus.wait_for('up{application!=""}', lambda rows: bool(rows) and rows[0][1] == 1)
            with traffic(f"127.0.0.1:{port}"):
                yield prometheus


@contextmanager
def traffic(target: str) -> Iterator[None]:
    """Two clients that stream one answer after the other, some of them refused."""
    stop = threading.Event()

    def client() -> None:
        with Client(target) as client:
            for number in itertools.count():
                if stop.is_set():
                    return
                for _ in client.generate(f"{'import os' * 20} {number % 4}", max_tokens=32):
                    pass
                with pytest.raises(HeadroomError):
                    client.complete("", max_tokens=1)

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in clients:
            thread.join()


def choices(prometheus: Prometheus) -> dict[str, str]:
    """What Grafana puts in place of each variable when everything is selected."""
    chosen = {"__rate_interval": "10s"}
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert query is not None, variable["query"]
            selector, label = substitute(query[1], chosen), query[2]
            values = prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": selector})
            assert values["data"], f"variable {name} has no value"
            default = variable["current"]["value"]
            chosen[name] = "|".join(values["data"]) if variable["multi"] else default
            assert variable["multi"] or default in values["data"], name
    return chosen


def substitute(text: str, chosen: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: chosen[match[1]], text)


def until_all_have_data(prometheus: Prometheus, expressions: dict[str, str]) -> None:
    deadline = time.monotonic() + SECONDS
    missing = expressions
    while missing := {
        name: expr for name, expr in missing.items() if not has_data(name, prometheus.query(expr))
    }:
        assert time.monotonic() < deadline, f"no data: {missing}"
        time.sleep(0.2)


def has_data(name: str, rows: list[Sample]) -> bool:
    values = [value for _, value in rows if not math.isnan(value)]
    return bool(values) and (name in MAY_BE_ZERO or any(values))


def test_every_query_of_the_dashboard_has_data(prometheus: Prometheus) -> None:
    chosen = choices(prometheus)
    until_all_have_data(prometheus, {name: substitute(expr, chosen) for name, expr in QUERIES})


def test_every_recording_rule_has_data_by_model_and_head_configuration(
    prometheus: Prometheus,
) -> None:
    groups = yaml.safe_load(RULES[0].read_text())["groups"]
    records = [rule["record"] for group in groups for rule in group["rules"]]
    selector = '{application="headroom",model="demo",head_config="h8kv8d32"}'
    until_all_have_data(prometheus, {name: name + selector for name in records})


def test_every_series_that_an_alert_looks_at_exists(prometheus: Prometheus) -> None:
    """Else an alert would be silent for ever, and its rule test would not know."""
    groups = yaml.safe_load(RULES[1].read_text())["groups"]
    for rule in itertools.chain.from_iterable(group["rules"] for group in groups):
        selectors = re.findall(
            r"\b(?:headroom_[\w:]*|grpc_\w*|up\b|head_config:[\w:]*)(?:{[^}]*})?", rule["expr"]
        )
        assert selectors, rule["alert"]
        for selector in selectors:
            prometheus.wait_for(selector, bool)


def test_no_alert_fires_on_a_healthy_server(prometheus: Prometheus) -> None:
    prometheus.wait_for("head_config:headroom_generation_tokens:rate5m", bool)
    groups = prometheus.get("/api/v1/rules")["data"]["groups"]
    assert [rule for group in groups for rule in group["rules"] if "lastError" in rule] == []
    assert prometheus.query('ALERTS{alertstate="firing"}') == []
