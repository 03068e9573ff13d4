"""What a decode step costs the engine beside the model, its parts timed in place.

    python -m loadtests.engine_cost --sequences 64

A 110 M parameter model of random weights serves as many streams as sequences, whose text is made on
another thread, as in a server. Times are milliseconds of a step, medians over the steps that decode
all sequences: what the thread computes, and what passes meanwhile. They differ by waiting, for only
one of the two threads runs Python at a time. Writes JSON and a table to `loadtests/results`.
"""

import asyncio
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.status import Status

from loadtests.checkpoints import write_random_checkpoint
from models.attention_metadata import GroupMetadata
from models.tokenizer import IncrementalDetokenizer, Tokenizer
from models.transformer import Transformer
from service.bench import BenchShape, machine
from service.engine import Engine, EngineConfig, EngineRequest, SamplingParams
from service.engine.async_engine import AsyncEngine
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Scheduler
from service.metrics.engine import EngineMetrics

RESULTS = Path(__file__).parent / "results"
_PROMPT = 128
_PARTS = {
    "planning": "which sequences, and their blocks",
    "batch": "ids, positions, slots and block tables as tensors",
    "results": "what each row samples by, and its token",
    "recording": "tokens into sequences, endings, outputs",
    "statistics": "for metrics",
    "handing out": "to the thread of the streams",
}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds in functions during one step.

    Attributes:
        computed: of the thread that called them.
        passed: by the clock on the wall.
    """

    num_sequences: int
    computed: Mapping[str, float]
    passed: Mapping[str, float]


class StepWatch:
    """Times functions, step by step."""

    def __init__(self) -> None:
        self.steps: list[StepTimes] = []
        self._computed: defaultdict[str, float] = defaultdict(float)
        self._passed: defaultdict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            passed, computed = time.perf_counter(), time.thread_time()
            result = function(*args, **kwargs)
            self._computed[part] += time.thread_time() - computed
            self._passed[part] += time.perf_counter() - passed
            return result

        return call

    def end_step(self, num_sequences: int) -> None:
        """What was timed since the last call belongs to one step."""
        self.steps.append(StepTimes(num_sequences, self._computed, self._passed))
        self._computed, self._passed = defaultdict(float), defaultdict(float)


def main(
    sequences: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int, typer.Option(min=2)] = 200,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    kv_heads: Annotated[int, typer.Option(min=1)] = 4,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
) -> None:
    """Time the parts of decode steps."""
    shape = BenchShape(
        layers=layers, hidden=768, intermediate=2048, heads=12, kv_heads=kv_heads, head_dim=64,
        vocab=32_000, dtype="bfloat16",
    )  # fmt: skip
    config = shape.model_config(_PROMPT + steps)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "random"
        write_random_checkpoint(config, path)
        with Status(f"{steps} steps of {sequences} sequences", console=Console(stderr=True)):
            watch = asyncio.run(_serve(path, sequences, steps))
    document = {
        "date": date.today().isoformat(),
        "command": f"python -m loadtests.engine_cost {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(torch.device("cpu")),
        "heads": f"{config.head_label} x {layers} layers",
        "sequences": sequences,
        **_summary([step for step in watch.steps if step.num_sequences == sequences]),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "engine-cost.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document)
    (results / "engine-cost.md").write_text(table)
    print(table)


async def _serve(path: Path, sequences: int, steps: int) -> StepWatch:
    """So many streams of so many tokens, from an engine whose functions are timed."""
    watch = StepWatch()
    metrics = EngineMetrics(prefix_caching=True)
    config = EngineConfig(max_num_seqs=sequences)
    engine = AsyncEngine(
        lambda: Engine.from_checkpoint(path, config, on_step=metrics.on_step),
        num_threads=None,
        stall_seconds=60.0,
    )
    tokenizer = Tokenizer.from_directory(path)
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)

    async def read(index: int) -> None:
        push = watch.timed("text", IncrementalDetokenizer(tokenizer).push)
        request = EngineRequest([index + 5] * _PROMPT, params)
        async for output in engine.run(request):
            push(output.token_ids)

    with _timed_functions(watch):
        await engine.start()
        await asyncio.gather(*(read(index) for index in range(sequences)))
        await engine.shutdown()
    return watch


def _timed_functions(watch: StepWatch) -> ExitStack:
    """Watch what a step calls, until the context ends."""
    patches = ExitStack()

    def patch(owner: Any, name: str, part: str) -> None:
        timed = watch.timed(part, getattr(owner, name))
        patches.enter_context(mock.patch.object(owner, name, timed))

    patch(Engine, "step", "step")
    patch(Engine, "_stats", "statistics")
    patch(EngineMetrics, "on_step", "statistics")
    patch(Scheduler, "schedule", "planning")
    patch(Scheduler, "update", "recording")
    patch(ModelRunner, "_build_batch", "batch")
    for name in ("forward", "project_to_vocab", "most_likely"):
        patch(Transformer, name, "model")
    # Made when the first layer asks for them.
    for name in ("slot_mapping", "block_tables"):
        form = cached_property(watch.timed("forms", GroupMetadata.__dict__[name].func))
        form.__set_name__(GroupMetadata, name)
        patches.enter_context(mock.patch.object(GroupMetadata, name, form))
    publish = watch.timed("handing out", AsyncEngine._publish)

    def publish_and_end(self: AsyncEngine, engine: Engine, outputs: list[Any]) -> None:
        publish(self, engine, outputs)
        watch.end_step(len(outputs))

    patches.enter_context(mock.patch.object(AsyncEngine, "_publish", publish_and_end))
    return patches


def own_parts(parts: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of a step's parts; `all` is what is neither the model's, which finds the greedy
    tokens too, nor another thread's."""
    model = parts["model"] - parts["forms"]
    batch = parts["batch"] + parts["forms"]
    named = batch + parts["planning"] + parts["recording"] + parts["statistics"]
    own = {
        "planning": parts["planning"],
        "batch": batch,
        "results": parts["step"] - model - named,
        "recording": parts["recording"],
        "statistics": parts["statistics"],
        "handing out": parts["handing out"],
        "all": parts["step"] - model + parts["handing out"],
        "model": model,
        "text": parts["text"],
    }
    return {part: 1000 * seconds for part, seconds in own.items()}


def _summary(steps: list[StepTimes]) -> dict[str, Any]:
    return {
        "steps": len(steps),
        "computed_ms": _medians([own_parts(step.computed) for step in steps]),
        "passed_ms": _medians([own_parts(step.passed) for step in steps]),
    }


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {part: round(statistics.median(step[part] for step in steps), 3) for part in steps[0]}


def _markdown(document: dict[str, Any]) -> str:
    machine, computed, passed = (document[key] for key in ("machine", "computed_ms", "passed_ms"))
    lines = [
        f"`{document['command']}`, {document['date']}: {machine['cpu']} "
        f"({machine['cpu_capability']}), torch {machine['torch']}, {document['heads']}, "
        f"{document['sequences']} sequences, medians of {document['steps']} decode steps.",
        "",
        "| the engine's own | | computed, ms | passed, ms |",
        "|---|---|---|---|",
        *(
            f"| {part} | {what} | {computed[part]:.3f} | {passed[part]:.3f} |"
            for part, what in _PARTS.items()
        ),
        f"| all | | {computed['all']:.3f} | {passed['all']:.3f} |",
        "",
        f"Beside it passed: the model, with the choice of tokens, {passed['model']:.1f} ms; on the "
        f"thread of the streams, text {passed['text']:.2f} ms.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
