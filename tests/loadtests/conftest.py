"""Servers to put a load on: one whose times are known, and the real one."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from loadtests.servers import running_server
from service.runtimes.ray_environment import free_ports
from tests.integration.processes import Process

PACED_MAX_OPEN = 12
MAX_WAITING = 6


@dataclass(frozen=True, slots=True)
class RealServer:
    target: str
    metrics_url: str


@pytest.fixture(scope="session")
def paced_target() -> Iterator[str]:
    (port,) = free_ports(1)
    arguments = ("-m", "tests.loadtests.paced_server", str(port), str(PACED_MAX_OPEN))
    with Process(*arguments) as process:
        process.wait_for(lambda line: line == "ready")
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def real_server() -> Iterator[RealServer]:
    """The demo model, few sequences at once, and a short queue."""
    port, metrics_port = free_ports(2)
    settings = {
        "metrics_port": metrics_port,
        "engine": {"num_threads": 1, "max_num_seqs": 4, "max_waiting_requests": MAX_WAITING},
    }
    with running_server("standalone", ["demo"], port, settings) as server:
        yield RealServer(server.target, f"http://127.0.0.1:{metrics_port}/metrics")
