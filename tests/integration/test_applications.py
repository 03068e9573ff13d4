"""Several head configurations side by side: applications of one server, chosen by the client."""

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from service.client import Client, HeadroomError
from service.engine import Engine, EngineConfig, SamplingParams
from service.runtimes.ray_environment import free_ports
from tests import checkpoints
from tests.integration.processes import Process

pytestmark = pytest.mark.ray
_CLI = ("-c", "from service.cli import app; app()")
KV_HEADS = {"mha": 4, "mqa": 1}
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: checkpoints.save(
            checkpoints.llama(num_kv_heads), tmp_path_factory.mktemp("models") / name
        )
        for name, num_kv_heads in KV_HEADS.items()
    }


@pytest.fixture(scope="module")
def target(models: dict[str, Path]) -> Iterator[str]:
    port, http_port = free_ports(2)
    named = [part for name, path in models.items() for part in ("--model", f"{name}={path}")]
    ports = ["--port", str(port), "--http-port", str(http_port), "--metrics-port", "0"]
    with Process(*_CLI, "serve", *named, *ports) as server:
        server.wait_for(lambda line: line.startswith("ready"))
        assert [line for line in server.lines if line.startswith(("app", "heads"))] == [
            "app     mha",
            "heads   h4kv4d16 x 2 layers",
            "app     mqa",
            "heads   h4kv1d16 x 2 layers",
        ]
        yield f"127.0.0.1:{port}"
        server.signal(signal.SIGINT)
        assert server.wait() == 0, server.output


@pytest.mark.parametrize("name", KV_HEADS)
def test_each_application_has_its_own_model(
    target: str, models: dict[str, Path], name: str
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    engine = Engine.from_checkpoint(models[name], EngineConfig(num_threads=1))
    with Client(target, application=name) as client:
        assert client.get_model().layers[0].num_kv_heads == KV_HEADS[name]
        stream = client.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
        list(stream)
    assert stream.token_ids == engine.generate([PROMPT], params)[0].token_ids


def test_an_unknown_application_is_not_found(target: str) -> None:
    with (
        Client(target, application="gqa") as client,
        pytest.raises(HeadroomError, match="Application 'gqa' not found") as caught,
    ):
        client.get_model()
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
