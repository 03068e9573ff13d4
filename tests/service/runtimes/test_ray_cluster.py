"""What is asked of a running Ray cluster before anything is deployed to it."""

import socket
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from service.config import ServiceConfig
from service.runtimes.ray_environment import node_environment
from tests.service.runtimes.test_ray_address import ray_like

CONFIG = ServiceConfig(ray_address="10.0.0.1:6379", replicas=3)
NODE_ENV = Path(__file__).parents[3] / "deploy" / "ray" / "node.env"


@pytest.fixture(scope="module")
def ray_cluster() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic, at Serve's import
        from service.runtimes import ray_cluster
    return ray_cluster


def test_the_file_for_nodes_has_what_is_asked_of_them() -> None:
    lines = [line for line in NODE_ENV.read_text().splitlines() if line and line[0] != "#"]
    given = dict(line.split("=", 1) for line in lines)
    assert node_environment(CONFIG).items() <= given.items()


def test_a_variable_that_is_missing_or_different_is_named(ray_cluster: ModuleType) -> None:
    wanted = node_environment(CONFIG)
    ray_cluster._check_variables("10.0.0.2", wanted, wanted)
    for name in wanted:
        for found in ({**wanted, name: "0"}, {k: v for k, v in wanted.items() if k != name}):
            expected = f"node 10.0.0.2 has {name}={found.get(name, '')}; allowed: {wanted[name]},"
            with pytest.raises(ray_cluster.ClusterError) as caught:
                ray_cluster._check_variables("10.0.0.2", found, wanted)
            assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("there", "on_gpu", "fits"),
    [
        ({"CPU": 3.0}, False, True),
        ({"CPU": 2.0}, False, False),
        ({"CPU": 8.0, "GPU": 3.0}, True, True),
        ({"CPU": 8.0, "GPU": 2.0}, True, False),
        ({"CPU": 8.0}, True, False),
    ],
)
def test_replicas_that_would_wait_for_ever_are_refused(
    ray_cluster: ModuleType,
    there: dict[str, float],
    on_gpu: bool,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    if fits:
        ray_cluster._check_resources(CONFIG, on_gpu)
        return
    kind = "GPU" if on_gpu else "CPU"
    most = f"{there.get(kind, 0):g}"
    with pytest.raises(ray_cluster.ClusterError, match=f"at most {most} in all, one per {kind}"):
        ray_cluster._check_resources(CONFIG, on_gpu)


def test_an_address_without_a_cluster_is_refused_at_once(ray_cluster: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "127.0.0.1:70000"):
        with pytest.raises(ray_cluster.ClusterError, match=f"{address}, where nobody answers"):
            ray_cluster.connect(ServiceConfig(ray_address=address), on_gpu=False)


@pytest.mark.parametrize(
    ("tls", "variables", "expected"),
    [
        (True, {}, "which speaks TLS; allowed: RAY_USE_TLS=1, as on its nodes"),
        (False, {"RAY_USE_TLS": "1"}, "which speaks in the clear; allowed: no RAY_USE_TLS, as on"),
    ],
)
def test_a_cluster_that_would_never_answer_is_refused_at_once(
    ray_cluster: ModuleType,
    tls: bool,
    variables: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.init", pytest.fail)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with ray_like(tls=tls) as address:
        config = ServiceConfig(ray_address=address)
        with pytest.raises(ray_cluster.ClusterError, match=f"{address}, {expected}"):
            ray_cluster.connect(config, on_gpu=False)
