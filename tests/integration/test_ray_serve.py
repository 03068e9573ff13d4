"""A real Ray Serve with two replicas behind its HAProxy ingress, and a real channel."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from protos.headroom.v1 import generation_pb2 as pb
from protos.headroom.v1 import generation_pb2_grpc
from service.client import AsyncClient, AsyncTextStream, HeadroomError, ReplicaLostError, to_error
from service.engine import Engine, EngineConfig, SamplingParams
from service.runtimes.ray_environment import free_ports
from tests.bad_requests import BAD_REQUESTS
from tests.checkpoints import VOCAB_SIZE
from tests.collector import Collector, running_collector
from tests.integration.processes import Process
from tests.serving import running_server

pytestmark = pytest.mark.ray
NUM_REPLICAS = 2


@dataclass(frozen=True, slots=True)
class RayServer:
    host: Process
    target: str
    collector: Collector

    def replicas(self) -> list[psutil.Process]:
        return [process for process in self.host.family() if _is_replica(process)]


def _is_replica(process: psutil.Process) -> bool:
    try:
        return "ray::ServeReplica" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # ended, or a zombie
        return False


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[RayServer]:
    port, http_port = free_ports(2)
    settings = {
        "model": str(model_path),
        "port": port,
        "http_port": http_port,
        "metrics_port": 0,
        "replicas": NUM_REPLICAS,
        "engine": {"num_threads": 1},
        "max_message_bytes": 2**20,
    }
    with (
        running_collector() as collector,
        Process(
            "-m",
            "tests.integration.ray_host",
            json.dumps(settings | {"otlp_endpoint": collector.endpoint}),
        ) as host,
    ):
        host.wait_for(lambda line: line == "ready")
        family = host.family()
        yield RayServer(host, f"127.0.0.1:{port}", collector)
        host.end_of_input()
        host.wait_for(lambda line: line == "stopped")
        assert host.wait() == 0, host.output
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, "processes outlive the server"
    for number in (port, http_port):
        assert not _listens(number), f"port {number} is still taken"


@pytest.fixture
async def client(server: RayServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as opened:
        yield opened


def _listens(port: int) -> bool:
    return bool(_listening_addresses(port))


def _listening_addresses(port: int) -> set[str]:
    return {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr
        and connection.laddr.port == port
    }


async def _tokens(stream: AsyncTextStream, started: asyncio.Event | None = None) -> list[int]:
    async for _ in stream:
        if started is not None:
            started.set()
    return stream.token_ids


async def _until_idle(client: AsyncClient) -> None:
    """Calls go to either replica: only a row of idle answers shows that both are idle."""
    idle_answers = 0
    while idle_answers < 20:
        load = await client.get_load()
        busy = load.num_running or load.num_waiting or load.kv_blocks_used
        idle_answers = 0 if busy else idle_answers + 1


async def test_engine_standalone_and_ray_give_the_same_tokens(
    client: AsyncClient, model_path: Path
) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 7, 16, 70)]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    outputs = Engine.from_checkpoint(model_path, EngineConfig()).generate(prompts, params)
    expected = [output.token_ids for output in outputs]

    async def through(some: AsyncClient) -> list[list[int]]:
        return await asyncio.gather(
            *(
                _tokens(some.generate(p, max_tokens=24, temperature=0, ignore_eos=True))
                for p in prompts
            )
        )

    assert await through(client) == expected
    hidden = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    async with running_server(model_path) as standalone, AsyncClient(standalone.target) as other:
        assert await through(other) == expected
        attended = [await c.attend_hidden(hidden, layer=1) for c in (client, other)]
        embedded = [await c.embed(prompts[-1]) for c in (client, other)]
    assert np.array_equal(attended[0].output, attended[1].output)
    assert np.array_equal(embedded[0], embedded[1])


async def test_64_streams_finish_and_leave_nothing(client: AsyncClient) -> None:
    rng = random.Random(3)
    lengths = [rng.randint(1, 80) for _ in range(64)]
    streams = [
        client.generate([n], max_tokens=n, temperature=1.0, ignore_eos=True) for n in lengths
    ]
    for n, token_ids in zip(lengths, await asyncio.gather(*map(_tokens, streams)), strict=True):
        assert len(token_ids) == n
    await _until_idle(client)


async def test_rich_errors_cross_the_ingress(server: RayServer, client: AsyncClient) -> None:
    before = await client.complete([1, 2, 3], max_tokens=5, temperature=0)
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for name in ("no prompt", "unknown token", "10,000 stops", "temperature nan"):
            request, field, _ = BAD_REQUESTS[name]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Complete(pb.CompleteRequest.FromString(request.SerializeToString()))
            unary = to_error(caught.value)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(request):
                    pass
            streamed = to_error(caught.value)
            for error in (unary, streamed):
                assert error.code is grpc.StatusCode.INVALID_ARGUMENT
                assert (error.reason, list(error.violations)) == ("INVALID_REQUEST", [field])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Complete(pb.CompleteRequest(text="x" * 2**21))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        unknown = channel.unary_unary("/headroom.v1.GenerationService/Nothing", bytes, bytes)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    after = await client.complete([1, 2, 3], max_tokens=5, temperature=0)
    assert after.token_ids == before.token_ids


async def test_an_unknown_application_is_not_found(server: RayServer) -> None:
    async with AsyncClient(server.target, application="other") as client:
        with pytest.raises(HeadroomError) as caught:
            await client.get_model()
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_cancel_and_client_deadline_reach_the_engine(
    server: RayServer, client: AsyncClient
) -> None:
    for _ in range(5):
        stream = client.generate([1], max_tokens=4000, temperature=0, ignore_eos=True)
        async for _ in stream:
            break
        stream.cancel()
    await _until_idle(client)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]),
        sampling=pb.SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(request, timeout=0.1):
                pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await _until_idle(client)


def test_plain_stub_and_health_client_of_another_process(
    server: RayServer, model_path: Path
) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "tests.integration.plain_stub", server.target],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    expected = Engine.from_checkpoint(model_path, EngineConfig()).generate([[1, 2, 3]], params)
    assert [int(token_id) for token_id in answer.stdout.split()] == expected[0].token_ids


async def test_redeploying_under_load_fails_nothing(server: RayServer, client: AsyncClient) -> None:
    stop = asyncio.Event()
    finished = 0

    async def load(seed: int) -> None:
        nonlocal finished
        while not stop.is_set():
            tokens = await _tokens(
                client.generate([seed], max_tokens=200, temperature=0, ignore_eos=True)
            )
            assert len(tokens) == 200
            finished += 1

    callers = [asyncio.create_task(load(seed)) for seed in range(8)]
    old = {process.pid for process in server.replicas()}
    server.host.lines.clear()
    server.host.write(json.dumps({"stall_seconds": 29}))
    await asyncio.to_thread(server.host.wait_for, lambda line: line == "deployed")
    stop.set()
    await asyncio.gather(*callers)
    assert finished >= 8
    new = {process.pid for process in server.replicas()}
    assert new.isdisjoint(old), "every replica was replaced"


async def test_a_killed_replica_ends_only_its_own_streams(
    server: RayServer, client: AsyncClient
) -> None:
    for _ in range(3):  # right after a deployment all streams may go to one replica
        lost, complete = await _kill_a_replica_under_load(server, client)
        if lost and complete:
            break
    assert lost, "the victim had streams"
    assert complete, "the other replica's streams went on"
    await _until_idle(client)


async def _kill_a_replica_under_load(server: RayServer, client: AsyncClient) -> tuple[int, int]:
    """How many streams were lost and how many were complete; both replicas are there again."""
    streams = [
        client.generate([seed], max_tokens=3000, temperature=0, ignore_eos=True)
        for seed in range(16)
    ]
    started = [asyncio.Event() for _ in streams]
    readers = [
        asyncio.create_task(_tokens(stream, event))
        for stream, event in zip(streams, started, strict=True)
    ]
    await asyncio.gather(*(event.wait() for event in started))
    victim, survivor = server.replicas()
    victim.kill()
    results = await asyncio.gather(*readers, return_exceptions=True)
    lost = [result for result in results if isinstance(result, BaseException)]
    for error in lost:
        assert isinstance(error, HeadroomError), error
        assert isinstance(error, ReplicaLostError) or error.code is grpc.StatusCode.UNAVAILABLE
    complete = [result for result in results if not isinstance(result, BaseException)]
    assert all(len(tokens) == 3000 for tokens in complete)
    assert survivor.is_running()
    deadline = asyncio.get_running_loop().time() + 60
    while len(server.replicas()) < NUM_REPLICAS:
        assert asyncio.get_running_loop().time() < deadline, "Serve brings no replica back"
        await client.complete([1], max_tokens=1)
    assert victim.pid not in {process.pid for process in server.replicas()}
    return len(lost), len(complete)


async def test_a_trace_goes_on_behind_the_ingress(server: RayServer) -> None:
    trace_id, method = 0x0AF7651916CD43DD8448EB211C80319C, "headroom.v1.GenerationService/Generate"
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling=pb.SamplingParams(max_tokens=5)
    )
    async with grpc.aio.insecure_channel(server.target) as channel:
        metadata = [("traceparent", f"00-{trace_id:032x}-b7ad6b7169203331-01")]
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert [1 async for _ in stub.Generate(request, metadata=metadata)]
    # Replicas send what they have every few seconds.
    names = {method, "queue", "prefill", "decode"}
    spans = await asyncio.to_thread(server.collector.wait_for, names, trace_id=trace_id)
    (root,) = (span for span in spans if span.name == method)
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.parent_span_id for span in spans if span is not root} == {root.span_id}


def test_the_ingress_listens_on_the_loopback_only(server: RayServer) -> None:
    port = int(server.target.split(":")[1])
    assert _listening_addresses(port) == {"127.0.0.1"}
