"""Versions, settings, model, memory, ports and limits of this machine."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from models.cpu.library import multiplies_by_amx, vectors_in_use, why_unavailable
from models.errors import ModelError
from service.config import ServiceConfig
from service.doctor.certificates import examine_certificates
from service.doctor.cluster import examine_cluster
from service.doctor.finding import Finding, Level
from service.doctor.token_file import examine_tokens
from service.engine.memory import available_memory, resolve_device
from service.replica import check_model
from service.runtimes.devices import check_devices

_PYTHONS = ((3, 11), (3, 12))
_RAY_VERSIONS = ((2, 60), (2, 61))  # from, and before
_LEAST_OPEN_FILES = 4096
# Ray's object store and its sockets and logs.
LEAST_SHARED_MEMORY = 128 * 2**20
_LEAST_TEMPORARY = 512 * 2**20
# Ray's own processes beside the replicas.
_RAY_MEMORY = 1536 * 2**20
# Values that make threads sleep between operations; None is any.
_SLOW_OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": None}


def examine(config: ServiceConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Findings for a server of these settings, one check after the other.

    Args:
        environment: variables that the server would be started with.
    """
    yield _python()
    yield _torch()
    yield _operations()
    yield from _openmp(environment)
    for application in config.applications:
        yield _model(application)
    device = _device(config)
    yield device
    if device.level == "ok":
        yield _memory(config)
    if config.runtime == "ray":
        yield from _ray(config, environment)
    yield from examine_tokens(config)
    yield from examine_certificates(config)
    for name, port in _ports(config).items():
        yield _port(config.host, name, port)
    yield _open_files()


def _python() -> Finding:
    allowed = " or ".join(f"{major}.{minor}" for major, minor in _PYTHONS)
    fact = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] not in _PYTHONS:
        return Finding("python", "warning", fact, f"dependencies are pinned for Python {allowed}")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return Finding("python", "warning", fact, "only Linux on x86-64 is tested")
    return Finding("python", "ok", fact)


def _torch() -> Finding:
    gpus = torch.cuda.device_count()
    fact = f"{torch.__version__}, {gpus} GPUs"
    if torch.version.cuda and not gpus:
        advice = "this build is for GPUs and finds none; the CPU build is a tenth of its size"
        return Finding("torch", "warning", fact, advice)
    return Finding("torch", "ok", fact)


def _operations() -> Finding:
    reason = why_unavailable()
    if torch.cuda.is_available():
        return Finding("operations in C++", "ok", "not needed on a GPU")
    if reason is None:
        unit = "AMX" if multiplies_by_amx() else vectors_in_use()
        return Finding("operations in C++", "ok", f"loaded, by {unit}")
    if reason.startswith("the processor"):
        return Finding("operations in C++", "warning", reason, "torch's operations are slower here")
    advice = "install a C++ compiler, then `pip install --no-build-isolation --no-deps -e .` again"
    return Finding("operations in C++", "warning", reason, advice)


def _openmp(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name, slow in _SLOW_OPENMP.items():
        value = environment.get(name)
        if value is not None and slow in (None, value.lower()):
            advice = "unset it: threads that sleep between operations cost a quarter of each step"
            yield Finding(name, "warning", value, advice)


def _model(config: ServiceConfig) -> Finding:
    try:
        model = check_model(config)
    except (ModelError, ValueError, OSError) as error:
        return Finding(f"model {config.application}", "error", str(error), "see docs/settings.md")
    fact = f"{model.family}, {model.head_label}, {model.kv_bytes_per_token()} KV bytes per token"
    return Finding(f"model {config.application}", "ok", fact)


def _device(config: ServiceConfig) -> Finding:
    try:
        device = resolve_device(config.engine.device)
        if config.runtime == "ray":
            check_devices(config)
    except ValueError as error:
        return Finding(
            "device", "error", str(error), "change engine.device, or have fewer replicas"
        )
    return Finding("device", "ok", str(device))


def _memory(config: ServiceConfig) -> Finding:
    """Weights and the smallest useful cache of all replicas, on a CPU."""
    weights = sum(
        file.stat().st_size
        for one in config.applications
        for file in one.model_path.glob("*.safetensors")
    )
    needed = config.replicas * weights + (_RAY_MEMORY if config.runtime == "ray" else 0)
    on_gpu = resolve_device(config.engine.device).type == "cuda"
    available = torch.cuda.mem_get_info()[0] if on_gpu else available_memory()
    fact = f"{_gib(available)} available, {_gib(needed)} needed before any KV cache"
    if needed > available:
        advice = "fewer replicas or applications, --runtime standalone, or a larger machine"
        return Finding("memory", "error", fact, advice)
    return Finding("memory", "ok", fact)


def _ray(config: ServiceConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    least, below = _RAY_VERSIONS
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        advice = "pip install -r requirements.lock, or serve with --runtime standalone"
        yield Finding("ray", "error", "not installed", advice)
        return
    if least <= tuple(int(part) for part in version.split(".")[:2]) < below:
        yield Finding("ray", "ok", version)
    else:
        advice = f"install ray[serve]>={least[0]}.{least[1]},<{below[0]}.{below[1]}"
        yield Finding("ray", "error", version, advice)
    if "RAY_ADDRESS" in environment:
        advice = "it is ignored: `headroom serve` joins a cluster by --ray-address only"
        yield Finding("RAY_ADDRESS", "warning", environment["RAY_ADDRESS"], advice)
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        if environment.get(name, "1") != "1":
            advice = "unset it: `headroom serve` sets both, one without the other is slower"
            yield Finding(name, "warning", environment[name], advice)
    if environment.get("RAY_AUTH_MODE", "token") != "token":
        level: Level = "warning" if config.ray_address is None else "error"
        advice = "unset it: without a token Ray's processes run what anybody sends them"
        yield Finding("RAY_AUTH_MODE", level, environment["RAY_AUTH_MODE"], advice)
    if config.ray_address is not None:
        yield from examine_cluster(config.ray_address, environment)
    yield _space("shared memory", Path("/dev/shm"), LEAST_SHARED_MEMORY)  # noqa: S108
    yield _space("temporary files", Path(tempfile.gettempdir()), _LEAST_TEMPORARY)


def _space(check: str, path: Path, least: int) -> Finding:
    free = shutil.disk_usage(path).free
    fact = f"{free / 2**20:,.0f} MiB free in {path}"
    if free < least:
        return Finding(check, "error", fact, f"Ray needs {least // 2**20} MiB there")
    return Finding(check, "ok", fact)


def _ports(config: ServiceConfig) -> dict[str, int]:
    ports = {"port": config.port}
    if config.runtime == "ray":
        ports["http_port"] = config.http_port
    numbers = [port for one in config.applications for port in one.metrics_ports]
    return ports | {f"metrics_port of replica {at}": port for at, port in enumerate(numbers)}


def _port(host: str, name: str, port: int) -> Finding:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        advice = f"end what listens there, or choose another --{name.split()[0].replace('_', '-')}"
        return Finding(name, "error", f"{host}:{port}: {reason}", advice)
    return Finding(name, "ok", f"{host}:{port} is free")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fact = f"{soft}, at most {hard}"
    if soft < _LEAST_OPEN_FILES:
        return Finding("open files", "warning", fact, f"ulimit -n {_LEAST_OPEN_FILES}")
    return Finding("open files", "ok", fact)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
