"""`headroom serve`: settings, checks, and then a runtime until it is stopped."""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.console import fail, models_by_application, out, print_ready, require_free_port


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hugging Face directory, or a bundled model: demo, demo-gqa, demo-mqa, "
            "demo-pruned; NAME=DIRECTORY, several times, serves each as an application of its own. "
            "[default: demo]"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port. [default: 9000]")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Health port of Ray Serve. [default: 8000]")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Port of the first replica's Prometheus metrics, the others one up each; 0 is "
            "none. [default: 9464]"
        ),
    ] = None,
    metrics_targets: Annotated[
        Path | None, typer.Option(help="File of scrape targets to write, for file_sd_configs.")
    ] = None,
    runtime: Annotated[
        Literal["ray", "standalone"] | None, typer.Option(help="What hosts it. [default: ray]")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Ray replicas. [default: 1]")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a running Ray cluster to serve on. [default: one of its own]"
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="File of bearer tokens (`headroom token`); every RPC then needs one."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate (PEM); gRPC is then served over TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(help="Certificates (PEM) of who vouches for clients; each then needs one."),
    ] = None,
    allow_insecure: Annotated[
        bool | None,
        typer.Option(
            "--allow-insecure", help="Serve other machines although tokens or TLS are missing."
        ),
    ] = None,
) -> None:
    """Serve a model, or several side by side, over gRPC until Ctrl-C.

    Settings come from flags, then HEADROOM_* variables, then --config, then defaults.
    """
    started = time.monotonic()
    from service.auth.tokens import TokenEntry, digest_of, new_token, read_tokens
    from service.config import SettingsError, load_config
    from service.logs import configure_logs

    try:
        settings = load_config(
            config,
            model=models_by_application(model or []),
            host=host,
            port=port,
            http_port=http_port,
            metrics_port=metrics_port,
            metrics_targets=metrics_targets,
            runtime=runtime,
            replicas=replicas,
            ray_address=ray_address,
            tokens=tokens,
            tls_cert=tls_cert,
            tls_key=tls_key,
            client_ca=client_ca,
            allow_insecure=allow_insecure,
        )
    except SettingsError as error:
        fail(str(error), code=2)
    configure_logs(settings.log_format, settings.log_level)
    from service.client import HeadroomError
    from service.metrics.targets import write_targets
    from service.replica import certificate_files, check_model

    try:
        if settings.tokens is not None:
            read_tokens(settings.tokens)
        certificate_files(settings)
        for application in settings.applications:
            check_model(application)
        require_free_port(settings.host, settings.port, "--port")
        if settings.runtime == "ray":
            require_free_port(settings.host, settings.http_port, "--http-port")
        for metrics in (port for one in settings.applications for port in one.metrics_ports):
            require_free_port(settings.host, metrics, "--metrics-port")
        if settings.metrics_targets is not None:
            write_targets(settings.metrics_targets, settings.metrics_addresses)
    except (ValueError, OSError) as error:
        fail(str(error))

    # The server is asked about itself before it is called ready.
    own_token = new_token()
    entry = TokenEntry(name="headroom-serve", sha256=digest_of(own_token), scopes=())
    settings = settings.model_copy(update={"own_token": entry})

    def announce(door: str, logs: Path | None = None) -> None:
        print_ready(settings, started, logs, door=door, token=own_token)

    try:
        if settings.runtime == "standalone":
            from service.runtimes import standalone

            asyncio.run(standalone.serve(settings, announce))
        else:
            from service.runtimes.ray_environment import set_ray_environment

            directory = set_ray_environment(settings)
            from service.runtimes import ray_serve

            ray_serve.serve_until_stopped(settings, directory, announce)
    except (ValueError, OSError, RuntimeError, HeadroomError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted before the server was ready", code=130)
    out.print("stopped")
