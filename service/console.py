"""What the command line prints: descriptions, the ready line, and one clear line per error."""

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

from service.client import Client

if TYPE_CHECKING:
    from protos.headroom.v1.models_pb2 import GetModelResponse, LayerHeads
    from service.config import ServiceConfig

out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def describe(model: "GetModelResponse") -> dict[str, str]:
    """The facts that decide what a server can do, each as one line of text."""
    labels = Counter(layer.label for layer in model.layers)
    features = Counter(", ".join(_features(layer)) for layer in model.layers)
    kind = "decoder" if model.is_causal else "encoder"
    return {
        "model": f"{model.name} ({model.family} {kind}, {model.num_parameters / 1e6:.1f} M "
        f"parameters, {_types(model)} on {model.device}, {model.backend} attention)",
        "heads": ", ".join(f"{label} x {count} layers" for label, count in labels.items()),
        "scores": "; ".join(f"{text} x {count} layers" for text, count in features.items()),
        "context": f"{model.max_model_len} tokens, {model.max_num_seqs} sequences at once",
        "kv": _cache(model),
    }


def _types(model: "GetModelResponse") -> str:
    eight_bits = [
        name
        for name, dtype in (
            ("weights", model.weight_dtype),
            ("keys and values", model.kv_cache_dtype),
        )
        if dtype == "int8"
    ]
    return f"{model.dtype} with {' and '.join(eight_bits)} of 8 bits" if eight_bits else model.dtype


def _cache(model: "GetModelResponse") -> str:
    size = f"{model.kv_cache_bytes / 2**20:.1f} MiB, {model.kv_bytes_per_token} bytes per token"
    if any(layer.HasField("window") or layer.head_windows for layer in model.layers):
        return f"{model.kv_blocks_total} blocks, {size} until it leaves a window"
    tokens = model.kv_blocks_total * model.kv_block_size
    return f"{model.kv_blocks_total} blocks of {model.kv_block_size} = {tokens} tokens, {size}"


def _features(layer: "LayerHeads") -> list[str]:
    """What decides a layer's scores beside its queries and keys."""
    found: list[str] = []
    if layer.HasField("rope_theta"):
        scaling = f" {layer.rope_scaling}" if layer.rope_scaling else ""
        found.append(f"rope {layer.rope_theta:g}{scaling} on {layer.rotary_dim} dims")
    if layer.alibi:
        found.append("alibi")
    if layer.HasField("window"):
        found.append(f"window {layer.window}")
    elif layer.head_windows:
        windows = ("all" if window == 0 else str(window) for window in layer.head_windows)
        found.append(f"windows {'/'.join(windows)}")
    if layer.sink_tokens:
        found.append(f"{layer.sink_tokens} sink tokens")
    if layer.learned_sinks:
        found.append("learned sinks")
    if layer.HasField("softcap"):
        found.append(f"softcap {layer.softcap:g}")
    if layer.qk_norm:
        found.append(f"qk-norm per {layer.qk_norm}")
    return [*found, f"scale {layer.scale:.4g}"]


def models_by_application(values: Sequence[str]) -> str | dict[str, str] | None:
    """One directory, or one for each NAME=DIRECTORY; None if nothing is given."""
    if len(values) <= 1 and not any("=" in value for value in values):
        return values[0] if values else None
    named = [value.partition("=") for value in values]
    for value, (name, _, directory) in zip(values, named, strict=True):
        if not name or not directory:
            fail(f"--model is {value!r}; allowed, if there are several: NAME=DIRECTORY", code=2)
    names = Counter(name for name, _, _ in named)
    for name, count in names.items():
        if count > 1:
            fail(f"--model names application {name!r} {count} times; allowed: once", code=2)
    return {name: directory for name, _, directory in named}


def print_ready(
    config: "ServiceConfig", started: float, logs: Path | None = None, *, door: str, token: str
) -> None:
    """Ask the server about itself, and say that it is ready.

    Args:
        door: where it answers this machine in the clear.
    """
    for application in config.applications:
        with Client(door, application=application.application, token=token) as client:
            lines = describe(client.get_model())
        if len(config.applications) > 1:
            out.print(f"app     {application.application}")
        for name, text in lines.items():
            out.print(f"{name:<8}{text}")
    ports = [port for one in config.applications for port in one.metrics_ports]
    if ports:
        more = f" to {ports[-1]}" if len(ports) > 1 else ""
        out.print(f"metrics http://{config.host}:{ports[0]}/metrics{more}")
    if logs is not None:
        out.print(f"logs    {logs}")
    seconds = time.monotonic() - started
    scheme = "grpc" if config.tls_cert is None else "grpcs"
    target = f"{scheme}://{config.host}:{config.port}"
    out.print(f"ready   {target} after {seconds:.1f} s; Ctrl-C drains and stops")


def require_free_port(host: str, port: int, name: str) -> None:
    """Raise OSError, naming the address and its setting, if something listens there."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {host}:{port} ({name}): {reason}") from error


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Print an error, one line per line, and exit."""
    for line in message.splitlines():
        err.print(f"error: {line}")
    raise typer.Exit(code)
