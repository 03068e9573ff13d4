"""Two machines made of network namespaces, which share a wire and nothing else of the network."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.processes import Process

_ROOT = Path(__file__).parents[2]
_IP = shutil.which("ip")


@dataclass(frozen=True, slots=True)
class Node:
    """A namespace with an address of its own, and processes that run in it.

    Attributes:
        files: a folder for them alone; the path of a socket may have 97 characters, and pytest's
            folders have long names.
    """

    namespace: str
    address: str
    files: Path

    def run(self, environment: dict[str, str], *command: str) -> Process:
        variables = [f"{name}={value}" for name, value in environment.items()]
        inside = ["netns", "exec", self.namespace, "env", f"PYTHONPATH={_ROOT}", *variables]
        return Process(*inside, sys.executable, *command, program=Path(_IP or "ip"))

    def listens(self, port: int) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.address, port), 5):
            return True
        return False


def _ip(*arguments: str) -> None:
    subprocess.run([_IP or "ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Both are reached from here; skips the test where namespaces cannot be made."""
    if _IP is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    name = f"hr{secrets.token_hex(3)}"
    # Of the network for benchmarks of devices (RFC 2544), which nobody routes.
    network = f"198.18.{secrets.randbelow(256)}"
    with contextlib.ExitStack() as stack:
        try:
            _ip("link", "add", name, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made: {error.stderr.strip()}")
        stack.callback(_ip, "link", "delete", name)
        _ip("address", "add", f"{network}.254/24", "dev", name)
        _ip("link", "set", name, "up")
        nodes = []
        for number in (1, 2):
            namespace, wire = f"{name}-{number}", f"{name}{number}"
            files = Path(tempfile.mkdtemp())
            stack.callback(shutil.rmtree, files)
            _ip("netns", "add", namespace)
            stack.callback(_ip, "netns", "delete", namespace)
            _ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", wire, "master", name, "up")
            node = Node(namespace, f"{network}.{number}", files)
            _ip("-netns", namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-netns", namespace, "link", "set", device, "up")
            nodes.append(node)
        yield nodes[0], nodes[1]
