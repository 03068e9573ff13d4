"""The same load from one asyncio event loop: what locust says, said by another client.

    >>> asyncio.run(run_load(LoadSpec("127.0.0.1:9000", workload, users=8, num_requests=64)))

It takes less of a core per stream than locust does, has no page, no processes and, in a closed
loop, no shapes.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc

from loadtests.client_cpu import CpuMeter, WaitMeter
from loadtests.connection import USERS_PER_CHANNEL, metadata, open_async_channel
from loadtests.feed import Feed, Turn
from loadtests.load import LoadSpec, LoadSummary
from loadtests.recording import EPOCH, Recording, message
from loadtests.samples import Sample
from loadtests.summary import summarize
from protos.headroom.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc

_METER_SECONDS = 1.0


async def run_load(spec: LoadSpec) -> LoadSummary:
    """Run a load from its first request to its last.

    Raises:
        ValueError: the load has no end, or asks for what this client does not do.
        grpc.RpcError: the server does not say what it serves.
    """
    if spec.num_requests is None and spec.seconds is None:
        raise ValueError("num_requests and seconds are None; allowed: at least one of them")
    if spec.processes != 1 or (spec.rate is None and spec.shape != "steady"):
        raise ValueError("allowed: one process, and a steady closed loop or an open one")
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(open_async_channel(spec))
            for _ in range(0, spec.users, USERS_PER_CHANNEL)
        ]
        models: Any = models_pb2_grpc.ModelServiceStub(channels[0])
        model = await models.GetModel(models_pb2.GetModelRequest(), metadata=metadata(spec))
        feed, cpu, waits = Feed(spec, model.vocab_size), CpuMeter(), WaitMeter()
        began = time.perf_counter()
        metering = asyncio.create_task(_update(cpu, waits))
        samples = await asyncio.gather(
            *(
                _user(user, channels[user // USERS_PER_CHANNEL], spec, feed, began)
                for user in range(spec.users)
            )
        )
        metering.cancel()
    return summarize(
        list(itertools.chain.from_iterable(samples)),
        client_cpu=cpu.busiest(),
        client_wait=waits.share(),
        began=began + EPOCH,
        stages=[] if spec.shape == "steady" else spec.stages,
    )


async def _update(cpu: CpuMeter, waits: WaitMeter) -> None:
    while True:
        await asyncio.sleep(_METER_SECONDS)
        cpu.update()
        waits.update()


async def _user(
    number: int, channel: grpc.aio.Channel, spec: LoadSpec, feed: Feed, began: float
) -> list[Sample]:
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    generate = functools.partial(stub.Generate, metadata=metadata(spec), timeout=spec.timeout)
    samples: list[Sample] = []
    while (turn := feed.next_turn(time.perf_counter() - began)) is not None:
        samples.append(await _send(generate, turn, number, began))
    return samples


async def _send(generate: Callable[..., Any], turn: Turn, user: int, began: float) -> Sample:
    due = None
    if turn.due is not None:
        due = began + turn.due
        await asyncio.sleep(due - time.perf_counter())
    request = message(turn.request)
    recording = Recording(turn.request, user, due)
    call = generate(request)
    try:
        async for response in call:
            if recording.add(response):
                call.cancel()
                break
    except grpc.RpcError:
        pass  # the status says all
    code, details = await call.code(), await call.details()
    return recording.end(code, details or "", tuple(await call.trailing_metadata() or ()))
