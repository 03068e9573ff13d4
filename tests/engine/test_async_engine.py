"""The engine behind its thread: streams, refusals, cancellation, failure, stall, drain.

Engines wait for a permit before every step, so that each test decides what has happened when.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from service.engine.async_engine import AsyncEngine
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineStalledError,
    InvalidRequestError,
    NeverFitsError,
    QueueFullError,
    RequestLostError,
)
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import FinishReason, SequenceOutput
from tests.engine.tiny import finish_all, greedy, reason, tiny_engine, tiny_model

PATIENCE = 20.0
"""Seconds after which a test that waits in vain fails."""

FREE = 10_000
"""More permits than any test takes."""

LONG = EngineRequest([1, 2, 3], greedy(300))


class GatedEngine(Engine):
    """An engine whose every step waits for a permit.

    Args:
        permits: how many steps have theirs from the beginning.
        fail_after: the step after so many raises.

    Attributes:
        at_gate: set while a step waits for its permit, or has got it.
        outputs_per_step: how many sequences each finished step had something new for.
        ends: reasons that listeners were told.
        thread: where the last step was taken.
    """

    def __init__(self, permits: int = 0, *, fail_after: int | None = None, **config: Any) -> None:
        self.ends: list[FinishReason] = []
        super().__init__(
            tiny_model(),
            EngineConfig(**{"num_blocks": 256, "block_size": 4, **config}),
            on_finish=lambda finish: self.ends.append(finish.reason),
        )
        self.at_gate = threading.Event()
        self.outputs_per_step: list[int] = []
        self.thread = threading.current_thread()
        self._permits = threading.Semaphore(permits)
        self._fail_after = fail_after

    def permit(self, steps: int = FREE) -> None:
        self._permits.release(steps)

    async def reach_gate(self) -> None:
        assert await asyncio.to_thread(self.at_gate.wait, PATIENCE), "no step has begun"

    async def thread_has_ended(self) -> None:
        await asyncio.to_thread(self.thread.join, PATIENCE)
        assert not self.thread.is_alive()

    def step(self) -> list[SequenceOutput]:
        self.thread = threading.current_thread()
        self.at_gate.set()
        assert self._permits.acquire(timeout=PATIENCE), "no permit was given"
        if len(self.outputs_per_step) == self._fail_after:
            raise RuntimeError("out of memory")
        outputs = super().step()
        self.outputs_per_step.append(len(outputs))
        return outputs


def never_started(build: Callable[[], Engine] = tiny_engine) -> AsyncEngine:
    return AsyncEngine(build, num_threads=1, stall_seconds=60.0)


@asynccontextmanager
async def running(engine: Engine, *, stall_seconds: float = 60.0) -> AsyncIterator[AsyncEngine]:
    async_engine = AsyncEngine(lambda: engine, num_threads=1, stall_seconds=stall_seconds)
    async with asyncio.timeout(PATIENCE):
        await async_engine.start()
        try:
            yield async_engine
        finally:
            if isinstance(engine, GatedEngine):
                engine.permit()
            await async_engine.shutdown()


async def collect(engine: AsyncEngine, request: EngineRequest) -> SequenceOutput:
    return SequenceOutput.merge([output async for output in engine.run(request)])


async def started(engine: AsyncEngine, request: EngineRequest) -> "asyncio.Task[SequenceOutput]":
    """A reader whose request is on the engine thread's queue."""
    task = asyncio.create_task(collect(engine, request))
    await asyncio.sleep(0)
    return task


def alone(request: EngineRequest) -> SequenceOutput:
    return finish_all(tiny_engine(), [request])[0]


# Start


class Unbuildable(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("error", [ValueError("no such model"), Unbuildable()])
async def test_start_raises_what_building_raises(error: BaseException) -> None:
    def build() -> Engine:
        raise error

    engine = never_started(build)
    with pytest.raises(type(error)) as raised:
        await engine.start()
    assert raised.value is error
    await engine.shutdown()
    with pytest.raises(EngineDeadError):
        engine.check_health()


async def test_the_engine_is_built_on_its_own_thread_with_its_own_number_of_threads() -> None:
    facts: list[tuple[str, int]] = []

    def build() -> Engine:
        facts.append((threading.current_thread().name, torch.get_num_threads()))
        return tiny_engine()

    engine = AsyncEngine(build, num_threads=2, stall_seconds=60.0)
    try:
        await engine.start()
        assert facts == [("engine", 2)]
        assert engine.engine.max_model_len == 320
        assert engine.load.kv_blocks_total == 256
        engine.check_health()
    finally:
        await engine.shutdown()


async def test_an_engine_that_was_not_started_takes_nothing() -> None:
    engine = never_started()
    with pytest.raises(EngineDeadError):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, LONG)


# Streams


