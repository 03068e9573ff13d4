"""The servicer on a plain grpc.aio server: one process, one replica, no Ray."""

import asyncio
import signal
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2_grpc

from protos.headroom.v1 import attention_pb2_grpc, generation_pb2_grpc, models_pb2_grpc
from service.config import ServiceConfig
from service.metrics.engine import EngineMetrics
from service.metrics.replica import replica_registry
from service.metrics.server import MetricsServer
from service.replica import attention_limits, start_engine
from service.servicer import HeadroomServicer

# After the drain every stream has its last message; this lets it reach the client.
_FLUSH_SECONDS = 1.0


def create_server(config: ServiceConfig, servicer: HeadroomServicer) -> tuple[grpc.aio.Server, int]:
    """A server that has bound its port and is not started; and the port, if 0 was asked for.

    Raises:
        OSError: the port cannot be bound.
    """
    server = grpc.aio.server(options=_server_options(config))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    attention_pb2_grpc.add_AttentionServiceServicer_to_server(servicer, server)
    models_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"{config.host}:{config.port}"
    try:
        return server, server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error


async def serve(config: ServiceConfig, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Args:
        on_ready: called, on a thread of its own, once the port answers.

    Raises:
        ModelError, ValueError: see `start_engine`.
        OSError: the port cannot be bound.
    """
    engine_metrics = EngineMetrics(prefix_caching=config.engine.enable_prefix_caching)
    engine, tokenizer = await start_engine(config, engine_metrics)
    try:
        servicer = HeadroomServicer(engine, tokenizer, attention_limits(config))
        server, _ = create_server(config, servicer)
        await server.start()
        registry = replica_registry(engine, engine_metrics, servicer.rpc_metrics)
        with MetricsServer(
            registry,
            config.host,
            lambda: config.metrics_port or None,
            lambda: servicer.is_serving,
        ):
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await asyncio.to_thread(on_ready)
            await stop.wait()
            await engine.drain(config.drain_seconds)
            await server.stop(_FLUSH_SECONDS)
    finally:
        await engine.shutdown()


def _server_options(config: ServiceConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Two servers on one port would each get some of the clients.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
