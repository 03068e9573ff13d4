"""The Ray cluster of a server: its own on this machine, or one that is running already.

Import this module only after the variables of `ray_environment` are set.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.config import ServiceConfig
from service.runtimes.ray_address import speaks_tls, uses_tls
from service.runtimes.ray_environment import node_environment

_OBJECT_STORE_BYTES = 100 * 1024 * 1024
_ANSWER_SECONDS = 60.0


class ClusterError(RuntimeError):
    """A running cluster that this server cannot use; the message says what it needs."""


def connect(config: ServiceConfig, *, on_gpu: bool) -> Path:
    """Start a cluster on this machine, or join the one at `ray_address`.

    Args:
        on_gpu: whether each replica gets a GPU.

    Returns:
        The folder of log files of the node on this machine.

    Raises:
        ClusterError: the cluster cannot be used; it is left as it was.
        ConnectionError: what is there is no Ray cluster.
    """
    own: dict[str, Any] = {
        "address": "local",  # never a cluster that somebody else has started
        # Replicas share the cores by threads; a rolling update needs room for one more.
        "num_cpus": 2 * config.num_replicas + 1,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    if config.ray_address is not None:
        _look_for(config.ray_address)
    try:
        context = ray.init(
            **(own if config.ray_address is None else {"address": config.ray_address}),
            logging_level=logging.WARNING,
            log_to_driver=False,
            namespace="headroom",
        )
    except RayError as error:  # another token than the cluster's
        raise ClusterError(_last_line(error)) from error
    if config.ray_address is not None:
        try:
            _check_resources(config, on_gpu)
            _check_nodes(config)
        except ClusterError:
            ray.shutdown()
            raise
    return Path(context.address_info["session_dir"]) / "logs"


def _look_for(address: str) -> None:
    """Ray itself would try for minutes."""
    try:
        tls = speaks_tls(address)
    except (OSError, OverflowError) as error:
        raise ClusterError(f"ray_address is {address}, where nobody answers: {error}") from error
    if tls != uses_tls(os.environ):
        spoken, allowed = ("TLS", "RAY_USE_TLS=1") if tls else ("in the clear", "no RAY_USE_TLS")
        raise ClusterError(
            f"ray_address is {address}, which speaks {spoken}; allowed: {allowed}, as on its nodes"
        )


def num_nodes() -> int:
    """Of the cluster that is connected."""
    return len(_nodes())


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _check_resources(config: ServiceConfig, on_gpu: bool) -> None:
    """Serve would wait for them without an end."""
    there = ray.cluster_resources()
    for kind in ("CPU", "GPU") if on_gpu else ("CPU",):
        if config.num_replicas > there.get(kind, 0):
            raise ClusterError(
                f"replicas is {config.replicas}, of {len(config.applications)} applications; "
                f"allowed: at most {there.get(kind, 0):g} in all, one per {kind} of the cluster at "
                f"{config.ray_address}"
            )


def _check_nodes(config: ServiceConfig) -> None:
    """Serve reads these variables on each node: without them it is another ingress, or has other
    limits, and says nothing of it."""
    if serve.status().proxies:
        raise ClusterError(
            f"Ray Serve runs on the cluster at {config.ray_address} already; allowed: a cluster "
            "without it (`ray stop` on each node ends everything there)"
        )
    wanted = node_environment(config)
    answers = {}
    for node in _nodes():
        there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        ask = ray.remote(num_cpus=0, scheduling_strategy=there)(_variables)
        answers[node["NodeManagerAddress"]] = ask.remote(list(wanted))
    for address, answer in answers.items():
        try:
            found = ray.get(answer, timeout=_ANSWER_SECONDS)
        except RayError as error:
            reason = _last_line(error)
            raise ClusterError(f"node {address} does not run this Headroom: {reason}") from error
        _check_variables(address, found, wanted)


def _check_variables(address: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ClusterError(
                f"node {address} has {name}={found.get(name, '')}; allowed: {value}, in the "
                "environment of `ray start` there"
            )


def _last_line(error: RayError) -> str:
    return str(error).strip().splitlines()[-1]


def _variables(names: list[str]) -> dict[str, str]:
    """Those that are set; runs on a node."""
    return {name: os.environ[name] for name in names if name in os.environ}
