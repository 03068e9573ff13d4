"""What the operations in C++ gain over torch's own, in one run.

    python -m loadtests.operations --repeats 9

Both compute the same thing, in turn, with the shapes of one step of a 110 M parameter model (12
layers of 768, 12 heads of 64): attention over the paged cache (`paged_cpu` against `dense`, which
gathers blocks and calls torch's attention), and all linear layers (packed against plain weights).
Ratios are of medians. Writes JSON and a table to `loadtests/results`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import linear

from models.attention_metadata import AttentionMetadata
from models.config import HeadConfig
from models.cpu.library import why_unavailable
from models.cpu.linear import PackedWeight, pack
from models.kernels import dense, paged_cpu
from models.kv_cache import KVCache
from models.memory import LargeMemory
from models.scoring import Scoring
from service.bench import BenchShape, machine

RESULTS = Path(__file__).parent / "results"
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Attend:
    """The attention of a step: sequences with so many tokens, the last of which are new."""

    kv_heads: int
    sequences: int
    context: int
    new: int = 1


@dataclass(frozen=True, slots=True)
class Multiply:
    """The linear layers of a step, output head included, of so many tokens."""

    tokens: int


ATTENTION = tuple(
    Attend(kv_heads, *step)
    for kv_heads in (12, 4, 1)
    for step in ((1, 193), (1, 1025), (8, 1025), (16, 1025), (64, 193), (1, 512, 512))
)
LINEAR = tuple(Multiply(tokens) for tokens in (1, 8, 32, 64, 512))


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 9,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
    name: Annotated[str, typer.Option(help="Name of the result files.")] = "operations",
) -> None:
    """Measure our operations and torch's in one run."""
    reason = why_unavailable()
    if reason is not None:
        raise typer.BadParameter(f"the operations in C++ cannot run here: {reason}")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("operations", total=len(ATTENTION) + len(LINEAR))
        rows: dict[str, list[dict[str, Any]]] = {"attention": [], "linear": []}
        for case in ATTENTION:
            rows["attention"].append(measure_attention(case, layers, repeats))
            progress.advance(task)
        for step in LINEAR:
            rows["linear"].append(measure_linear(step, layers, repeats))
            progress.advance(task)
    document = {
        "date": date.today().isoformat(),
        "command": f"python -m loadtests.operations {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(torch.device("cpu")),
        "layers": layers,
        "repeats": repeats,
        **rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document)
    (results / f"{name}.md").write_text(table)
    print(table)