async def test_concurrent_streams_give_what_the_synchronous_engine_gives() -> None:
    requests = [
        *(EngineRequest([index] * (3 * index + 1), greedy(5 + index)) for index in range(8)),
        *(
            EngineRequest([9, index], SamplingParams(max_tokens=9, seed=index, logprobs=2))
            for index in range(4)
        ),
        EngineRequest(list(range(50)), None),
    ]
    async with running(tiny_engine(max_num_batched_tokens=16, max_num_seqs=6)) as engine:
        outputs = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert engine.load.kv_blocks_used == 0
    for output, request in zip(outputs, requests, strict=True):
        expected = alone(request)
        assert output.token_ids == expected.token_ids
        assert reason(output) is reason(expected)
        assert len(output.logprobs) == len(expected.logprobs)
        assert output.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-5)


async def test_tokens_arrive_as_they_are_made() -> None:
    gated = GatedEngine()
    async with running(gated) as engine:
        stream = engine.run(EngineRequest([1, 2], greedy(3)))
        received = []
        for _ in range(3):
            gated.permit(1)
            received.append(await anext(stream))
        assert [len(output.token_ids) for output in received] == [1, 1, 1]
        assert [output.finish is None for output in received] == [True, True, False]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_slow_reader_gets_all_tokens_merged_and_in_order() -> None:
    request = EngineRequest([1, 2], SamplingParams(max_tokens=10, seed=1, logprobs=1))
    gated = GatedEngine(permits=1)
    async with running(gated) as engine:
        stream = engine.run(request)
        first = await anext(stream)
        other = await started(engine, EngineRequest([5], greedy(30)))
        gated.permit()
        await other  # ends after all of the slow reader's tokens have been delivered
        rest = [output async for output in stream]
    assert [len(output.token_ids) for output in (first, *rest)] == [1, 9]
    merged = SequenceOutput.merge([first, *rest])
    assert merged.token_ids == alone(request).token_ids
    assert len(merged.logprobs) == 10
    assert reason(merged) is FinishReason.LENGTH


async def test_a_step_calls_the_loop_once_for_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    call_soon_threadsafe = loop.call_soon_threadsafe
    num_calls = 0

    def count(callback: Callable[..., object], *args: Any, **options: Any) -> asyncio.Handle:
        nonlocal num_calls
        num_calls += threading.current_thread().name == "engine"
        return call_soon_threadsafe(callback, *args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    gated = GatedEngine()
    async with running(gated) as engine:
        assert num_calls == 1, "the start itself"
        tasks = [await started(engine, EngineRequest([index], greedy(6))) for index in range(4)]
        gated.permit()
        await asyncio.gather(*tasks)
        assert max(gated.outputs_per_step) == 4
        assert num_calls == 1 + len(gated.outputs_per_step)


async def test_a_timeout_ends_a_stream_with_a_finish() -> None:
    async with running(tiny_engine()) as engine:
        output = await collect(engine, EngineRequest([1, 2], greedy(300), timeout=1e-9))
    assert (output.token_ids, reason(output)) == ((), FinishReason.DEADLINE)


async def test_load_follows_what_runs_and_waits() -> None:
    gated = GatedEngine(max_num_seqs=1)
    async with running(gated) as engine:
        tasks = [await started(engine, EngineRequest([1], greedy(2))) for _ in range(3)]
        stream = engine.run(EngineRequest([1], greedy(2)))
        gated.permit(2)
        await tasks[0]
        assert (engine.load.num_running, engine.load.num_waiting) == (0, 2)
        gated.permit()
        await asyncio.gather(*tasks[1:])
        assert [output.finish is None async for output in stream][-1] is False
        assert (engine.load.num_running, engine.load.num_waiting) == (0, 0)


# Going away


async def test_closing_a_stream_frees_its_blocks_before_the_next_step() -> None:
    gated = GatedEngine(permits=2)
    async with running(gated) as engine:
        stream = engine.run(LONG)
        assert (await anext(stream)).finish is None
        await stream.aclose()
        gated.permit()
        barrier = await collect(engine, EngineRequest([4], greedy(1)))
        assert reason(barrier) is FinishReason.LENGTH
        assert (engine.load.num_running, engine.load.kv_blocks_used) == (0, 0)
        # Two steps with permits, at most one that had begun, and the barrier's own.
        assert len(gated.outputs_per_step) <= 4
        gated.scheduler.check_integrity()


async def test_cancelling_a_reader_at_any_time_frees_its_blocks() -> None:
    gated = GatedEngine(max_num_seqs=2)
    async with running(gated) as engine:
        decoding = await started(engine, LONG)
        await gated.reach_gate()
        gated.permit(1)
        prefilling = await started(engine, EngineRequest([1] * 100, greedy(2)))
        waiting = await started(engine, LONG)
        unseen = await started(engine, LONG)
        for task in (decoding, prefilling, waiting, unseen):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gated.permit()
        await collect(engine, EngineRequest([4], greedy(1)))
        assert (engine.load.num_running, engine.load.num_waiting) == (0, 0)
        assert engine.load.kv_blocks_used == 0
        assert len(gated.outputs_per_step) < 10


async def test_mates_of_a_closed_stream_are_not_changed() -> None:
    request = EngineRequest([7, 8, 9], greedy(20))
    gated = GatedEngine()
    async with running(gated) as engine:
        leaving = engine.run(LONG)
        staying = asyncio.create_task(collect(engine, request))
        gated.permit(2)
        await anext(leaving)
        await leaving.aclose()
        gated.permit()
        assert (await staying).token_ids == alone(request).token_ids


async def test_closing_a_finished_stream_changes_nothing() -> None:
    async with running(tiny_engine()) as engine:
        stream = engine.run(EngineRequest([1], greedy(1)))
        assert (await anext(stream)).finish is not None
        await stream.aclose()
        assert reason(await collect(engine, EngineRequest([1], greedy(1)))) is FinishReason.LENGTH
        engine.check_health()


async def test_a_stream_that_is_never_read_costs_nothing() -> None:
    async with running(tiny_engine()) as engine:
        await engine.run(LONG).aclose()
        assert await engine.drain(PATIENCE)


# Refusals


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (EngineRequest([999], greedy(2)), InvalidRequestError),
        (EngineRequest([], None), InvalidRequestError),
        (EngineRequest([1], greedy(2, top_p=0.0)), InvalidRequestError),
        (EngineRequest([1] * 30, greedy(100)), NeverFitsError),
    ],
)
async def test_a_refusal_is_raised_in_its_own_stream_only(
    request_: EngineRequest, error: type[EngineError]
) -> None:
    good = EngineRequest([1, 2], greedy(10))
    gated = GatedEngine(num_blocks=16)
    async with running(gated) as engine:
        before, refused, after = (
            await started(engine, good),
            await started(engine, request_),
            await started(engine, good),
        )
        gated.permit()
        with pytest.raises(error):
            await refused
        for task in (before, after):
            assert (await task).token_ids == alone(good).token_ids
        engine.check_health()
        assert await engine.drain(PATIENCE), "a refused request is not open"


