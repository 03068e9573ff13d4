"""The serve configuration of the manifests, deployed for real: Ray and Serve without Kubernetes."""

import contextlib
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.client import Client, HeadroomError
from service.config import ServiceConfig
from service.runtimes.ray_environment import free_ports, ray_environment
from tests.deploy.manifests import find, pod_templates, render
from tests.integration.processes import Process

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _environment(config: ServiceConfig, directory: Path) -> list[str]:
    """Of the pods, with ports and a token of this machine beside it."""
    (head, _) = pod_templates(render("cpu"))
    (container,) = head[1]["spec"]["containers"]
    pods = {each["name"]: each["value"] for each in container["env"]}
    tls = {name for name in pods if "TLS" in name}
    merged = ray_environment(config, directory) | {k: v for k, v in pods.items() if k not in tls}
    merged["RAY_ADDRESS"] = "local"  # not the cluster of another test
    return [f"{name}={value}" for name, value in merged.items()]


@pytest.fixture
def configuration(model_path: Path) -> dict[str, Any]:
    """As rendered, but for addresses, the model, and how soon it scales."""
    service = find(render("cpu"), "RayService")["spec"]
    given: dict[str, Any] = yaml.safe_load(service["serveConfigV2"])
    port, http_port, metrics_port = free_ports(3)
    given["grpc_options"]["port"] = port
    given["http_options"] = {"host": "127.0.0.1", "port": http_port}
    (application,) = given["applications"]
    arguments = application["args"]
    arguments |= {"model": str(model_path), "host": "127.0.0.1", "port": port}
    arguments |= {"http_port": http_port, "metrics_port": metrics_port}
    arguments["engine"] |= {"max_num_seqs": 1, "kv_cache_bytes": 2**22, "num_threads": 1}
    for name in set(arguments) - set(ServiceConfig.model_fields) | {"tokens"} & set(arguments):
        del arguments[name]
    (deployment,) = application["deployments"]
    deployment["max_replicas_per_node"] = 2
    deployment["ray_actor_options"]["num_cpus"] = 0
    deployment["autoscaling_config"] |= {
        "min_replicas": 1,
        "max_replicas": 2,
        "upscale_delay_s": 0,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
    }
    return given


def test_the_configuration_serves_and_scales_with_the_queue(
    configuration: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(configuration))
    (application,) = configuration["applications"]
    config = ServiceConfig(**application["args"])
    # The path of HAProxy's socket may have 97 characters, and pytest's folders have long names.
    sockets = Path(tempfile.mkdtemp())
    serve = Path(sys.executable).parent / "serve"
    command = [*_environment(config, sockets), str(serve), "run", str(file)]
    with Process(*command, program=Path("/usr/bin/env")) as server:
        target = f"127.0.0.1:{config.port}"
        _until(lambda: _is_serving(target), server)
        with Client(target) as client:
            assert client.complete([1, 2, 3], max_tokens=4, temperature=0).token_ids
        logged = json.loads(server.wait_for(lambda line: '"event": "rpc"' in line))
        assert logged["method"] == "headroom.v1.GenerationService/Complete"
        assert _num_replicas(server) == 1
        with _queue(target):
            _until(lambda: _num_replicas(server) == 2, server)
    shutil.rmtree(sockets)


def _until(reached: Callable[[], bool], server: Process) -> None:
    deadline = time.monotonic() + 180
    while not reached():
        assert time.monotonic() < deadline, server.output
        time.sleep(0.1)


def _is_serving(target: str) -> bool:
    try:
        with Client(target) as client:
            return client.is_serving(timeout=2)
    except HeadroomError:  # nobody listens yet
        return False


def _num_replicas(server: Process) -> int:
    names = []
    for process in server.family():
        with contextlib.suppress(Exception):  # it may have ended
            names.append(process.cmdline()[0])
    return sum(name.startswith("ray::ServeReplica:headroom:") for name in names)


@contextlib.contextmanager
def _queue(target: str) -> Iterator[None]:
    """Twelve clients of a replica that runs one request at a time; none of their requests fails."""
    stop = threading.Event()
    errors: list[HeadroomError] = []

    def ask() -> None:
        with Client(target) as client:
            while not stop.is_set():
                try:
                    client.complete([1], max_tokens=200, temperature=0, ignore_eos=True)
                except HeadroomError as error:
                    errors.append(error)
                    return

    clients = [threading.Thread(target=ask) for _ in range(12)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert errors == []
