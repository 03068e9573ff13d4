"""Attend beside everything else that the engine does: streams, cancellation, endings."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.headroom.v1 import attention_pb2 as pb
from protos.headroom.v1 import generation_pb2
from service.client import AsyncClient, to_error
from tests.bad_attention import qkv_request, tensor
from tests.serving import RunningServer, running_server


def _wide(num_tokens: int = 256) -> pb.AttendRequest:
    """A few milliseconds of work."""
    request = qkv_request()
    values = np.random.default_rng(0).standard_normal((1, 4, num_tokens, 32)).astype("<f4")
    for name in ("query", "key", "value"):
        getattr(request.qkv, name).CopyFrom(tensor("FLOAT32", values))
    return request


async def test_streams_go_on_beside_attention_and_get_the_same_tokens(
    server: RunningServer,
) -> None:
    async def tokens(client: AsyncClient, seed: int) -> list[int]:
        stream = client.generate([seed, 5], max_tokens=60, temperature=0, ignore_eos=True)
        async for _ in stream:
            pass
        return stream.token_ids

    async with AsyncClient(server.target) as client:
        alone = [await tokens(client, seed) for seed in range(8)]
        truth = (await server.attention.Attend(_wide())).output
        finished = asyncio.Event()
        num_answers = 0

        async def attend() -> None:
            nonlocal num_answers
            while not finished.is_set():
                assert (await server.attention.Attend(_wide())).output == truth
                num_answers += 1

        callers = [asyncio.create_task(attend()) for _ in range(4)]
        together = await asyncio.gather(*(tokens(client, seed) for seed in range(8)))
        finished.set()
        await asyncio.gather(*callers)
    assert together == alone
    # One call fits between two steps, if a client has asked by then. Four are answered at the end.
    assert num_answers >= 12, "calls go on beside streams"
    await server.until_idle()


async def test_at_most_one_call_runs_between_two_steps(server: RunningServer) -> None:
    order: list[str] = []
    engine = server.engine.engine
    step, entered, go_on = engine.step, threading.Event(), threading.Event()

    def recorded() -> Any:
        order.append("step")
        entered.set()
        assert go_on.wait(20)
        return step()

    engine.step = recorded  # type: ignore[method-assign]
    async with AsyncClient(server.target) as client:
        stream = client.generate([1], max_tokens=6, temperature=0, ignore_eos=True)
        reading = asyncio.create_task(_read(stream))
        await asyncio.to_thread(entered.wait, 20)
        calls = [server.engine.call(lambda _: order.append("call")) for _ in range(4)]
        waiting = asyncio.gather(*calls)
        await asyncio.sleep(0)  # all four are in the queue now
        go_on.set()
        await waiting
        await reading
    assert order == ["step", *["call", "step"] * 4, "step"]


async def _read(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_a_cancelled_call_is_skipped(server: RunningServer) -> None:
    ran: list[str] = []
    entered, go_on = threading.Event(), threading.Event()

    def block(_: object) -> None:
        entered.set()
        assert go_on.wait(20)

    blocking = asyncio.create_task(server.engine.call(block))
    await asyncio.to_thread(entered.wait, 20)
    model_runner = server.engine.engine.model_runner
    model = model_runner.model

    class Watched:
        @property
        def model(self) -> Any:
            ran.append("attend")
            return model

    server.engine.engine.model_runner = Watched()  # type: ignore[assignment]
    call = server.attention.Attend(qkv_request())
    while server.engine._num_open < 2:  # it has arrived
        await server.load()
    call.cancel()
    while server.engine._num_open > 1:  # the server knows
        await server.load()
    go_on.set()
    await blocking
    await server.engine.call(lambda _: None)
    server.engine.engine.model_runner = model_runner
    assert not ran


async def test_a_dead_engine_answers_at_once(server: RunningServer) -> None:
    def fail() -> Any:
        raise RuntimeError("out of memory")

    server.engine.engine.step = fail  # type: ignore[method-assign]
    stream = server.generation.Generate(
        generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1]))
    )
    with pytest.raises(grpc.aio.AioRpcError):
        await stream.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.attention.Attend(qkv_request())
    error = to_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")


async def test_a_draining_engine_takes_none(server: RunningServer) -> None:
    assert await server.engine.drain(seconds=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.attention.Attend(qkv_request())
    assert to_error(caught.value).reason == "DRAINING"


async def test_too_many_waiting_calls_are_refused(model_path: Path) -> None:
    async with running_server(model_path, max_waiting_requests=2) as server:
        entered, go_on = threading.Event(), threading.Event()

        def block(_: object) -> None:
            entered.set()
            assert go_on.wait(20)

        blocking = asyncio.create_task(server.engine.call(block))
        await asyncio.to_thread(entered.wait, 20)
        calls = [server.attention.Attend(qkv_request()) for _ in range(5)]
        while server.engine._num_open < 6:
            await server.load()
        go_on.set()
        await blocking
        answers = await asyncio.gather(*calls, return_exceptions=True)
        failed = [to_error(a) for a in answers if isinstance(a, grpc.aio.AioRpcError)]
        assert len(answers) - len(failed) == 2
        assert {(e.code, e.reason) for e in failed} == {
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        }
        assert "at most 2 waiting calls" in str(failed[0])