async def test_a_full_queue_refuses_only_what_it_cannot_hold() -> None:
    good = EngineRequest([1, 2], greedy(10))
    gated = GatedEngine(max_num_seqs=1, max_waiting_requests=1)
    async with running(gated) as engine:
        running_ = await started(engine, good)
        await gated.reach_gate()
        waiting, refused = await started(engine, good), await started(engine, good)
        gated.permit()
        with pytest.raises(QueueFullError):
            await refused
        for task in (running_, waiting):
            assert (await task).token_ids == alone(good).token_ids


# Failure and stall


async def test_a_failed_step_ends_every_stream_and_the_engine() -> None:
    gated = GatedEngine(permits=1, fail_after=2, max_num_seqs=1)
    async with running(gated) as engine:
        decoding = engine.run(LONG)
        await anext(decoding)
        waiting = await started(engine, LONG)
        gated.permit(1)
        await anext(decoding)
        unseen = await started(engine, LONG)
        gated.permit()
        with pytest.raises(EngineDeadError):
            await anext(decoding)
        ends = await asyncio.gather(waiting, unseen, return_exceptions=True)
        assert all(isinstance(end, EngineDeadError) for end in ends)
        await gated.thread_has_ended()
        # The last one may have been seen before the failure, or not.
        lost = [end for end in ends if isinstance(end, RequestLostError)]
        assert lost[0] is ends[0]
        assert gated.ends == [FinishReason.ERROR] * (1 + len(lost))
        with pytest.raises(EngineDeadError):
            engine.check_health()
        with pytest.raises(EngineDeadError):
            await collect(engine, LONG)


async def test_tokens_made_before_the_failure_are_read_first() -> None:
    gated = GatedEngine(permits=FREE, fail_after=4)
    async with running(gated) as engine:
        stream = engine.run(LONG)
        tokens = (await anext(stream)).token_ids
        await gated.thread_has_ended()
        while len(tokens) < 4:
            tokens += (await anext(stream)).token_ids
        assert tokens == alone(LONG).token_ids[:4]
        with pytest.raises(EngineDeadError):
            await anext(stream)


