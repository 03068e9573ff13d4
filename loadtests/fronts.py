"""What a front costs: the same requests to the engine alone, a grpc.aio server, and Ray Serve.

    python -m loadtests.fronts --loads 8x128+128,32x128+128 --rounds 3

All three are measured in one run, round by round and in turning order, on the same checkpoint of
random weights; the client shares the machine with the servers. Also reports the time to ready and
the idle memory of each server, with the bundled demo model. Writes JSON and a table to
`loadtests/results`.
"""

import asyncio
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from loadtests.asyncio_client import run_load
from loadtests.batches import Load
from loadtests.checkpoints import write_random_checkpoint
from loadtests.load import LoadSpec
from loadtests.servers import CLI, Runtime, Server, running_server
from loadtests.workload import Lengths, Workload
from models import load_model
from service.bench import BenchShape, machine
from service.runtimes.ray_environment import free_ports

RESULTS = Path(__file__).parent / "results"
_FRONTS: tuple[Runtime, ...] = ("standalone", "ray")


@dataclass(frozen=True, slots=True)
class FrontRun:
    """One load on one front; the engine alone tells nobody of its first token."""

    tokens_per_s: float
    first_token_ms: float | None


def main(
    loads: Annotated[
        str, typer.Option(help="CLIENTS x PROMPT + OUTPUT tokens, comma-separated.")
    ] = "1x128+128,8x128+128,32x128+128,64x128+128,16x1024+64",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    kv_heads: Annotated[int, typer.Option(min=1)] = 12,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
    name: Annotated[str, typer.Option(help="Name of the result files.")] = "fronts",
) -> None:
    """Measure engine, standalone and Ray Serve in one run."""
    try:
        wanted = [Load.parse(text) for text in loads.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "random"
        _write_checkpoint(path, layers, kv_heads, max(load.prompt + load.output for load in wanted))
        result = _measure(path, wanted, rounds)
    result["idle"] = {front: _idle(front) for front in _FRONTS}
    command = f"python -m loadtests.fronts {' '.join(sys.argv[1:])}".strip()
    document = {"date": date.today().isoformat(), "command": command, **result}
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document)
    (results / f"{name}.md").write_text(table)
    print(table)


def _measure(path: Path, loads: Sequence[Load], rounds: int) -> dict[str, Any]:
    runs: dict[tuple[Load, str], list[FrontRun]] = defaultdict(list)
    with ExitStack() as stack:
        measures: dict[str, Callable[[Load], FrontRun]] = {}
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        task = progress.add_task("starting", total=rounds * len(loads) * 3 + 2)
        for front in _FRONTS:
            target = stack.enter_context(_serve(front, str(path), loads)).target
            _run(target, loads[0])  # warm-up
            measures[front] = functools.partial(_run, target)
            progress.advance(task)
        measures["engine"] = functools.partial(_bench_engine, path)
        order = deque(measures)
        for _ in range(rounds):
            for load in loads:
                for name in order:
                    progress.update(task, description=f"{name}, {load.text}")
                    runs[load, name].append(measures[name](load))
                    progress.advance(task)
                order.rotate()
    return {
        "machine": machine(torch.device("cpu")),
        "rounds": rounds,
        "model": _describe(path),
        "loads": {load.text: _rows(runs, load) for load in loads},
    }


def _rows(runs: Mapping[tuple[Load, str], list[FrontRun]], load: Load) -> dict[str, dict[str, Any]]:
    """What the engine and each front gave, and how much of the engine's rate that is."""
    engine = statistics.median(run.tokens_per_s for run in runs[load, "engine"])
    rows: dict[str, dict[str, Any]] = {}
    for name in ("engine", *_FRONTS):
        rates = [run.tokens_per_s for run in runs[load, name]]
        rows[name] = {
            "tokens_per_s": [round(rate, 1) for rate in rates],
            "share_of_engine": round(statistics.median(rates) / engine, 3),
        }
        if name != "engine":
            first = [run.first_token_ms for run in runs[load, name]]
            rows[name]["first_token_ms_p50"] = [round(ms or 0.0, 1) for ms in first]
    return rows


def _run(target: str, load: Load) -> FrontRun:
    """Raises RuntimeError: a stream is not whole."""
    workload = Workload(Lengths(load.prompt, load.prompt), Lengths(load.output, load.output))
    spec = LoadSpec(target, workload, users=load.sequences, num_requests=load.sequences)
    summary = asyncio.run(run_load(spec))
    if summary.finish_reasons != {"length": load.sequences} or summary.ttft_ms is None:
        raise RuntimeError(f"streams are not whole: {summary.finish_reasons}, {summary.failures}")
    return FrontRun(summary.output_tokens_per_s, summary.ttft_ms.p50)


def _bench_engine(path: Path, load: Load) -> FrontRun:
    arguments = {
        "--model": str(path),
        "--clients": load.sequences,
        "--prompt": load.prompt,
        "--output": load.output,
        "--repeats": 1,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    answer = subprocess.run([*CLI, "bench", *flat], capture_output=True, text=True, check=True)
    (run,) = json.loads(answer.stdout)["runs"]
    return FrontRun(run["total_tokens_per_s"], None)


def _serve(
    front: Runtime, model: str, loads: Sequence[Load] = ()
) -> AbstractContextManager[Server]:
    port, http_port = free_ports(2)
    settings: dict[str, Any] = {"http_port": http_port, "metrics_port": 0}
    if loads:
        most = max(load.sequences for load in loads)
        settings["engine"] = {"max_num_seqs": most, "max_num_batched_tokens": max(512, most)}
    return running_server(front, [model], port, settings)


def _describe(path: Path) -> dict[str, Any]:
    model = load_model(path)
    return {
        "heads": model.config.head_label,
        "parameters": model.num_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _idle(front: Runtime) -> dict[str, float]:
    """Time to ready and memory with the demo model, before any request."""
    with _serve(front, "demo") as server:
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
    machine, model = document["machine"], document["model"]
    lines = [
        f"# Fronts, {document['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"Python {machine['python']}; {model['parameters'] / 1e6:.0f} M parameters, "
        f"`{model['heads']}`, {model['dtype']}; {document['rounds']} interleaved rounds; client "
        f"and servers share the machine.",
        "",
        f"`{document['command']}`",
        "",
        "| clients x prompt + output | | tokens/s (median) | range | of the engine "
        "| first token p50, ms |",
        "|---|---|---|---|---|---|",
    ]
    for load, rows in document["loads"].items():
        for name, row in rows.items():
            rates = row["tokens_per_s"]
            first = row.get("first_token_ms_p50")
            lines.append(
                f"| {load} | {name} | {statistics.median(rates):.0f} "
                f"| {min(rates):.0f} to {max(rates):.0f} | {row['share_of_engine']:.2f} "
                f"| {'' if first is None else f'{statistics.median(first):.0f}'} |"
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
