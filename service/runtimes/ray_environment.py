"""The environment variables that Ray and Ray Serve read when they are imported.

They have to be set before `ray` is imported, in the driver; a local cluster passes them on to its
processes. A cluster that is already running must have been started with those of its nodes.
"""

import contextlib
import os
import random
import secrets
import socket
import tempfile
from pathlib import Path

from service.config import ServiceConfig

# HAProxy takes an ended replica out of its list within this time; until then it is reachable.
DEREGISTER_SECONDS = 2
# Serve's HAProxy ingress. One without the other is another ingress altogether.
_REQUIRED = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")

# Above the ports of Ray's workers, below those that Linux takes for outgoing connections: one of
# those may be gone before the server that was told it has bound it.
_PORTS = range(20_000, 32_768)

# Where Serve gives ports to replicas, on all interfaces. Two servers of a user need different ones:
# Ray 2.60 asks gRPC not to share a port by the text "0", but gRPC wants a number and shares it, and
# each server would get some of the other's calls.
_REPLICA_PORTS = {"GRPC": range(40_000, 41_000), "HTTP": range(30_000, 31_000)}
# Beside those of replicas and of their successors, while both run: for replicas that died.
_SPARE_PORTS = 8


def node_environment(config: ServiceConfig) -> dict[str, str]:
    """Variables that Ray has to be started with on every node of a cluster."""
    return {
        **dict.fromkeys(_REQUIRED, "1"),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.max_message_bytes),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTER_SECONDS),
        # Processes accept each other by a token; without it they run what anybody sends them.
        "RAY_AUTH_MODE": "token",
    }


def ray_environment(config: ServiceConfig, directory: Path) -> dict[str, str]:
    """Variables for one server with a cluster of its own.

    Args:
        directory: where HAProxy keeps its files; one per server, so that several can run.
    """
    stats_port, metrics_port, http_port, grpc_port = free_ports(4)
    replica_ports = {}
    for protocol, ports in _REPLICA_PORTS.items():
        own = _free_range(ports, 2 * config.num_replicas + _SPARE_PORTS)
        replica_ports[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = str(own[0])
        replica_ports[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = str(own[-1])
    return {
        **node_environment(config),
        **replica_ports,
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_port),
        # It exists only in the memory of the cluster's processes.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Workers would be nice: any other process of the machine would slow every step.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }


def set_ray_environment(config: ServiceConfig) -> Path:
    """Set the variables, except those that are set already; returns HAProxy's directory.

    For a cluster that is running: what concerns all, since ports, files and token are its nodes'.
    """
    directory = Path(tempfile.mkdtemp(prefix="headroom-"))
    joins = config.ray_address is not None
    variables = node_environment(config) if joins else ray_environment(config, directory)
    for name, value in variables.items():
        if name in _REQUIRED:
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
    return directory


def free_ports(count: int) -> list[int]:
    """Loopback ports that were free a moment ago, and that the system gives to nobody unasked."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"fewer than {count} ports are free from {_PORTS[0]} to {_PORTS[-1]}")


def _free_range(ports: range, count: int) -> range:
    """So many ports in a row, of which none was taken a moment ago."""
    starts = range(ports.start, ports.stop - count + 1, count)
    for start in random.SystemRandom().sample(starts, len(starts)):
        found = range(start, start + count)
        if all(map(_is_free, found)):
            return found
    raise OSError(f"no {count} ports in a row are free from {ports[0]} to {ports[-1]}")


def _is_free(port: int) -> bool:
    """On all interfaces."""
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True
