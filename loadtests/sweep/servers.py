"""The servers of a sweep: every configuration is up, and only one is given work at a time."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loadtests.checkpoints import write_random_checkpoint
from loadtests.servers import Server, running_server
from loadtests.sweep.plan import Plan
from service.console import require_free_port
from service.runtimes.ray_environment import free_ports

_DRAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one configuration is served.

    Attributes:
        server: the process; under Ray the same for all configurations.
    """

    target: str
    application: str
    metrics_port: int
    server: Server

    def cpu_seconds(self) -> float:
        """CPU time of the server's processes so far."""
        total = 0.0
        for process in self.server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextmanager
def serve_configurations(plan: Plan, directory: Path) -> Iterator[dict[str, Endpoint]]:
    """Serve all configurations of a plan.

    Args:
        directory: where checkpoints of random weights are written.

    Returns:
        The endpoint of each configuration, by its name.

    Raises:
        ServerError: a server ended before it was ready, or did not stop.
    """
    models = _checkpoints(plan, directory)
    metrics_port = plan.metrics_port or _free_row(len(models))
    with ExitStack() as stack:
        if plan.runtime == "ray":
            named = [f"{name}={path}" for name, path in models.items()]
            port, http_port = free_ports(2)
            settings = _settings(plan, metrics_port) | {"http_port": plan.http_port or http_port}
            server = stack.enter_context(running_server("ray", named, plan.port or port, settings))
            yield {
                # A single model keeps its name too: it is given as NAME=DIRECTORY.
                name: Endpoint(server.target, name, metrics_port + index, server)
                for index, name in enumerate(models)
            }
            return
        first = plan.port or _free_row(len(models))
        endpoints: dict[str, Endpoint] = {}
        for index, (name, path) in enumerate(models.items()):
            settings = _settings(plan, metrics_port + index)
            server = stack.enter_context(
                running_server("standalone", [str(path)], first + index, settings)
            )
            endpoints[name] = Endpoint(server.target, "headroom", metrics_port + index, server)
        yield endpoints


def _settings(plan: Plan, metrics_port: int) -> dict[str, Any]:
    engine = {
        name: value for name, value in dataclasses.asdict(plan.engine).items() if value is not None
    }
    return {"engine": engine, "metrics_port": metrics_port, "drain_seconds": _DRAIN_SECONDS}


def _checkpoints(plan: Plan, directory: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for one in plan.configurations:
        paths[one.name] = one.directory or directory / one.name
        if one.directory is None:
            write_random_checkpoint(one.model, paths[one.name], seed=plan.seed)
    return paths


def _free_row(count: int) -> int:
    """The first of so many loopback ports in a row that were free a moment ago."""
    while True:
        first = free_ports(1)[0]
        with contextlib.suppress(OSError):
            for port in range(first, first + count):
                require_free_port("127.0.0.1", port, "a row of ports")
            return first
