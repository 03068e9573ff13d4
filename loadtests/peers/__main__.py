"""Our engine beside others, on the same checkpoint, the same prompts and the same cores.

    python -m loadtests.peers --rounds 3

Makes an environment for each peer, loads all of them, and has them continue the same prompts in
turn, round by round. An interrupted run goes on when the same command runs again. Writes every
sample, JSON and a table to `loadtests/results/peers`.
"""

import os
import random
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TaskID

from loadtests.batches import Load
from loadtests.peers.checkpoints import VOCAB_SIZE, random_checkpoint, shape_of
from loadtests.peers.environments import OURS, PEERS, Peer, PeerError, prepare
from loadtests.peers.process import Answer, Runner, running
from loadtests.peers.report import RESULTS, write_report
from loadtests.peers.samples import Key, Sample, SampleFile
from service.bench import BenchShape
from service.console import err, fail

_KV_CACHE_BYTES = 2 * 2**30


def main(
    peers: Annotated[
        str, typer.Option(help=f"With commas, of {', '.join(PEERS)}.")
    ] = "vllm,openvino,ctranslate2,transformers,openvino-int8,ctranslate2-int8",
    kv_heads: Annotated[str, typer.Option(help="Of 12 query heads, as 12,4,1.")] = "12,4,1",
    loads: Annotated[
        str, typer.Option(help="Sequences x prompt + output, with commas.")
    ] = "1x128+128,8x128+128,32x128+128,64x128+128,16x1024+64",
    layers: Annotated[int, typer.Option(min=1)] = 12,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    folder: Annotated[Path, typer.Option(help="Environments, checkpoints and logs; kept.")] = Path(
        ".peers"
    ),
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what is measured already.")
    ] = False,
) -> None:
    """Measure our engine and its peers in one run."""
    try:
        theirs = [_peer(name) for name in peers.split(",")]
        ours = [peer for name, peer in OURS.items() if name in {one.against for one in theirs}]
        chosen = [*ours, *theirs]
        wanted = [Load.parse(text) for text in loads.split(",")]
        shapes = [shape_of(int(count), layers) for count in kv_heads.split(",")]
    except ValueError as error:
        fail(str(error), code=2)
    folder = folder.resolve()
    results.mkdir(parents=True, exist_ok=True)
    samples = SampleFile(results / "samples.jsonl", fresh=fresh)
    ready: dict[str, dict[str, Any]] = {}
    try:
        with Progress(console=err) as progress:
            task = progress.add_task("", total=len(shapes) * len(wanted) * len(chosen) * rounds)
            for shape in shapes:
                say = _Say(progress, task, f"{shape.kv_heads} key/value heads")
                ready |= _measure(shape, chosen, wanted, rounds, folder, samples, say)
    except PeerError as error:
        fail(str(error))
    command = f"python -m loadtests.peers {' '.join(sys.argv[1:])}".strip()
    print(write_report(results, samples.all(), ready, command))


class _Say:
    """A progress bar."""

    def __init__(self, progress: Progress, task: TaskID, prefix: str) -> None:
        self._progress, self._task, self._prefix = progress, task, prefix

    def __call__(self, text: str, steps: int = 0) -> None:
        self._progress.update(self._task, description=f"{self._prefix}: {text}", advance=steps)


def _peer(name: str) -> Peer:
    if name not in PEERS:
        raise ValueError(f"peers has {name!r}; allowed: {', '.join(PEERS)}")
    return PEERS[name]


def _measure(
    shape: BenchShape,
    peers: list[Peer],
    loads: list[Load],
    rounds: int,
    folder: Path,
    samples: SampleFile,
    say: _Say,
) -> dict[str, dict[str, Any]]:
    """Returns what each peer says of itself."""
    todo = [
        Key(shape.layers, shape.kv_heads, load.text, peer.name, number)
        for number in range(rounds)
        for load in loads
        for peer in peers
    ]
    say("", steps=sum(key in samples for key in todo))
    missing = [key for key in todo if key not in samples]
    max_len = max(load.prompt + load.output for load in loads)
    checkpoint = random_checkpoint(shape, max_len, folder)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for peer in peers:
            say(f"making {peer.name}")
            settings = {
                "checkpoint": str(checkpoint),
                "prepared": str(prepare(peer, checkpoint, folder)),
                "max_num_seqs": max(load.sequences for load in loads),
                "max_model_len": max_len,
                "kv_cache_bytes": _KV_CACHE_BYTES,
                "threads": os.cpu_count(),
            }
            say(f"loading {peer.name}")
            runners[peer.name] = stack.enter_context(running(peer, folder, settings))
        for load in loads if missing else ():
            for name, runner in runners.items():
                say(f"warming {name}, {load.text}")
                runner.ask(_prompts(load, seed=-1), 4)
        first: dict[tuple[str, int], Answer] = {}
        for key in missing:
            say(f"{key.peer}, {key.load}")
            load = Load.parse(key.load)
            answer = runners[key.peer].ask(_prompts(load, key.round), load.output)
            if key.peer == peers[0].name:
                first[key.load, key.round] = answer
            ours = first.get((key.load, key.round))
            samples.add(Sample(key, answer.seconds, _equal_starts(answer, ours)))
            say("", steps=1)
        return {
            name: {
                "seconds_to_ready": round(runner.seconds_to_ready, 1),
                "versions": runner.versions,
            }
            for name, runner in runners.items()
        }


def _prompts(load: Load, seed: int) -> list[list[int]]:
    rng = random.Random(seed)  # noqa: S311, a workload is no secret
    return [[rng.randrange(VOCAB_SIZE) for _ in range(load.prompt)] for _ in range(load.sequences)]


def _equal_starts(answer: Answer, ours: Answer | None) -> float | None:
    """Of how many sequences the first token is that of the first peer, which is ours: with bfloat16
    and random weights later ones soon differ. None if that is of an earlier run of the command."""
    if ours is None:
        return None
    pairs = list(zip(answer.outputs, ours.outputs, strict=True))
    return sum(theirs[0] == own[0] for theirs, own in pairs) / len(pairs)


if __name__ == "__main__":
    # Runners that are stopped do not notice the end of who started them.
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda number, frame: sys.exit(128 + number))
    typer.run(main)