@torch.inference_mode()
def measure_attention(case: Attend, layers: int, repeats: int) -> dict[str, Any]:
    """The attention of all layers, in bfloat16; every layer has a cache of its own, and one of 8
    bits."""
    heads = HeadConfig(12, case.kv_heads, 64)
    shape = BenchShape(layers, 768, 2048, 12, case.kv_heads, 64, 32_000, "bfloat16")
    per_sequence = -(-case.context // _BLOCK_SIZE)
    config = shape.model_config(case.context).replace(layers=(heads,) * layers)
    cache, int8_cache = (
        KVCache(
            config.replace(kv_cache_dtype=dtype),
            num_pages=case.sequences * per_sequence,
            block_size=_BLOCK_SIZE,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        for dtype in ("auto", "int8")
    )
    slots = torch.arange(cache.num_pages * _BLOCK_SIZE)
    key = torch.randn(len(slots), case.kv_heads, 64, dtype=torch.bfloat16)
    for (part,) in (*cache.layers, *int8_cache.layers):
        part.write(key, key, slots)
    tables = torch.randperm(case.sequences * per_sequence).view(case.sequences, -1).tolist()
    query = torch.randn(case.sequences * case.new, 12, 64, dtype=torch.bfloat16)
    scoring = Scoring(heads.softmax_scale)

    def attend(kernel: Callable[..., object], cache: KVCache) -> None:
        # What a step says of itself is part of what it costs.
        metadata = AttentionMetadata.build(
            block_tables=[[table] for table in tables],
            num_computed_tokens=[case.context - case.new] * case.sequences,
            num_new_tokens=[case.new] * case.sequences,
            block_size=_BLOCK_SIZE,
            device=torch.device("cpu"),
            tokens_per_gather=cache.tokens_per_gather,
        )
        for (part,) in cache.layers:
            kernel(query, part, metadata.groups[0], scoring)

    kv_bytes = 2 * layers * case.kv_heads * 64 * 2 * case.context * case.sequences
    return asdict(case) | _compare(
        {
            "ours": lambda: attend(paged_cpu.paged_attention, cache),
            "int8": lambda: attend(paged_cpu.paged_attention, int8_cache),
            "torch": lambda: attend(dense.paged_attention, cache),
        },
        repeats,
        num_bytes=kv_bytes,
        # The new tokens of a prompt see half of each other.
        operations=round(
            4 * layers * 12 * 64 * case.sequences * case.new * (case.context - (case.new - 1) / 2)
        ),
    )


@torch.inference_mode()
def measure_linear(case: Multiply, layers: int, repeats: int) -> dict[str, Any]:
    """All linear layers in bfloat16, multi-head, each with a weight of its own."""
    shapes = [(2304, 768), (768, 768), (4096, 768), (768, 2048)] * layers + [(32_000, 768)]
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    # As a model has them.
    memory, int8_memory = LargeMemory(), LargeMemory()
    packed = [pack(weight, memory=memory) for weight in weights]
    int8 = [pack(weight, "int8", int8_memory) for weight in weights]
    inputs = {width: torch.randn(case.tokens, width).bfloat16() for width in (768, 2048)}

    # Each product is dropped before the next, as in a model: together they would be new memory.
    def multiply(weights: Sequence[PackedWeight]) -> None:
        for weight in weights:
            weight.multiply(inputs[weight.inputs])

    def multiply_plain() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    num_bytes = sum(weight.nbytes for weight in weights)
    return asdict(case) | _compare(
        {
            "ours": lambda: multiply(packed),
            "int8": lambda: multiply(int8),
            "torch": multiply_plain,
        },
        repeats,
        num_bytes=num_bytes,
        operations=num_bytes * case.tokens,  # two for each weight, which has two bytes
    )


def _compare(
    calls: dict[str, Callable[[], object]], repeats: int, *, num_bytes: int, operations: int
) -> dict[str, Any]:
    """Medians of calls in turn, after one of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        **{f"{name}_ms": round(1000 * median, 2) for name, median in medians.items()},
        "ratio": round(medians["torch"] / medians["ours"], 2),
        "gb_per_s": round(num_bytes / medians["ours"] / 1e9, 1),
        "tflop_per_s": round(operations / medians["ours"] / 1e12, 3),
    }


def _markdown(document: dict[str, Any]) -> str:
    lines = [
        f"`{document['command']}`, {document['date']}: {document['machine']['cpu']}, "
        f"torch {document['machine']['torch']}, {document['layers']} layers, bf16, medians of "
        f"{document['repeats']}.",
        "",
        "| attention: key/value heads, sequences x context, new tokens | ours, ms | torch, ms "
        "| times as fast | GB/s | keys and values of 8 bits, ms | times as fast as ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["attention"]:
        lines.append(
            f"| {row['kv_heads']}, {row['sequences']} x {row['context']}, {row['new']} "
            f"| {row['ours_ms']} | {row['torch_ms']} | {row['ratio']} | {row['gb_per_s']} "
            f"| {row['int8_ms']} | {row['ours_ms'] / row['int8_ms']:.2f} |"
        )
    lines += [
        "",
        "| linear layers: tokens | ours, ms | torch, ms | times as fast | GB/s | TFLOP/s "
        "| weights of 8 bits, ms | times as fast as ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["linear"]:
        lines.append(
            f"| {row['tokens']} | {row['ours_ms']} | {row['torch_ms']} | {row['ratio']} "
            f"| {row['gb_per_s']} | {row['tflop_per_s']} | {row['int8_ms']} "
            f"| {row['ours_ms'] / row['int8_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
