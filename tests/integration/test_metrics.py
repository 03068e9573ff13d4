"""A real Prometheus scrapes two Ray replicas, and says what their clients saw."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest

from protos.headroom.v1 import generation_pb2_grpc
from service.config import ServiceConfig
from service.metrics.targets import write_targets
from service.runtimes.ray_environment import free_ports
from tests.integration.processes import Process
from tests.prometheus import Prometheus, running_prometheus
from tests.traffic import Seen, greedy, save_model

pytestmark = pytest.mark.ray


@dataclass(frozen=True, slots=True)
class Monitored:
    host: Process
    target: str
    prometheus: Prometheus

    def total(self, name: str, **labels: str) -> float:
        """The sum over both replicas."""
        matchers = ",".join(f'{label}="{value}"' for label, value in labels.items())
        ((_, value),) = self.prometheus.query(f"sum({name}{{{matchers}}})")
        return value

    def wait_for(self, promql: str, value: float) -> None:
        self.prometheus.wait_for(promql, lambda found: [v for _, v in found] == [value])


def _port_row(count: int) -> int:
    """The first of some free ports in a row."""
    free = sorted(free_ports(2000))
    return next(
        first
        for first, last in zip(free, free[count - 1 :], strict=False)
        if last - first == count - 1
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    directory = tmp_path_factory.mktemp("monitored")
    port, http_port = free_ports(2)
    settings = {
        "model": str(save_model(directory)),
        "port": port,
        "http_port": http_port,
        "metrics_port": _port_row(2),
        "replicas": 2,
        "engine": {"num_threads": 1, "max_model_len": 512},
    }
    targets = directory / "targets.json"
    write_targets(targets, ServiceConfig(**settings).metrics_addresses)  # type: ignore[arg-type]
    with (
        Process("-m", "tests.integration.ray_host", json.dumps(settings)) as host,
        running_prometheus(directory, targets) as prometheus,
    ):
        host.wait_for(lambda line: line == "ready")
        yield Monitored(host, f"127.0.0.1:{port}", prometheus)
        host.end_of_input()
        assert host.wait() == 0, host.output


async def test_prometheus_says_what_clients_saw(server: Monitored) -> None:
    server.wait_for('sum(up{application="headroom"})', 2)
    seen = Seen()
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        await seen.everything(stub)
        server.wait_for("sum(headroom_request_success_total)", seen.reasons.total())
        server.wait_for("sum(headroom_requests_rejected_total)", seen.refused.total())
        seen.check_ends(server.total)
        seen.check_tokens(server.total)
        for _ in range(5):
            await seen.cancel(stub)
    server.wait_for("sum(headroom_request_success_total)", seen.reasons.total())
    seen.check_ends(server.total)
    by_replica = server.prometheus.query("sum by (instance) (headroom_request_success_total)")
    assert len(by_replica) == 2
    assert all(count > 0 for _, count in by_replica), "both replicas had requests"
    for labels, _ in server.prometheus.query("headroom_model_info"):
        assert (labels["model"], labels["head_config"]) == ("tiny-gqa", "h4kv2d16")
        assert "exported_model" not in labels


async def test_new_replicas_get_the_ports_of_the_old_ones(server: Monitored) -> None:
    starts = "process_start_time_seconds and on (instance) up == 1"
    before = {labels["instance"]: start for labels, start in server.prometheus.query(starts)}
    assert len(before) == 2
    server.host.lines.clear()
    server.host.write(json.dumps({"stall_seconds": 29}))
    server.host.wait_for(lambda line: line == "deployed")
    server.prometheus.wait_for(
        starts,
        lambda found: (
            len(found) == 2 and all(start > before[labels["instance"]] for labels, start in found)
        ),
    )
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        seen = Seen()
        for _ in range(8):
            await seen.generate(stub, greedy([1], max_tokens=4))
    server.wait_for("sum(headroom_generation_tokens_total)", 32)