async def test_a_request_that_arrives_while_the_engine_dies_is_not_left_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread has told all readers it knows, and has not ended yet."""
    loop = asyncio.get_running_loop()
    call_soon_threadsafe = loop.call_soon_threadsafe
    dying, may_die = threading.Event(), threading.Event()
    gated = GatedEngine(fail_after=0)

    def hold(callback: Callable[..., object], *args: Any, **options: Any) -> asyncio.Handle:
        handle = call_soon_threadsafe(callback, *args, **options)
        if gated.at_gate.is_set() and threading.current_thread().name == "engine":
            dying.set()
            assert may_die.wait(PATIENCE)
        return handle

    monkeypatch.setattr(loop, "call_soon_threadsafe", hold)
    async with running(gated) as engine:
        known = await started(engine, LONG)
        gated.permit()
        assert await asyncio.to_thread(dying.wait, PATIENCE)
        late = await started(engine, LONG)
        may_die.set()
        with pytest.raises(EngineDeadError):
            await known
        await gated.thread_has_ended()
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(late, 1.0)


class UnluckyEngine(AsyncEngine):
    """Something happens right after it has been found alive."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(lambda: engine, num_threads=1, stall_seconds=60.0)
        self.then: Callable[[], None] = lambda: None

    def check_alive(self) -> None:
        super().check_alive()
        self.then()


async def test_a_request_that_is_queued_behind_the_death_is_not_left_waiting() -> None:
    gated = GatedEngine(fail_after=0)
    engine = UnluckyEngine(gated)
    await engine.start()
    known = await started(engine, LONG)
    await gated.reach_gate()

    def die() -> None:
        gated.permit()
        gated.thread.join(PATIENCE)

    engine.then = die
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(collect(engine, LONG), 1.0)
    with pytest.raises(EngineDeadError):
        await known
    await engine.shutdown()


async def test_a_step_that_does_not_end_is_a_stall_until_it_ends() -> None:
    gated = GatedEngine()
    async with running(gated, stall_seconds=0.0) as engine:
        engine.check_health()  # without work there is nothing to stall
        task = await started(engine, EngineRequest([1], greedy(1)))
        await gated.reach_gate()
        with pytest.raises(EngineStalledError, match="finished no step"):
            engine.check_health()
        gated.permit()
        await task
        engine.check_health()


async def test_a_step_that_takes_a_while_is_no_stall() -> None:
    gated = GatedEngine()
    async with running(gated, stall_seconds=60.0) as engine:
        task = await started(engine, EngineRequest([1], greedy(1)))
        await gated.reach_gate()
        engine.check_health()
        gated.permit()
        await task


# Drain and shutdown


async def test_draining_finishes_open_streams_and_takes_no_new() -> None:
    request = EngineRequest([1, 2], greedy(10))
    gated = GatedEngine(max_num_seqs=1)
    async with running(gated) as engine:
        assert not engine.is_draining
        tasks = [await started(engine, request) for _ in range(3)]
        drain = asyncio.create_task(engine.drain(PATIENCE))
        await asyncio.sleep(0)
        assert engine.is_draining
        assert not drain.done()
        with pytest.raises(EngineDrainingError):
            await collect(engine, request)
        gated.permit()
        assert await drain
        for task in tasks:
            assert (await task).token_ids == alone(request).token_ids


async def test_what_is_not_finished_in_time_is_cancelled_with_what_it_has() -> None:
    gated = GatedEngine(max_num_seqs=1)
    async with running(gated) as engine:
        stream = engine.run(LONG)
        gated.permit(1)
        first = await anext(stream)
        waiting = await started(engine, LONG)
        draining = asyncio.create_task(engine.drain(0.0))
        gated.permit()
        rest = SequenceOutput.merge([output async for output in stream])
        assert not await draining
        assert reason(rest) is FinishReason.CANCELLED
        tokens = (*first.token_ids, *rest.token_ids)
        assert tokens == alone(LONG).token_ids[: len(tokens)]
        assert len(tokens) < len(alone(LONG).token_ids)
        assert reason(await waiting) is FinishReason.CANCELLED
        assert engine.load.kv_blocks_used == 0
        engine.check_health()


async def test_an_idle_engine_is_drained_at_once() -> None:
    async with running(tiny_engine()) as engine:
        await collect(engine, EngineRequest([1], greedy(1)))
        assert await engine.drain(PATIENCE)


async def test_draining_an_idle_engine_takes_no_time() -> None:
    async with running(tiny_engine()) as engine:
        assert await engine.drain(0.0)


async def test_shutdown_ends_the_thread_and_every_stream() -> None:
    gated = GatedEngine()
    async with running(gated) as engine:
        task = await started(engine, LONG)
        await gated.reach_gate()
        shutdown = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        gated.permit(1)
        await shutdown
        assert not gated.thread.is_alive()
        with pytest.raises(EngineDeadError):
            await task
        assert len(gated.outputs_per_step) == 1, "no step follows"
        with pytest.raises(EngineDrainingError):
            await collect(engine, LONG)
        with pytest.raises(EngineDeadError):
            engine.check_health()


async def test_shutdown_may_be_called_twice_and_without_start() -> None:
    await never_started().shutdown()
    engine = never_started()
    await engine.start()
    await engine.shutdown()
    await engine.shutdown()
