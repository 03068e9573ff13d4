"""Put a load on a server, and say what its clients saw.

    python -m loadtests.run --target 127.0.0.1:9000 --users 32 --requests 64

locust runs in a process of its own, because it patches the standard library.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtests.load import LoadSpec, LoadSummary
from loadtests.options import to_options
from loadtests.summary import from_dict

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
# What is open may go on for so long after the page's stop; workers are ready again only then.
_WEB_STOP_SECONDS = 10


class LoadError(RuntimeError):
    """The load did not take place; the message says what locust printed."""


def run_load(
    spec: LoadSpec, samples: Path | None = None, on_progress: Callable[[int], None] | None = None
) -> LoadSummary:
    """Run a load from its first request to its last.

    Args:
        samples: file for one line per request.
        on_progress: called about every second with the number of requests that ended.

    Raises:
        ValueError: the load has no end.
        LoadError: locust failed.
    """
    if spec.num_requests is None and spec.seconds is None:
        raise ValueError("num_requests and seconds are None; allowed: at least one of them")
    command = locust_command(spec, samples)
    last: dict[str, Any] = {}
    error: str | None = None
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as locust,
    ):
        assert locust.stdout is not None
        try:
            for line in locust.stdout:
                last = json.loads(line)
                error = error or last.get("error")  # others follow from the first
                if on_progress is not None and "requests" in last:
                    on_progress(last["requests"])
        except BaseException:
            locust.terminate()
            raise
        code = locust.wait()
        errors.seek(0)
        if error is not None:
            raise LoadError(error)
        if code or "failures" not in last:
            raise LoadError(f"locust ended with code {code}:\n{errors.read().strip()}")
    return from_dict(last)


def locust_command(
    spec: LoadSpec, samples: Path | None = None, *, web_port: int | None = None
) -> list[str]:
    """How locust is started; what it listens on is loopback alone.

    Args:
        web_port: of its page; None runs the load at once, without one.
    """
    if web_port is None:
        mode = ["--headless", f"--stop-timeout={spec.timeout:g}"]
    else:
        mode = ["--web-host=127.0.0.1", f"--web-port={web_port}"]
        mode.append(f"--stop-timeout={_WEB_STOP_SECONDS}")
    master: list[str] = []
    if spec.processes > 1:
        from service.runtimes.ray_environment import free_ports  # which imports torch

        (port,) = free_ports(1)
        master += [f"--master-{name}=127.0.0.1" for name in ("host", "bind-host")]
        master += [f"--master-{name}={port}" for name in ("port", "bind-port")]
    file = [f"--samples={samples}"] if samples else []
    return [
        *(sys.executable, "-m", "locust", f"--locustfile={_LOCUSTFILE}", "--loglevel=WARNING"),
        *("--exit-code-on-error=0", *mode, *to_options(spec), *master, *file),
    ]


if __name__ == "__main__":
    from loadtests.cli import main

    main()
