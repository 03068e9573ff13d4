"""Do two clients see the same? locust and asyncio in turn, on one running server.

    headroom serve --runtime standalone --metrics-port 0
    python -m loadtests.agreement --rounds 6

They share feed, clocks and summary but neither event loop nor gRPC binding. Writes JSON and a table
to `loadtests/results`.
"""

import asyncio
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from loadtests import asyncio_client
from loadtests.load import Distribution, LoadSpec, LoadSummary
from loadtests.options import DEFAULT_TARGET
from loadtests.run import LoadError, run_load
from loadtests.workload import Workload
from service.bench import machine
from service.client import HeadroomError
from service.commands.connection import TlsCa, TlsCert, TlsKey, TokenFile, connect
from service.console import err, fail, out

RESULTS = Path(__file__).parent / "results"
_CLIENTS: dict[str, Callable[[LoadSpec], LoadSummary]] = {
    "locust": run_load,
    "asyncio": lambda spec: asyncio.run(asyncio_client.run_load(spec)),
}
_FIGURES: dict[str, Callable[[LoadSummary], float | None]] = {
    "output_tokens_per_s": lambda summary: summary.output_tokens_per_s,
    "ttft_ms_p50": lambda summary: _p50(summary.ttft_ms),
    "itl_ms_p50": lambda summary: _p50(summary.itl_ms),
    "e2e_ms_p50": lambda summary: _p50(summary.e2e_ms),
    "client_cpu": lambda summary: summary.client_cpu,
    "client_wait": lambda summary: summary.client_wait,
}


def measure(spec: LoadSpec, rounds: int) -> dict[str, list[LoadSummary]]:
    """The same load from each client in turn, after one of each that is not kept.

    Raises:
        LoadError: a load did not take place, or a request failed.
    """
    runs: dict[str, list[LoadSummary]] = {name: [] for name in _CLIENTS}
    for number in track(range(rounds + 1), console=err, disable=not err.is_terminal):
        for name, run in _CLIENTS.items():
            summary = run(spec)
            if summary.failures:
                raise LoadError(f"{name}: requests failed: {summary.failures}")
            if number:
                runs[name].append(summary)
    return runs


def compare(runs: dict[str, list[LoadSummary]]) -> dict[str, dict[str, float]]:
    """For each figure its median over the runs of each client, and locust's over asyncio's."""
    rows = {}
    for figure, read in _FIGURES.items():
        values = {name: [read(summary) for summary in found] for name, found in runs.items()}
        known = {name: [one for one in found if one is not None] for name, found in values.items()}
        if all(known.values()):
            row = {name: statistics.median(found) for name, found in known.items()}
            rows[figure] = row | {"ratio": row["locust"] / row["asyncio"]}
    return rows


def main(
    target: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_TARGET,
    application: Annotated[str, typer.Option(help="If the server has several.")] = "headroom",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each client.")] = 6,
    users: Annotated[int, typer.Option(help="Streams open at once.")] = 8,
    requests: Annotated[int, typer.Option(help="Of each run.")] = 48,
    prompt: Annotated[str, typer.Option(help="Lengths.")] = "fixed:32",
    output: Annotated[str, typer.Option(help="Lengths.")] = "fixed:32",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
) -> None:
    """Run both clients in turn, and compare what they saw."""
    try:
        spec = LoadSpec(
            target,
            Workload.parse(prompt, output),
            users,
            application,
            num_requests=requests,
            token_file=token_file,
            tls_ca=tls_ca,
            tls_client_cert=tls_cert,
            tls_client_key=tls_key,
        )
    except ValueError as error:
        fail(str(error), code=2)
    try:
        with connect(target, application, token_file, tls_ca, tls_cert, tls_key) as client:
            model = client.get_model()
        runs = measure(spec, rounds)
    except (HeadroomError, LoadError) as error:
        fail(str(error))
    document = {
        "date": date.today().isoformat(),
        "command": f"python -m loadtests.agreement {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(torch.device("cpu")),
        "server": f"{model.name}, {model.layers[0].label}, {model.dtype}, "
        f"{model.max_num_seqs} sequences at once",
        "rounds": rounds,
        "load": f"{users} users, {requests} requests, prompt {prompt}, output {output}",
        "rows": compare(runs),
        "runs": {name: [dataclasses.asdict(run) for run in found] for name, found in runs.items()},
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "agreement.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document)
    (results / "agreement.md").write_text(table)
    out.print(table)
    if any(run.client_bound for found in runs.values() for run in found):
        fail("client-bound: a load generator was too busy", code=3)


def _p50(times: Distribution | None) -> float | None:
    return None if times is None else times.p50


def _markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"# Two clients, {document['date']}",
        "",
        f"{machine['cpu']}, torch {machine['torch']}, Python {machine['python']}, shared by client "
        f"and server. {document['server']}. Each run: {document['load']}. Medians of "
        f"{document['rounds']} runs of each client in turn.",
        "",
        f"`{document['command']}`",
        "",
        "| | locust | asyncio | locust / asyncio |",
        "|---|---|---|---|",
        *(
            f"| {figure} | {row['locust']:.3g} | {row['asyncio']:.3g} | {row['ratio']:.2f} |"
            for figure, row in document["rows"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
