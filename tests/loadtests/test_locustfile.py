"""locust itself: its page, and workers of their own, as on several machines."""

import json
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from loadtests.load import LoadSpec
from loadtests.options import to_options
from loadtests.run import locust_command
from loadtests.workload import Lengths, Workload
from service.runtimes.ray_environment import free_ports
from tests.integration.processes import Process

WORKLOAD = Workload(Lengths.parse("fixed:4"), Lengths.parse("fixed:3"))
_SECONDS = 60


def _open(url: str, **form: str) -> Any:
    data = urllib.parse.urlencode(form).encode() if form else None
    with urllib.request.urlopen(url, data=data, timeout=10) as answer:
        return json.load(answer)


@contextmanager
def _locust(*arguments: str) -> Iterator[Process]:
    """Asked to end, because its workers would outlive a kill; not by SIGINT, which whoever runs
    tests in the background of a shell has told all its children to ignore."""
    with Process("-m", "locust", *arguments) as process:
        try:
            yield process
        finally:
            process.signal(signal.SIGTERM)
            process.wait()


def _until_it_answers(url: str, process: Process) -> Any:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            return _open(url)
        except OSError:
            assert time.monotonic() < deadline, process.output


def _addresses(program: str) -> set[str]:
    """Where children of this process listen."""
    children = psutil.Process().children(recursive=True)
    return {
        connection.laddr.ip
        for child in children
        if program in " ".join(child.cmdline())
        for connection in child.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }


def test_the_page_runs_loads_one_after_the_other(paced_target: str) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = locust_command(LoadSpec(paced_target, WORKLOAD, users=2), web_port=port)
    with _locust(*command[3:]) as process:
        _until_it_answers(f"{url}/stats/requests", process)
        assert _addresses("locust") == {"127.0.0.1"}
        for requests in ("6", "4"):
            _open(f"{url}/swarm", user_count="2", spawn_rate="2", requests=requests)
            wanted = f'"requests": {requests}, "failures": {{}}'
            summary = json.loads(process.wait_for(partial(_contains, wanted)))
            assert summary["output_tokens"] == 3 * int(requests)
            # Rows of times are no requests, so that their sum is right.
            expected = {"gRPC": 1, "Aggregated": 1, "TTFT": 1, "ITL": 2}
            _until_rows(url, {name: count * int(requests) for name, count in expected.items()})


def _contains(wanted: str, line: str) -> bool:
    return wanted in line


def _until_rows(url: str, expected: dict[str, int]) -> None:
    """The page's numbers may be some seconds old."""
    deadline = time.monotonic() + _SECONDS
    while True:
        stats = _open(f"{url}/stats/requests")["stats"]
        rows = {row["method"] or row["name"]: row["num_requests"] for row in stats}
        if rows == expected:
            return
        assert time.monotonic() < deadline, rows


def test_workers_send_their_samples_to_the_master(paced_target: str) -> None:
    (port,) = free_ports(1)
    file = "loadtests/locustfile.py"
    spec = LoadSpec(paced_target, WORKLOAD, users=4, num_requests=11)
    bind = ["--master-bind-host=127.0.0.1", f"--master-bind-port={port}", "--expect-workers=2"]
    worker = ["-m", "locust", "-f", file, "--worker", "--master-host=127.0.0.1"]
    with (
        Process(
            "-m", "locust", "-f", file, "--master", "--headless", *bind, *to_options(spec)
        ) as master,
        Process(*worker, f"--master-port={port}") as one,
        Process(*worker, f"--master-port={port}") as two,
    ):
        line = master.wait_for(lambda line: '"failures"' in line)
        assert master.wait() == one.wait() == two.wait() == 0
    summary = json.loads(line)
    assert summary["requests"] == 11
    assert summary["finish_reasons"] == {"length": 11}
    assert summary["output_tokens"] == 33


_BROKEN = """
from loadtests.session import Session

def _begin(self):
    raise RuntimeError("unforeseen")

Session._begin = _begin
from loadtests.locustfile import GenerationUser
"""


def test_an_unforeseen_error_at_the_start_ends_locust_too(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(_BROKEN)
    arguments = ["-m", "locust", "-f", str(file), "--headless", "--requests=1"]
    with Process(*arguments, "--host=127.0.0.1:1") as process:
        assert process.wait() == 1
    assert json.dumps({"error": "RuntimeError('unforeseen')"}) in process.lines


def test_samples_that_cannot_be_written_end_locust_with_one_line() -> None:
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--requests=1"]
    with Process(*arguments, "--host=127.0.0.1:1", "--samples=/dev/null/x") as process:
        assert process.wait() == 1
    (line,) = (line for line in process.lines if '"error"' in line)
    assert json.loads(line)["error"].startswith("samples is '/dev/null/x': Not a directory")


def test_wrong_options_end_locust_with_one_line_for_each() -> None:
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    with Process(*arguments, "--rate=-1", "--shape=ramp", "--host=127.0.0.1:1") as process:
        assert process.wait() == 2
    assert "error: rate is -1.0; allowed: a number above 0" in process.lines
    assert "error: shape is 'ramp'; allowed: steady, unless seconds are given" in process.lines
