"""The servicer on a plain grpc.aio server: one process, one replica, no Ray."""

import asyncio
import signal
import tempfile
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2_grpc

from protos.headroom.v1 import attention_pb2_grpc, generation_pb2_grpc, models_pb2_grpc
from service.certificates import CertificateFiles, Certificates
from service.config import ServiceConfig
from service.logs import configure_logs
from service.metrics.engine import EngineMetrics
from service.metrics.replica import replica_registry
from service.metrics.server import MetricsServer
from service.replica import (
    attention_limits,
    certificate_files,
    make_gate,
    make_tracing,
    start_engine,
)
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
    files = certificate_files(config)
    try:
        if files is None:
            return server, server.add_insecure_port(address)
        return server, server.add_secure_port(address, _credentials(files))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error


async def serve(config: ServiceConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Args:
        on_ready: called once the port answers, on a thread of its own, with a target where this
            user's processes are answered in the clear.

    Raises:
        ModelError, ValueError: see `start_engine`.
        OSError: the port cannot be bound.
    """
    configure_logs(config.log_format, config.log_level)
    engine_metrics = EngineMetrics(prefix_caching=config.engine.enable_prefix_caching)
    engine, tokenizer = await start_engine(config, engine_metrics)
    tracing = make_tracing(config)
    try:
        servicer = HeadroomServicer(
            engine, tokenizer, attention_limits(config), gate=make_gate(config), tracing=tracing
        )
        server, _ = create_server(config, servicer)
        registry = replica_registry(engine, engine_metrics, servicer.rpc_metrics, servicer.gate)
        with (
            tempfile.TemporaryDirectory(prefix="headroom-") as directory,
            MetricsServer(
                registry, config.host, lambda: config.metrics_port or None, servicer.states
            ),
        ):
            door = f"unix:{directory}/own.sock"
            server.add_insecure_port(door)
            await server.start()
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await asyncio.to_thread(on_ready, door)
            await stop.wait()
            await engine.drain(config.drain_seconds)
            await server.stop(_FLUSH_SECONDS)
    finally:
        await engine.shutdown()
        if tracing is not None:
            await asyncio.to_thread(tracing.shutdown)


def _credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Of TLS 1.2 and later; before each handshake the files are looked at."""

    def configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
        pair = (certificates.key, certificates.chain)
        return grpc.ssl_server_certificate_configuration([pair], certificates.client_ca)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        changed = files.changed()
        return None if changed is None else configuration(changed)

    return grpc.dynamic_ssl_server_credentials(
        configuration(files.current),
        fetch,  # type: ignore[arg-type]
        require_client_authentication=files.current.client_ca is not None,
    )


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
