"""What the two forms of attention cost: all heads at once, and one head after the other.

    python -m loadtests.attention --repeats 3

Three implementations of one causal function, on the same random numbers, called in turn: `sdpa`
(`dense.attend`, torch's fused kernel, no weights), `explicit` (`reference.attend`, all heads at
once with their weights as a tensor) and `split` (`attend_by_head`). Reports the time, the extra
memory and the distance from float64. Writes JSON and a table to `loadtests/results`.

Ratios are of the fastest calls, which others on the same machine disturb least; medians are kept
beside them.

Extra memory is the largest sum of live allocations during one call, the results included and the
inputs not, as torch's profiler sees it in torch's allocator. Buffers that a library (such as the
one behind the matrix products) takes elsewhere are not in it.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models import masks
from models.kernels import dense, reference
from models.scoring import Scoring
from models.split_attention import attend_by_head
from service.bench import machine

RESULTS = Path(__file__).parent / "results"
IMPLEMENTATIONS = ("sdpa", "explicit", "split")
# Rounds of short calls go on for so long.
_MIN_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """One sequence."""

    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: str


def main(
    heads: Annotated[
        str, typer.Option(help="Query heads : key/value heads.")
    ] = "1:1,8:8,8:2,8:1,32:32,32:8,32:1",
    tokens: Annotated[str, typer.Option(help="Lengths.")] = "128,512,2048",
    dtypes: Annotated[str, typer.Option()] = "float32,bfloat16",
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; more while they are short.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
    name: Annotated[str, typer.Option(help="Name of the result files.")] = "attention",
) -> None:
    """Measure fused and split attention in one run."""
    shapes = [
        Shape(*_pair(pair), int(length), head_dim, dtype)
        for dtype in dtypes.split(",")
        for pair in heads.split(",")
        for length in tokens.split(",")
    ]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write into the bar
    torch.set_num_threads(threads)
    loads = os.getloadavg()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("attention", total=len(shapes))
        rows = []
        for shape in shapes:
            progress.update(task, description=f"{shape.heads}:{shape.kv_heads} x {shape.tokens}")
            rows.append(_measure(shape, repeats))
            progress.advance(task)
    load_average = f"{loads[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    document = {
        "date": date.today().isoformat(),
        "command": f"python -m loadtests.attention {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(torch.device("cpu")),
        "load_average": load_average,
        "repeats": repeats,
        "rows": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document)
    (results / f"{name}.md").write_text(table)
    print(table)


def _pair(text: str) -> tuple[int, int]:
    heads, kv_heads = text.split(":")
    return int(heads), int(kv_heads)


@torch.inference_mode()
def _measure(shape: Shape, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((1, count, shape.tokens, shape.head_dim), generator=generator).to(
            getattr(torch, shape.dtype)
        )
        for count in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    scoring = Scoring(shape.head_dim**-0.5)
    visible = masks.causal(shape.tokens, shape.tokens)
    calls: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: dense.attend(query, key, value, scoring, is_causal=True),
        "explicit": lambda: reference.attend(query, key, value, scoring, visible=visible).output,
        "split": lambda: attend_by_head(query, key, value, scoring, visible=visible).output,
    }
    expected = _float64(query, key, value, scoring, visible)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    differences = {
        name: (call() - expected).abs().max().item()  # the first call, which warms up
        for name, call in calls.items()
    }
    began = time.perf_counter()
    while len(milliseconds["split"]) < repeats or time.perf_counter() - began < _MIN_SECONDS:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            milliseconds[name].append(1000 * (time.perf_counter() - started))
    return {
        **asdict(shape),
        **{
            name: {
                "ms_fastest": round(min(milliseconds[name]), 3),
                "ms_median": round(statistics.median(milliseconds[name]), 3),
                "ms_slowest": round(max(milliseconds[name]), 3),
                "extra_mib": round(_extra_bytes(call) / 2**20, 2),
                "difference_from_float64": float(f"{differences[name]:.3g}"),
            }
            for name, call in calls.items()
        },
    }


def _float64(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, visible: Tensor
) -> Tensor:
    """The definition on the same numbers; a head at a time, because of the memory."""
    group = query.shape[1] // key.shape[1]

    def outputs() -> Iterator[Tensor]:
        for head in range(query.shape[1]):
            q, k, v = (
                part[:, [at]].double()
                for part, at in ((query, head), (key, head // group), (value, head // group))
            )
            yield reference.attend(q, k, v, scoring, visible=visible).output

    return torch.cat(list(outputs()), dim=1)


def _extra_bytes(call: Callable[[], Tensor]) -> int:
    """The largest sum of what is allocated and not yet freed, during one call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()  # kept, so that the result is not freed within
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiled.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    del result
    allocations = [event for event in events if event["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def _markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"# Attention, fused and split, {document['date']}",
        "",
        f"{machine['cpu']} ({machine['cpu_capability']}), threads: {machine['threads']}, torch "
        f"{machine['torch']}, Python {machine['python']}; one causal sequence, head_dim "
        f"{document['rows'][0]['head_dim']}; the fastest of {document['repeats']} calls or more, "
        "the three implementations in turn. The machine is shared (load average "
        f"{document['load_average']}): read the ratios.",
        "",
        f"`{document['command']}`",
        "",
        "Extra memory: peak of live allocations in torch's allocator during one call, by torch's "
        "profiler. Difference: largest absolute, from float64 on the same numbers.",
        "",
        "| heads : kv heads | tokens | dtype | ms: sdpa | explicit | split | split / sdpa | "
        "split / explicit | extra MiB: sdpa | explicit | split | difference: sdpa | explicit | "
        "split |",
        "|" + "---|" * 14,
    ]
    for row in document["rows"]:
        sdpa, explicit, split = (row[name] for name in IMPLEMENTATIONS)
        cells = [
            f"{row['heads']} : {row['kv_heads']}",
            row["tokens"],
            row["dtype"],
            *(f"{each['ms_fastest']:.4g}" for each in (sdpa, explicit, split)),
            f"{split['ms_fastest'] / sdpa['ms_fastest']:.1f}",
            f"{split['ms_fastest'] / explicit['ms_fastest']:.2f}",
            *(f"{each['extra_mib']:.4g}" for each in (sdpa, explicit, split)),
            *(f"{each['difference_from_float64']:.1e}" for each in (sdpa, explicit, split)),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
