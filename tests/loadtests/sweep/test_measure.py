"""A measurement without servers: what is divided by what."""

import dataclasses
from pathlib import Path

import psutil
import pytest

from loadtests.load import LoadSpec, LoadSummary
from loadtests.servers import Server
from loadtests.summary import summarize
from loadtests.sweep import measure as module
from loadtests.sweep.counters import Counters
from loadtests.sweep.measure import measure
from loadtests.sweep.servers import Endpoint
from tests.loadtests.sweep.documents import plan


class _Endpoint(Endpoint):
    """A server that has taken three seconds of CPU each time that it is asked."""

    taken = 0.0

    def cpu_seconds(self) -> float:
        type(self).taken += 3.0
        return self.taken


def test_cores_are_of_the_load_not_of_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = dataclasses.replace(summarize([], client_cpu=0.1, began=0.0), seconds=2.0)

    def run_load(spec: LoadSpec, samples: Path | None) -> LoadSummary:
        return summary

    monkeypatch.setattr(module, "run_load", run_load)
    monkeypatch.setattr(module, "read_counters", lambda _: Counters())
    server = Server("127.0.0.1:1", psutil.Process(), 0.0)
    endpoint = _Endpoint(server.target, "headroom", 1, server)
    measured = measure(endpoint, plan().loads[0], seed=0, samples=None)
    assert measured.server_cores == 1.5
    assert measured.seconds < 2.0
