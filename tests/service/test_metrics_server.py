"""The port of a replica's metrics and health: taken, freed, changed, closed; its target file."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from service.config import ServiceConfig
from service.metrics.server import MetricsServer
from service.metrics.targets import write_targets
from service.runtimes.ray_environment import free_ports
from tests.serving import running_server


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("headroom_test", "A test.", registry=registry).inc(3, exemplar={"request_id": "a"})
    return registry


def _get(port: int, accept: str = "*/*") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            if reached():
                return
        except urllib.error.URLError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _until_answers(port: int) -> None:
    _until(lambda: "headroom_test_total 3.0" in _get(port))


def test_openmetrics_is_an_answer_to_those_who_ask(registry: CollectorRegistry) -> None:
    (port,) = free_ports(1)
    with MetricsServer(registry, "127.0.0.1", lambda: port):
        assert "request_id" not in _get(port)
        answer = _get(port, "application/openmetrics-text; version=1.0.0")
        assert 'headroom_test_total 3.0 # {request_id="a"}' in answer
        assert answer.endswith("# EOF\n")
    socket.create_server(("127.0.0.1", port)).close()


def test_probes_are_told_how_the_replica_is(registry: CollectorRegistry) -> None:
    (port,) = free_ports(1)
    is_ready = False

    def ask(path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    states = {"/-/healthz": lambda: True, "/-/ready": lambda: is_ready}
    with MetricsServer(registry, "127.0.0.1", lambda: port, states):
        assert ask("/-/healthz") == (200, b"yes\n")
        assert ask("/-/ready") == (503, b"no\n")
        is_ready = True
        assert ask("/-/ready") == (200, b"yes\n")
        assert ask("/metrics")[0] == 200


async def test_a_replica_that_drains_is_healthy_and_not_ready(model_path: Path) -> None:
    async with running_server(model_path) as server:
        healthy, ready = server.states.values()
        assert (healthy(), ready()) == (True, True)
        await server.engine.drain(0)
        assert (healthy(), ready()) == (True, False)
        await server.engine.shutdown()
        assert (healthy(), ready()) == (False, False)


def test_a_taken_port_is_waited_for(registry: CollectorRegistry) -> None:
    (port,) = free_ports(1)
    first = MetricsServer(registry, "127.0.0.1", lambda: port)
    first.start()
    other = CollectorRegistry()
    Counter("headroom_other", "Another.", registry=other)
    with MetricsServer(other, "127.0.0.1", lambda: port):
        assert "headroom_test_total" in _get(port)
        first.close()
        _until(lambda: "headroom_other_total" in _get(port))


def test_a_port_may_change_or_be_none(registry: CollectorRegistry) -> None:
    first, second = free_ports(2)
    wanted: list[int | None] = [None]
    with MetricsServer(registry, "127.0.0.1", lambda: wanted[0]):
        with pytest.raises(urllib.error.URLError):
            _get(first)
        for port in (first, second):
            wanted[0] = port
            _until_answers(port)
        with pytest.raises(urllib.error.URLError):
            _get(first)


def test_targets_name_all_replicas_of_all_applications(tmp_path: Path) -> None:
    config = ServiceConfig(model={"mha": "demo", "mqa": "demo"}, replicas=2, metrics_port=20000)
    file = tmp_path / "targets.json"
    file.write_text("of an earlier server")
    write_targets(file, config.metrics_addresses)
    assert json.loads(file.read_text()) == [
        {
            "targets": ["127.0.0.1:20000", "127.0.0.1:20001"],
            "labels": {"application": "mha"},
        },
        {
            "targets": ["127.0.0.1:20002", "127.0.0.1:20003"],
            "labels": {"application": "mqa"},
        },
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["targets.json"]


def test_without_a_port_nothing_is_served() -> None:
    config = ServiceConfig(metrics_port=0, replicas=3)
    assert list(config.metrics_ports) == []
    assert config.metrics_addresses == {"headroom": []}
    assert [
        one.metrics_port
        for one in ServiceConfig(model={"a": "x", "b": "y"}, metrics_port=0).applications
    ] == [0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"port": 9465, "replicas": 2},
            "port is 9465, which is one of the ports from metrics_port",
        ),
        ({"http_port": 9464}, "http_port is 9464, which is one of the ports from metrics_port"),
        ({"metrics_port": 65535, "replicas": 2}, "metrics_port is 65535; allowed: at most 65534"),
        ({"metrics_port": 0, "metrics_targets": "x"}, "only with a metrics_port"),
        ({"metrics_port": -1}, "greater than or equal to 0"),
    ],
)
def test_ports_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServiceConfig(**settings)  # type: ignore[arg-type]
