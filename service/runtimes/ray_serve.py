"""The servicer as a Ray Serve application: replicas behind Serve's HAProxy gRPC ingress.

Ingress and engine live in one replica: HAProxy connects clients to the gRPC server inside the
replica, so a token crosses no process on its way out. Import this module only after the variables
of `ray_environment` are set.
"""

import asyncio
import dataclasses
import io
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import ray
import structlog
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig

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
from service.runtimes import autoscaling, ray_cluster
from service.runtimes.devices import check_devices, device_of
from service.runtimes.edge import Addresses, Edge
from service.runtimes.ray_environment import DEREGISTER_SECONDS, free_ports
from service.servicer import HeadroomServicer

log = structlog.get_logger()

SERVICER_FUNCTIONS = [
    "protos.headroom.v1.generation_pb2_grpc.add_GenerationServiceServicer_to_server",
    "protos.headroom.v1.attention_pb2_grpc.add_AttentionServiceServicer_to_server",
    "protos.headroom.v1.models_pb2_grpc.add_ModelServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
# Room for calls that do not queue in the engine, such as health checks and GetLoad.
_OTHER_CALLS = 64
_WATCH_SECONDS = 5.0
_STOP_MARGIN_SECONDS = 10.0
_POLL_SECONDS = 0.1
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


class HeadroomReplica(HeadroomServicer):
    """One replica. Serve calls the methods that are named after the RPCs."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        # Serve awaits it.
        config = ServiceConfig(**settings)
        # Serve has put a logger of its own in the place of `sys.stderr`: it takes each line for
        # INFO, which is below the level of `_LOGGING`, and drops it.
        configure_logs(config.log_format, config.log_level, sys.__stderr__)
        engine_metrics = EngineMetrics(prefix_caching=config.engine.enable_prefix_caching)
        engine, tokenizer = await start_engine(config, engine_metrics)
        super().__init__(
            engine,
            tokenizer,
            attention_limits(config),
            gate=make_gate(config),
            tracing=make_tracing(config),
            watch_seconds=_WATCH_SECONDS,
        )
        registry = replica_registry(engine, engine_metrics, self.rpc_metrics, self.gate)
        self._metrics = MetricsServer(
            registry, config.host, lambda: _metrics_port(config), self.states
        )
        self._metrics.start()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises several times."""
        self._engine.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `QueueAndCachePolicy`; asked by Serve where a deployment scales."""
        load = self._engine.load
        return {
            autoscaling.WAITING: load.num_waiting,
            autoscaling.CACHE_USAGE: load.kv_blocks_used / load.kv_blocks_total,
        }

    async def __del__(self) -> None:
        if hasattr(self, "_metrics"):  # it started
            await self._engine.shutdown()
            self._metrics.close()
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.shutdown)


def _metrics_port(config: ServiceConfig) -> int | None:
    """Of this replica, among those of its node. One that takes another's place ranks behind all
    others until that one has gone; then it gets its rank, and with it the port."""
    rank: int = serve.get_replica_context().rank.local_rank
    return config.metrics_ports[rank] if rank < len(config.metrics_ports) else None


def build_app(config: ServiceConfig) -> Application:
    """The application of a configuration with one model; Serve's typed application builder."""
    on_gpu = device_of(config) == "cuda"
    max_open = config.engine.max_num_seqs + config.engine.max_waiting_requests + _OTHER_CALLS
    settings = config.model_dump()
    # A replica finds its files from wherever it runs.
    settings["model"] = str(config.model_path.resolve())
    settings["tokens"] = config.tokens and config.tokens.resolve()
    settings["engine"]["device"] = device_of(config)
    return (
        serve.deployment(HeadroomReplica)
        .options(
            num_replicas=config.replicas,
            max_ongoing_requests=max_open,
            ray_actor_options={"num_cpus": 1, "num_gpus": 1 if on_gpu else 0},
            graceful_shutdown_timeout_s=config.drain_seconds + DEREGISTER_SECONDS,
            graceful_shutdown_wait_loop_s=0.2,
            health_check_period_s=2,
            health_check_timeout_s=10,
            logging_config=_LOGGING,
        )
        .bind(settings)
    )


def start(config: ServiceConfig, addresses: Addresses) -> Path:
    """Start or join a cluster and deploy; returns when all replicas are ready.

    Args:
        addresses: where Serve's own HAProxy listens.

    Returns:
        The folder of the cluster's log files on this machine.

    Raises:
        RuntimeError: the cluster cannot be used, or the application did not become ready.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logs = ray_cluster.connect(config, on_gpu=device_of(config) == "cuda")
    serve.start(
        http_options=HTTPOptions(host=addresses.host, port=addresses.http_port),
        grpc_options=gRPCOptions(
            port=addresses.port,
            grpc_servicer_functions=SERVICER_FUNCTIONS,
            # Its answers would not pass the servicer, which asks for tokens.
            enable_reflection=config.tokens is None,
        ),
        logging_config=_LOGGING,
    )
    deploy(config)
    return logs


def deploy(config: ServiceConfig) -> None:
    """Deploy the applications or, if they run already, update them without losing requests."""
    num_threads = config.engine.num_threads or _threads_per_replica(config)
    engine = dataclasses.replace(config.engine, num_threads=num_threads)
    applications = config.model_copy(update={"engine": engine}).applications
    # HAProxy knows no application without a route prefix, and each needs its own.
    prefixes = ["/"] if len(applications) == 1 else [f"/{one.application}" for one in applications]
    serve.run_many(
        [
            serve.RunTarget(build_app(one), name=one.application, route_prefix=prefix)
            for one, prefix in zip(applications, prefixes, strict=True)
        ]
    )


def stop(config: ServiceConfig) -> None:
    """Drain the replicas and end every process of the local cluster, or of Serve on another."""
    if not ray.is_initialized():
        return
    # Shutting Serve down at once would end HAProxy, and with it every open stream. Without its
    # applications no new requests arrive, and their replicas end when their streams have.
    try:
        for application in config.applications:
            serve.delete(application.application, _blocking=False)
        deadline = time.monotonic() + config.drain_seconds + _STOP_MARGIN_SECONDS
        while serve.status().applications and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    except Exception:  # Serve may never have run; the cluster has to end all the same
        log.exception("replicas were not drained")
    # Serve's controller ends within the call that asks it to, and Ray prints that the call failed.
    with redirect_stdout(io.StringIO()):
        serve.shutdown()
        ray.shutdown()


def serve_until_stopped(
    config: ServiceConfig, directory: Path, on_ready: Callable[[str, Path], None]
) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Args:
        directory: HAProxy's, removed at the end.
        on_ready: called once the application is deployed, with the address where it answers in
            the clear and the folder of log files.
    """
    stopped = threading.Event()
    check_devices(config)
    try:
        with _front(config, directory) as addresses:
            try:
                logs = start(config, addresses)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: stopped.set())
                on_ready(addresses.target, logs)
                stopped.wait()
            finally:
                stop(config)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _front(config: ServiceConfig, directory: Path) -> Iterator[Addresses]:
    """Where Serve is to listen: where clients find it, or on loopback behind the TLS edge."""
    outside = Addresses(config.host, config.port, config.http_port)
    files = certificate_files(config)
    if files is None:
        yield outside
        return
    behind = Addresses("127.0.0.1", *free_ports(2))
    with Edge(outside, behind, files, directory):
        yield behind


def _threads_per_replica(config: ServiceConfig) -> int:
    """Nodes are taken to have as many cores as this machine, and to share the replicas."""
    per_node = math.ceil(config.num_replicas / ray_cluster.num_nodes())
    return max(len(os.sched_getaffinity(0)) // per_node, 1)
