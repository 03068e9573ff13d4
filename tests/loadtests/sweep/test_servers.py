"""Under Ray all configurations share a server: each is found by its name, and its own counters."""

import http.client
from pathlib import Path

import pytest

from loadtests.sweep.counters import read_counters
from loadtests.sweep.servers import serve_configurations
from service.client import Client
from tests.loadtests.sweep.documents import SWEEP, plan


@pytest.mark.ray
@pytest.mark.slow
def test_every_configuration_has_its_application_and_its_metrics(tmp_path: Path) -> None:
    sweep = plan(SWEEP.replace("standalone", "ray").replace("[4, 2, 1]", "[4, 1]"))
    with serve_configurations(sweep, tmp_path) as endpoints:
        assert list(endpoints) == ["h4kv4d16", "h4kv1d16"]
        for num_tokens, (name, endpoint) in enumerate(endpoints.items(), 2):
            with Client(endpoint.target, application=endpoint.application) as client:
                assert client.get_model().layers[0].label == name
                for _ in client.generate([1, 2, 3], max_tokens=num_tokens, ignore_eos=True):
                    pass
            assert endpoint.cpu_seconds() > 0
        for num_tokens, (name, endpoint) in enumerate(endpoints.items(), 2):
            assert read_counters(endpoint.metrics_port).generation_tokens == num_tokens
            assert f'head_config="{name}"' in _metrics(endpoint.metrics_port)


def _metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text
