"""Two nodes of a Ray cluster: both serve; one is lost, and comes back."""

import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import grpc
import psutil
import pytest

from service.client import Client, HeadroomError, ReplicaLostError
from tests.integration.nodes import Node, two_nodes
from tests.integration.processes import Process

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
_CLI = ("-c", "from service.cli import app; app()")
_NODE_ENV = Path(__file__).parents[2] / "deploy" / "ray" / "node.env"
_PORTS = (9000, 8000, 9464)  # gRPC, HTTP, metrics: a node is a machine, and has all of its ports
_STREAM_TOKENS = 1000
# How soon the head knows that a node is lost; Ray's own numbers are made for slow networks.
_WATCHFUL = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}


def _environment(node: Node, token: Path) -> dict[str, str]:
    """As documented, and with files of its own, which two machines would have anyhow."""
    lines = [line for line in _NODE_ENV.read_text().splitlines() if line and line[0] != "#"]
    files = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    }
    return {
        **dict(line.split("=", 1) for line in lines),
        **{name: str(node.files / file) for name, file in files.items()},
        **_WATCHFUL,
        "RAY_AUTH_TOKEN_PATH": str(token),
    }


def _start(node: Node, token: Path, *flags: str) -> Process:
    """`ray start` with one CPU, that is room for one replica."""
    ray = str(Path(sys.executable).parent / "ray")
    fixed = ["--block", "--num-cpus=1", "--object-store-memory=100000000"]
    address = f"--node-ip-address={node.address}"
    return node.run(_environment(node, token), ray, "start", *fixed, address, *flags)


def _until(reached: Callable[[], bool], server: Process) -> None:
    deadline = time.monotonic() + 90
    while not reached():
        assert time.monotonic() < deadline, server.output
        time.sleep(0.1)


def _num_replicas(node: Process) -> int:
    return sum(each.name().startswith("ray::ServeRepli") for each in node.family())


def _answered(node: Node) -> bool:
    with Client(f"{node.address}:9000") as client:
        try:
            return len(client.complete([1], max_tokens=2, ignore_eos=True).token_ids) == 2
        except HeadroomError:
            return False


def _num_requests(node: Node) -> float:
    """Of the replica on a node, by its metrics; 0 while there is none."""
    try:
        with urllib.request.urlopen(f"http://{node.address}:9464/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except urllib.error.URLError:
        return 0
    counts = [line for line in lines if line.startswith("headroom_request_success_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in counts)


class Stream(Thread):
    """Reads one long stream through a node's HAProxy."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._target = f"{node.address}:9000"
        self.num_tokens = 0
        self.error: HeadroomError | None = None

    def run(self) -> None:
        with Client(self._target) as client:
            stream = client.generate([1], max_tokens=_STREAM_TOKENS, ignore_eos=True)
            try:
                for _ in stream:
                    self.num_tokens = len(stream.token_ids)
            except HeadroomError as error:
                self.error = error
            self.num_tokens = len(stream.token_ids)


def _kill(worker: Process) -> None:
    """As when its machine loses power; nothing is told to anybody."""
    for process in (*worker.family(), psutil.Process(worker.pid)):
        process.kill()


def test_two_nodes_serve_and_survive_the_loss_of_one(model_path: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    with two_nodes() as (first, second):
        address = f"{first.address}:6379"
        join = f"--address={address}"
        with _start(first, token, "--head", "--port=6379", "--include-dashboard=false") as head:
            _until(lambda: first.listens(6379), head)
            arguments = {
                "--model": model_path,
                "--ray-address": address,
                "--host": "0.0.0.0",  # of a namespace
                "--replicas": 2,
            }
            flags = [str(part) for pair in arguments.items() for part in pair]
            serve = (*_CLI, "serve", "--allow-insecure", *flags)
            environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            with _start(second, token, join) as worker:
                worker.wait_for(lambda line: "block forever" in line)
                with first.run(environment, *serve) as server:
                    server.wait_for(lambda line: line.startswith("ready"), seconds=150)
                    assert [_num_replicas(node) for node in (head, worker)] == [1, 1]
                    _check_loss(first, second, server, worker)
                    with _start(second, token, join) as returned:
                        _check_return(first, second, server, returned)
                        server.signal(signal.SIGINT)
                        assert server.wait() == 0, server.output
                        assert [_num_replicas(node) for node in (head, returned)] == [0, 0]
                        for node in (first, second):
                            assert not [port for port in _PORTS if node.listens(port)]


def _check_loss(first: Node, second: Node, server: Process, worker: Process) -> None:
    streams = [Stream(node) for node in (first, second) for _ in range(2)]
    for stream in streams:
        stream.start()
    _until(lambda: all(stream.num_tokens for stream in streams), server)
    before = [_num_requests(node) for node in (first, second)]
    _kill(worker)
    # What HAProxy had given to the lost node is lost with it; what comes after is answered.
    answers = [_answered(first) for _ in range(24)]
    assert sum(answers) >= 21
    assert all(answers[-12:])
    assert before == [0, 0], "all streams were open"
    for stream in streams:
        stream.join()
    lost = [stream for stream in streams if stream.error is not None]
    # Those through the lost HAProxy, and those of the other that the lost replica had got.
    assert {id(stream) for stream in streams[2:]} <= {id(stream) for stream in lost}
    for stream in lost:
        assert stream.error is not None
        unavailable = stream.error.code is grpc.StatusCode.UNAVAILABLE
        assert unavailable or isinstance(stream.error, ReplicaLostError)
    assert all(s.num_tokens == _STREAM_TOKENS for s in streams if s.error is None)
    assert not second.listens(9000)


def _check_return(first: Node, second: Node, server: Process, worker: Process) -> None:
    _until(lambda: _answered(second), server)
    _until(lambda: _num_replicas(worker) == 1, server)

    def shared() -> bool:
        assert _answered(second)
        return _num_requests(second) > 0

    _until(shared, server)
    assert _answered(first)
