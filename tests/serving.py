"""A real server on a real port inside the test's event loop, and ways to wait for its state."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from protos.headroom.v1 import (
    attention_pb2_grpc,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from service.config import ServiceConfig
from service.engine import EngineConfig
from service.engine.async_engine import AsyncEngine
from service.metrics.engine import EngineMetrics
from service.metrics.replica import replica_registry
from service.metrics.server import States
from service.replica import attention_limits, make_gate, make_tracing, start_engine
from service.runtimes.ray_environment import free_ports
from service.runtimes.standalone import create_server
from service.servicer import HeadroomServicer


@dataclass(frozen=True, slots=True)
class RunningServer:
    target: str
    engine: AsyncEngine
    generation: Any
    attention: Any
    models: Any
    channel: grpc.aio.Channel
    registry: CollectorRegistry
    states: States

    async def load(self) -> models_pb2.GetLoadResponse:
        return await self.models.GetLoad(models_pb2.GetLoadRequest())  # type: ignore[no-any-return]

    async def until(
        self, reached: Callable[[models_pb2.GetLoadResponse], bool]
    ) -> models_pb2.GetLoadResponse:
        """Ask for the load, one call after the other, until it is as wanted."""
        while not reached(load := await self.load()):
            pass
        return load

    async def until_idle(self) -> None:
        """Until nothing runs, nothing waits and no KV block is used."""
        await self.until(
            lambda load: not (load.num_running or load.num_waiting or load.kv_blocks_used)
        )
        self.engine.engine.scheduler.check_integrity()


@asynccontextmanager
async def running_server(
    model: Path,
    *,
    attend_max_bytes: int = 64 * 2**20,
    otlp_endpoint: str | None = None,
    tokens: Path | None = None,
    **engine: Any,
) -> AsyncIterator[RunningServer]:
    config = ServiceConfig(
        model=str(model),
        port=free_ports(1)[0],
        engine=EngineConfig(num_threads=1, **engine),
        max_message_bytes=2**20,
        attend_max_bytes=attend_max_bytes,
        otlp_endpoint=otlp_endpoint,
        tokens=tokens,
    )
    engine_metrics = EngineMetrics(prefix_caching=config.engine.enable_prefix_caching)
    async_engine, tokenizer = await start_engine(config, engine_metrics)
    tracing = make_tracing(config)
    servicer = HeadroomServicer(
        async_engine, tokenizer, attention_limits(config), gate=make_gate(config), tracing=tracing
    )
    server, port = create_server(config, servicer)
    await server.start()
    target = f"127.0.0.1:{port}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield RunningServer(
                target,
                async_engine,
                generation_pb2_grpc.GenerationServiceStub(channel),
                attention_pb2_grpc.AttentionServiceStub(channel),
                models_pb2_grpc.ModelServiceStub(channel),
                channel,
                replica_registry(async_engine, engine_metrics, servicer.rpc_metrics, servicer.gate),
                servicer.states,
            )
    finally:
        await server.stop(0)
        await async_engine.shutdown()
        if tracing is not None:
            await asyncio.to_thread(tracing.shutdown)
