"""Servers that do not behave."""

import sys

import psutil
import pytest

from loadtests import servers
from loadtests.servers import ServerError, running_server

_DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_server_that_does_not_stop_is_killed_with_all_below_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "CLI", [sys.executable, "-c", _DEAF])
    monkeypatch.setattr(servers, "_STOP_SECONDS", 0.2)
    family: list[psutil.Process] = []
    with (
        pytest.raises(ServerError, match=r"standalone server did not stop within 0\.2 s"),
        running_server("standalone", ["demo"], 1, {}) as server,
    ):
        family += server.processes()
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert (len(gone), alive) == (2, [])


def test_a_server_that_ends_at_once_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.exit('error: no such model')"
    monkeypatch.setattr(servers, "CLI", [sys.executable, "-c", script])
    with (
        pytest.raises(ServerError, match="ended before it was ready: error: no such model"),
        running_server("standalone", ["nowhere"], 1, {}),
    ):
        pass
