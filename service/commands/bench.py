"""`headroom bench`: the engine alone."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import Progress

from service.console import err, fail


def bench(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face directory instead of random weights.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    hidden: Annotated[int, typer.Option(min=1)] = 768,
    intermediate: Annotated[int, typer.Option(min=1)] = 2048,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    kv_heads: Annotated[str, typer.Option(help="One number or several, as 12,4,1.")] = "12",
    window: Annotated[
        str,
        typer.Option(help="Tokens that every head sees: all, a number, or several, as all,128."),
    ] = "all",
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    vocab: Annotated[int, typer.Option(min=2)] = 32_000,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    kernel: Annotated[
        Literal["auto", "paged_cpu", "paged_triton", "dense", "reference"], typer.Option()
    ] = "auto",
    weight_dtype: Annotated[
        str, typer.Option(help="Of linear layers: auto, int8, or both, as auto,int8.")
    ] = "auto",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Of keys and values: auto, int8, or both, as auto,int8.")
    ] = "auto",
    clients: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 32,
    prompt: Annotated[int, typer.Option(min=2, help="Prompt tokens of each.")] = 128,
    output: Annotated[int, typer.Option(min=4, help="Output tokens of each.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs, interleaved.")] = 3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure the engine alone; the last line is one JSON document."""
    from models.errors import ModelError
    from service.bench import BenchShape, BenchWorkload, run_bench

    try:
        each_kv_heads = [int(part) for part in kv_heads.split(",")]
    except ValueError:
        fail(f"kv-heads is {kv_heads!r}; allowed: numbers joined by commas", code=2)
    try:
        windows = [None if part == "all" else int(part) for part in window.split(",")]
    except ValueError:
        fail(f"window is {window!r}; allowed: all or numbers, joined by commas", code=2)
    weight_dtypes = _types("weight-dtype", weight_dtype)
    kv_cache_dtypes = _types("kv-cache-dtype", kv_cache_dtype)
    shapes = [
        BenchShape(layers, hidden, intermediate, heads, number, head_dim, vocab, dtype, size)
        for number in each_kv_heads
        for size in windows
    ]
    workload = BenchWorkload(clients, prompt, output, repeats, seed)
    path = Path(model) if model else None
    try:
        with Progress(console=err, disable=not err.is_terminal) as progress:
            task = progress.add_task("measuring", total=None)

            def show(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            result = run_bench(
                shapes,
                workload,
                device=device,
                kernel=kernel,
                weight_dtypes=weight_dtypes,
                kv_cache_dtypes=kv_cache_dtypes,
                path=path,
                on_run=show,
            )
    except (ModelError, ValueError) as error:
        fail(str(error), code=2)
    print(json.dumps(result))


def _types(flag: str, text: str) -> list[Literal["auto", "int8"]]:
    types: list[Literal["auto", "int8"]] = []
    for part in text.split(","):
        match part:
            case "auto" | "int8":
                types.append(part)
            case _:
                fail(f"{flag} is {text!r}; allowed: auto, int8, joined by commas", code=2)
    return types
