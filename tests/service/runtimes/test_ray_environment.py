"""What Ray is told before it is imported."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from service.config import ServiceConfig
from service.runtimes.ray_environment import free_ports, ray_environment, set_ray_environment


def test_haproxy_mode_and_limits_are_set(tmp_path: Path) -> None:
    variables = ray_environment(ServiceConfig(max_message_bytes=5000), tmp_path)
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1", "never one without the other"
    assert variables["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] == "5000"
    assert variables["RAY_AUTH_MODE"] == "token"


def test_two_servers_share_no_port_file_or_token(tmp_path: Path) -> None:
    first, second = (
        ray_environment(ServiceConfig(), tmp_path / name) for name in ("first", "second")
    )
    for name in first:
        if name.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE", "_TOKEN")):
            assert first[name] != second[name], name
    ports = [value for name, value in first.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 8


@pytest.mark.alone  # other servers may have taken what it leaves
def test_replicas_get_ports_that_nobody_has(tmp_path: Path) -> None:
    """Ray itself would share them with another server's replicas."""
    names = [f"RAY_SERVE_DIRECT_INGRESS_{end}_GRPC_PORT" for end in ("MIN", "MAX")]
    taken = [port for port in range(40_000, 41_000, 80) if port not in (40_320, 40_400)]
    with contextlib.ExitStack() as stack:
        for port in taken:
            with contextlib.suppress(OSError):  # somebody else has it
                stack.enter_context(socket.create_server(("", port)))
        variables = ray_environment(ServiceConfig(replicas=40), tmp_path)
    low, high = (int(variables[name]) for name in names)
    assert high - low + 1 == 2 * 40 + 8
    assert not [port for port in taken if low <= port <= high]


def test_free_ports_are_distinct_bindable_and_given_to_nobody_unasked() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(19_999 < port < lowest for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert ports[0] not in free_ports(200)


def test_what_the_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_environment(ServiceConfig(), Path()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "4")
    directory = set_ray_environment(ServiceConfig())
    assert os.environ["RAY_SERVE_HAPROXY_NBTHREAD"] == "4"
    assert os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == str(directory / "haproxy.cfg")
    directory.rmdir()
    for name in ray_environment(ServiceConfig(), Path()):
        monkeypatch.delenv(name, raising=False)
