"""What a front costs: the same requests to the engine alone, a grpc.aio server, and Ray Serve.

    python -m loadtests.fronts --clients 32 --rounds 3

All three are measured in one run, round by round, on the same checkpoint of random weights; the
client shares the machine with the servers. Also reports the time to ready and the idle memory of
each server, with the bundled demo model. Writes JSON and a table to `loadtests/results`.
"""

import asyncio
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from loadtests.asyncio_client import run_load
from loadtests.checkpoints import write_random_checkpoint
from loadtests.load import LoadSpec
from loadtests.servers import CLI, Runtime, Server, running_server
from loadtests.workload import Lengths, Workload
from service.bench import BenchShape
from service.runtimes.ray_environment import free_ports

RESULTS = Path(__file__).parent / "results"
_FRONTS: tuple[Runtime, ...] = ("standalone", "ray")


@dataclass(frozen=True, slots=True)
class FrontRun:
    tokens_per_s: float
    first_token_ms: float


def main(
    clients: Annotated[int, typer.Option(min=1)] = 32,
    prompt: Annotated[int, typer.Option(min=1)] = 128,
    output: Annotated[int, typer.Option(min=2)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    kv_heads: Annotated[int, typer.Option(min=1)] = 12,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
    name: Annotated[str, typer.Option(help="Name of the result files.")] = "fronts",
) -> None:
    """Measure engine, standalone and Ray Serve in one run."""
    workload = Workload(Lengths(prompt, prompt), Lengths(output, output))
    load = LoadSpec("", workload, users=clients, num_requests=clients)  # of each front in turn
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "random"
        _write_checkpoint(path, layers, kv_heads, max_len=prompt + output)
        result = _measure(path, load, rounds)
    result["idle"] = {front: _idle(front) for front in _FRONTS}
    command = f"python -m loadtests.fronts {' '.join(sys.argv[1:])}".strip()
    document = {"date": date.today().isoformat(), "command": command, **result}
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document)
    (results / f"{name}.md").write_text(table)
    print(table)


def _measure(path: Path, load: LoadSpec, rounds: int) -> dict[str, Any]:
    engine_runs: list[dict[str, Any]] = []
    front_runs: dict[Runtime, list[FrontRun]] = {front: [] for front in _FRONTS}
    with ExitStack() as stack:
        targets: dict[Runtime, str] = {}
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        task = progress.add_task("starting", total=rounds * 3 + 2)
        for front in _FRONTS:
            targets[front] = stack.enter_context(_serve(front, str(path), load)).target
            _run(targets[front], load)  # warm-up
            progress.advance(task)
        for _ in range(rounds):
            progress.update(task, description="engine")
            engine_runs.append(_bench_engine(path, load))
            progress.advance(task)
            for front in _FRONTS:
                progress.update(task, description=front)
                front_runs[front].append(_run(targets[front], load))
                progress.advance(task)
    engine_rates = [run["runs"][0]["total_tokens_per_s"] for run in engine_runs]
    rows = {"engine": {"tokens_per_s": engine_rates}}
    for front, runs in front_runs.items():
        rows[front] = {
            "tokens_per_s": [round(run.tokens_per_s, 1) for run in runs],
            "first_token_ms_p50": [round(run.first_token_ms, 1) for run in runs],
        }
    engine = statistics.median(engine_rates)
    for row in rows.values():
        row["share_of_engine"] = [round(statistics.median(row["tokens_per_s"]) / engine, 3)]
    return {
        "machine": engine_runs[0]["machine"],
        "load": {
            "clients": load.users,
            "prompt": load.workload.prompt.high,
            "output": load.workload.output.high,
            "rounds": rounds,
        },
        "model": engine_runs[0]["runs"][0]["heads"],
        "parameters": engine_runs[0]["runs"][0]["parameters"],
        "dtype": engine_runs[0]["runs"][0]["dtype"],
        "rows": rows,
    }


def _run(target: str, load: LoadSpec) -> FrontRun:
    """Raises RuntimeError: a stream is not whole."""
    summary = asyncio.run(run_load(dataclasses.replace(load, target=target)))
    if summary.finish_reasons != {"length": load.users} or summary.ttft_ms is None:
        raise RuntimeError(f"streams are not whole: {summary.finish_reasons}, {summary.failures}")
    return FrontRun(summary.output_tokens_per_s, summary.ttft_ms.p50)


def _bench_engine(path: Path, load: LoadSpec) -> dict[str, Any]:
    arguments = {
        "--model": str(path),
        "--clients": load.users,
        "--prompt": load.workload.prompt.high,
        "--output": load.workload.output.high,
        "--repeats": 1,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    answer = subprocess.run([*CLI, "bench", *flat], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def _serve(front: Runtime, model: str, load: LoadSpec | None) -> AbstractContextManager[Server]:
    port, http_port = free_ports(2)
    settings: dict[str, Any] = {"http_port": http_port, "metrics_port": 0}
    if load is not None:
        settings["engine"] = {
            "max_num_seqs": load.users,
            "max_num_batched_tokens": max(512, load.users),
        }
    return running_server(front, [model], port, settings)


def _idle(front: Runtime) -> dict[str, float]:
    """Time to ready and memory with the demo model, before any request."""
    with _serve(front, "demo", None) as server:
        memory = {process: process.memory_info().rss / 2**20 for process in server.processes()}
        replicas = [
            size for process, size in memory.items() if "ServeReplica" in "".join(process.cmdline())
        ]
        return {
            "seconds_to_ready": round(server.seconds_to_ready, 1),
            "replica_mib": round(replicas[0] if replicas else memory[server.process], 0),
            "all_processes_mib": round(sum(memory.values()), 0),
        }


def _write_checkpoint(path: Path, layers: int, kv_heads: int, max_len: int) -> None:
    """A 110 M parameter Llama checkpoint of random weights."""
    shape = BenchShape(
        layers=layers, hidden=768, intermediate=2048, heads=12, kv_heads=kv_heads, head_dim=64,
        vocab=32_000, dtype="bfloat16",
    )  # fmt: skip
    write_random_checkpoint(shape.model_config(max_len), path)


def _markdown(document: dict[str, Any]) -> str:
    load, machine = document["load"], document["machine"]
    lines = [
        f"# Fronts, {document['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"Python {machine['python']}; {document['parameters'] / 1e6:.0f} M parameters, "
        f"`{document['model']}`, {document['dtype']}; {load['clients']} clients, "
        f"{load['prompt']} prompt + {load['output']} output tokens, {load['rounds']} interleaved "
        f"rounds; client and servers share the machine.",
        "",
        f"`{document['command']}`",
        "",
        "| | tokens/s (median) | range | of the engine | first token p50, ms |",
        "|---|---|---|---|---|",
    ]
    for name, row in document["rows"].items():
        rates = row["tokens_per_s"]
        first = row.get("first_token_ms_p50")
        lines.append(
            f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} | "
            f"{row['share_of_engine'][0]:.2f} | {statistics.median(first):.0f} |"
            if first
            else f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} to "
            f"{max(rates):.0f} | 1.00 | |"
        )
    lines += [
        "",
        "Idle, with the demo model:",
        "",
        "| | ready after, s | one replica, MiB | all processes, MiB |",
        "|---|---|---|---|",
    ]
    for name, idle in document["idle"].items():
        lines.append(
            f"| {name} | {idle['seconds_to_ready']} | {idle['replica_mib']:.0f} | "
            f"{idle['all_processes_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
