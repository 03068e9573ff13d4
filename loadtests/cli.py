"""The command line of `python -m loadtests.run`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from loadtests.load import LoadSpec, LoadSummary
from loadtests.options import DEFAULT_TARGET
from loadtests.run import LoadError, locust_command, run_load
from loadtests.stages import Shape
from loadtests.tables import stage_table, summary_table
from loadtests.workload import Workload
from service.commands.connection import TlsCa, TlsCert, TlsKey, TokenFile
from service.console import err, fail, out

_FAILED, _CLIENT_BOUND = 1, 3
_LENGTHS = "fixed:TOKENS, uniform:LOW-HIGH, lognormal:MEDIAN,SIGMA,MAX or sharegpt."


def _command(
    target: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_TARGET,
    application: Annotated[str, typer.Option(help="If the server has several.")] = "headroom",
    users: Annotated[int, typer.Option(help="Streams open at once, at most.")] = 32,
    prompt: Annotated[str, typer.Option(help=_LENGTHS)] = "fixed:128",
    output: Annotated[str, typer.Option(help="The same.")] = "fixed:128",
    shared_prefix: Annotated[int, typer.Option(help="Equal tokens before every prompt.")] = 0,
    hang_up: Annotated[float, typer.Option(help="Share of requests that clients leave.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, open loop. [default: closed loop]")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="So many in all.")] = None,
    seconds: Annotated[float | None, typer.Option(help="No request begins later.")] = None,
    shape: Annotated[Shape, typer.Option(help="Of the load over --seconds.")] = "steady",
    processes: Annotated[int, typer.Option(help="Of the load generator.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds until a client gives up.")] = 600.0,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    samples: Annotated[
        Path | None, typer.Option(help="File for one line per request, gzip JSON lines.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="Show locust's page instead.")] = False,
    web_port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 8089,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Put a load on a server, and say what its clients saw.

    Exit code 1: requests failed. 3: the load generator itself was too busy; do not count the run.
    """
    try:
        workload = Workload.parse(
            prompt, output, shared_prefix=shared_prefix, hang_up=hang_up, seed=seed
        )
        spec = LoadSpec(
            target=target,
            workload=workload,
            users=users,
            application=application,
            rate=rate,
            num_requests=requests,
            seconds=seconds,
            shape=shape,
            processes=processes,
            timeout=timeout,
            token_file=token_file,
            tls_ca=tls_ca,
            tls_client_cert=tls_cert,
            tls_client_key=tls_key,
        )
        if not web and requests is None and seconds is None:
            raise ValueError("requests and seconds are missing; allowed: at least one of them")
    except ValueError as error:
        fail(str(error), code=2)
    if web:
        err.print(f"locust's page: http://127.0.0.1:{web_port}; Ctrl-C stops")
        command = locust_command(spec, samples, web_port=web_port)
        os.execv(command[0], command)  # noqa: S606, it then ends by Ctrl-C as locust does
    try:
        summary = _run(spec, samples)
    except LoadError as error:
        fail(str(error))
    if as_json:
        print(json.dumps(dataclasses.asdict(summary)))
    else:
        out.print(summary_table(spec, summary))
        if summary.stages:
            out.print(stage_table(spec, summary))
    if summary.client_bound:
        err.print(f"error: client-bound: a load process took {summary.client_cpu:.2f} of a core")
        raise typer.Exit(_CLIENT_BOUND)
    if summary.failures:
        lines = [
            f"{count} of {summary.requests} requests failed with {code}, the first with: "
            f"{summary.failure_messages[code]}"
            for code, count in summary.failures.items()
        ]
        fail("\n".join(lines), code=_FAILED)


def _run(spec: LoadSpec, samples: Path | None) -> LoadSummary:
    with Progress(console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("starting", total=spec.num_requests)

        def show(requests: int) -> None:
            progress.update(task, description=f"{requests} requests", completed=requests)

        return run_load(spec, samples, show)


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    epilog = "Example: python -m loadtests.run --users 32 --prompt sharegpt --rate 5 --seconds 60"
    app.command(epilog=epilog)(_command)
    app()
