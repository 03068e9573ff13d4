"""Servers in processes of their own, as a person would start them."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil

CLI = [sys.executable, "-c", "from service.cli import app; app()"]
Runtime = Literal["standalone", "ray"]
_STOP_SECONDS = 60.0


class ServerError(RuntimeError):
    """A server ended before it was ready, or did not stop; the message says which."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        target: where it serves gRPC, as HOST:PORT.
        seconds_to_ready: from its start to its ready line.
    """

    target: str
    process: psutil.Process
    seconds_to_ready: float

    def processes(self) -> list[psutil.Process]:
        """The process that was started, and all below it."""
        return [self.process, *self.process.children(recursive=True)]


@contextmanager
def running_server(
    runtime: Runtime, models: Sequence[str], port: int, settings: Mapping[str, Any]
) -> Iterator[Server]:
    """A server; at the end it gets the signal that a person would send.

    Args:
        models: values of `--model`: one directory, or several NAME=DIRECTORY.
        port: of gRPC, on loopback.
        settings: what else a settings file says.

    Raises:
        ServerError: it ended before it was ready, or did not stop and was killed.
    """
    flags = [part for model in models for part in ("--model", model)]
    arguments = [*CLI, "serve", *flags, "--runtime", runtime, "--port", str(port)]
    with (
        tempfile.NamedTemporaryFile("w", suffix=".yaml") as file,
        tempfile.TemporaryFile("w+") as errors,
    ):
        json.dump(settings, file)  # JSON is YAML
        file.flush()
        started = time.perf_counter()
        process = subprocess.Popen(
            [*arguments, "--config", file.name], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            if not any(line.startswith("ready") for line in process.stdout):
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["it printed nothing"]
                raise ServerError(f"the {runtime} server ended before it was ready: {said[-1]}")
            seconds = time.perf_counter() - started
            yield Server(f"127.0.0.1:{port}", psutil.Process(process.pid), seconds)
        finally:
            _stop(process, runtime)


def _stop(process: subprocess.Popen[str], runtime: Runtime) -> None:
    """Ask a server to stop; kill it, and all that it has started, if it does not."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=_STOP_SECONDS)
    except BaseException as error:  # whoever waits may be interrupted, too
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            text = f"did not stop within {_STOP_SECONDS:g} s and was killed"
            raise ServerError(f"the {runtime} server {text}") from error
        raise
