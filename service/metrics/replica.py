"""Everything that one replica exposes."""

import copy
import itertools
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version

import torch
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.auth.gate import Gate
from service.engine.async_engine import AsyncEngine
from service.engine.engine import Engine
from service.metrics.engine import EngineMetrics
from service.metrics.families import gauge, info
from service.metrics.rpc import RpcMetrics


def replica_registry(
    engine: AsyncEngine,
    engine_metrics: EngineMetrics,
    rpc_metrics: RpcMetrics,
    gate: Gate | None,
) -> CollectorRegistry:
    """The registry of a replica whose engine has started."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(_ReplicaCollector(engine, engine_metrics, rpc_metrics, gate))
    return registry


class _ReplicaCollector(Collector):
    """Adds to every series which model it is about, and which heads that has."""

    def __init__(
        self,
        engine: AsyncEngine,
        engine_metrics: EngineMetrics,
        rpc_metrics: RpcMetrics,
        gate: Gate | None,
    ) -> None:
        self._engine = engine
        self._gate = gate
        self._engine_metrics = engine_metrics
        self._rpc_metrics = rpc_metrics
        config = engine.engine.served_config
        self._labels = {"model": config.name, "head_config": config.head_label}
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        GCCollector(registry=self._process)

    def collect(self) -> Iterator[Metric]:
        for family in itertools.chain(
            _load(self._engine),
            self._engine_metrics.collect(),
            self._rpc_metrics.collect(),
            _tokens(self._gate),
            _facts(self._engine.engine),
            self._process.collect(),
        ):
            labelled = copy.copy(family)
            labelled.samples = [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in family.samples
            ]
            yield labelled


def _load(engine: AsyncEngine) -> Iterator[Metric]:
    load = engine.load
    yield gauge(
        "headroom_num_requests_running",
        "Requests that take part in steps.",
        {(): load.num_running},
    )
    yield gauge("headroom_num_requests_waiting", "Requests in the queue.", {(): load.num_waiting})
    yield gauge(
        "headroom_kv_cache_usage_ratio",
        "Share of the KV blocks that requests use, 0 to 1.",
        {(): load.kv_blocks_used / load.kv_blocks_total},
    )
    unused = load.kv_blocks_total - load.kv_blocks_used
    yield gauge(
        "headroom_kv_blocks",
        "KV blocks that requests use, that hold a known prefix for later, and that are empty.",
        {
            ("used",): load.kv_blocks_used,
            ("cached",): load.kv_blocks_cached,
            ("free",): unused - load.kv_blocks_cached,
        },
        ("state",),
    )
    yield gauge(
        "headroom_engine_step_age_seconds",
        "How long the engine has worked on its current step; 0 if on none.",
        {(): engine.step_age},
    )


def _tokens(gate: Gate | None) -> Iterator[Metric]:
    if gate is not None:
        yield gauge(
            "headroom_token_file_current",
            "Whether the tokens in use are those of the token file; 0 if that cannot be used.",
            {(): float(gate.has_current_tokens)},
        )


def _facts(engine: Engine) -> Iterator[Metric]:
    config, model = engine.served_config, engine.model_runner.model
    layers = config.layers
    yield info(
        "headroom_model",
        "The served model; where layers differ, their values are joined by +.",
        {
            "family": config.family,
            "dtype": config.dtype,
            "weight_dtype": engine.config.weight_dtype,
            "kv_cache_dtype": config.kv_cache_dtype,
            "device": str(model.device),
            "backend": engine.backend,
            "attention": _joined(heads.kind for heads in layers),
            "num_layers": str(config.num_layers),
            "num_heads": _joined(heads.num_heads for heads in layers),
            "num_kv_heads": _joined(heads.num_kv_heads for heads in layers),
            "head_dim": _joined(heads.head_dim for heads in layers),
            "kv_bytes_per_token": str(engine.kv_bytes_per_token),
            "num_parameters": str(model.num_parameters),
            "max_model_len": str(engine.max_model_len),
        },
    )
    yield info(
        "headroom_build",
        "Versions of the running program.",
        {
            "version": version("headroom"),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    )


def _joined(values: Iterable[object]) -> str:
    return "+".join(dict.fromkeys(map(str, values)))
