"""Functions on the engine thread: their results, their errors, and what ends with the engine."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from service.engine.async_engine import AsyncEngine
from service.engine.engine import Engine, EngineRequest
from service.engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineStalledError,
    QueueFullError,
)
from tests.engine.tiny import greedy, tiny_engine

PATIENCE = 20.0


class Gate:
    """A function that waits on the engine thread until it is let through."""

    def __init__(self) -> None:
        self._entered, self._open = threading.Event(), threading.Event()

    def __call__(self, engine: Engine) -> str:
        self._entered.set()
        assert self._open.wait(PATIENCE)
        return "through"

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, PATIENCE)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    running = AsyncEngine(
        lambda: tiny_engine(max_waiting_requests=3), num_threads=1, stall_seconds=5.0
    )
    await running.start()
    yield running
    await running.shutdown()


async def _waiting(engine: AsyncEngine, function: Callable[[Engine], Any]) -> "asyncio.Task[Any]":
    """A call that is in the engine's queue."""
    task = asyncio.ensure_future(engine.call(function))
    await asyncio.sleep(0)
    return task


async def test_results_come_from_the_engine_thread(engine: AsyncEngine) -> None:
    assert await engine.call(lambda _: threading.current_thread().name) == "engine"
    assert await engine.call(lambda inner: inner) is engine.engine


async def test_calls_keep_their_order(engine: AsyncEngine) -> None:
    gate, order = Gate(), list[int]()
    blocking = await _waiting(engine, gate)
    await gate.entered()
    calls = [await _waiting(engine, lambda _, n=n: order.append(n)) for n in range(3)]  # type: ignore[misc]
    gate.open()
    assert await blocking == "through"
    await asyncio.gather(*calls)
    assert order == [0, 1, 2]


async def test_an_error_is_its_callers_own(engine: AsyncEngine) -> None:
    def fail(_: Engine) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        await engine.call(fail)
    engine.check_health()
    assert await engine.call(lambda _: 1) == 1


async def test_a_cancelled_call_never_runs(engine: AsyncEngine) -> None:
    gate, ran = Gate(), list[int]()
    blocking = await _waiting(engine, gate)
    await gate.entered()
    waiting = await _waiting(engine, lambda _: ran.append(1))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open()
    await blocking
    await engine.call(lambda _: None)
    assert not ran


async def test_a_caller_that_leaves_while_it_runs_harms_nobody(engine: AsyncEngine) -> None:
    gate = Gate()
    running = await _waiting(engine, gate)
    await gate.entered()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gate.open()
    assert await engine.call(lambda _: 2) == 2


async def test_the_queue_is_bounded(engine: AsyncEngine) -> None:
    gate = Gate()
    blocking = await _waiting(engine, gate)
    await gate.entered()
    calls = [await _waiting(engine, lambda _: 0) for _ in range(5)]
    gate.open()
    await blocking
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers[:3] == [0, 0, 0]
    assert [type(answer) for answer in answers[3:]] == [QueueFullError] * 2


async def test_a_call_waits_for_one_step_only_while_requests_run(engine: AsyncEngine) -> None:
    stream = engine.run(EngineRequest([1], greedy(200)))
    first = await anext(stream)
    calls = [await engine.call(lambda inner: inner.load.num_running) for _ in range(3)]
    assert calls == [1, 1, 1]
    tokens = len(first.token_ids)
    async for output in stream:
        tokens += len(output.token_ids)
    assert tokens == 200


async def test_calls_that_wait_when_the_engine_dies_fail(engine: AsyncEngine) -> None:
    gate = Gate()

    def die() -> Any:
        raise RuntimeError("out of memory")

    engine.engine.step = die  # type: ignore[method-assign]
    blocking = await _waiting(engine, gate)
    await gate.entered()
    stream = engine.run(EngineRequest([1], greedy(5)))
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    calls = [await _waiting(engine, lambda _: 0) for _ in range(3)]
    gate.open()
    assert await blocking == "through"
    with pytest.raises(EngineDeadError):
        await reading
    answers = await asyncio.gather(*calls, return_exceptions=True)
    # One runs before the step that fails.
    assert answers[0] == 0
    assert [type(answer) for answer in answers[1:]] == [EngineDeadError] * 2
    with pytest.raises(EngineDeadError):
        await engine.call(lambda _: 0)


async def test_shutdown_fails_what_waits(engine: AsyncEngine) -> None:
    gate = Gate()
    blocking = await _waiting(engine, gate)
    await gate.entered()
    stopping = asyncio.ensure_future(engine.shutdown())
    late = asyncio.ensure_future(engine.call(lambda _: 0))
    await asyncio.sleep(0)
    gate.open()
    assert await blocking == "through"
    await stopping
    with pytest.raises(EngineDrainingError):
        await late


async def test_a_drain_waits_for_calls(engine: AsyncEngine) -> None:
    gate = Gate()
    blocking = await _waiting(engine, gate)
    await gate.entered()
    draining = asyncio.ensure_future(engine.drain(seconds=PATIENCE))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await engine.call(lambda _: 0)
    assert not draining.done()
    gate.open()
    assert await blocking == "through"
    assert await draining


async def test_a_drain_without_patience_refuses_what_waits(engine: AsyncEngine) -> None:
    gate = Gate()
    blocking = await _waiting(engine, gate)
    await gate.entered()
    waiting = await _waiting(engine, lambda _: 0)
    draining = asyncio.ensure_future(engine.drain(seconds=0))
    while engine._commands.qsize() < 2:  # the waiting call, and the order to end it  # noqa: ASYNC110
        await asyncio.sleep(0)
    gate.open()
    assert await blocking == "through"
    with pytest.raises(EngineDrainingError):
        await waiting
    assert not await draining


async def test_a_call_without_end_is_a_stall() -> None:
    running = AsyncEngine(tiny_engine, num_threads=1, stall_seconds=0.001)
    await running.start()
    gate = Gate()
    blocking = await _waiting(running, gate)
    await gate.entered()
    while not _is_stalled(running):
        pass
    gate.open()
    await blocking
    while _is_stalled(running):
        pass
    await running.shutdown()


def _is_stalled(engine: AsyncEngine) -> bool:
    try:
        engine.check_health()
    except EngineStalledError:
        return True
    return False
