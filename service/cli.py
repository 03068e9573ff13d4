"""The `headroom` command. Parses, prints, and leaves the work to others."""

import asyncio
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from google.protobuf.json_format import MessageToDict
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.console import (
    describe,
    err,
    fail,
    models_by_application,
    out,
    print_ready,
    require_free_port,
)

app = typer.Typer(
    name="headroom",
    help="Serve decoder transformers over gRPC; the head configuration is a first-class choice.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

Target = Annotated[str, typer.Option(help="Where the server listens, as HOST:PORT.")]
ApplicationName = Annotated[str, typer.Option(help="Application, if the server has several.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _version(value: bool) -> None:
    if value:
        out.print(f"headroom {version('headroom')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: headroom serve --model ./llama-1b --port 9000 --replicas 2")
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hugging Face directory, or 'demo'; NAME=DIRECTORY, several times, serves each "
            "as an application of its own. [default: demo]"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port. [default: 9000]")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Health port of Ray Serve. [default: 8000]")
    ] = None,
    runtime: Annotated[
        Literal["ray", "standalone"] | None, typer.Option(help="What hosts it. [default: ray]")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Ray replicas. [default: 1]")] = None,
) -> None:
    """Serve a model, or several side by side, over gRPC until Ctrl-C.

    Settings come from flags, then HEADROOM_* variables, then --config, then defaults.
    """
    started = time.monotonic()
    from service.config import SettingsError, load_config

    try:
        settings = load_config(
            config,
            model=models_by_application(model or []),
            host=host,
            port=port,
            http_port=http_port,
            runtime=runtime,
            replicas=replicas,
        )
    except SettingsError as error:
        fail(str(error), code=2)
    if settings.runtime == "standalone" and settings.replicas > 1:
        fail("replicas is more than 1; allowed: 1 with the standalone runtime", code=2)
    from service.client import HeadroomError
    from service.replica import check_model

    try:
        for application in settings.applications:
            check_model(application)
        require_free_port(settings.host, settings.port, "--port")
        if settings.runtime == "ray":
            require_free_port(settings.host, settings.http_port, "--http-port")
    except (ValueError, OSError) as error:
        fail(str(error))

    def announce(logs: Path | None = None) -> None:
        print_ready(settings, started, logs)

    try:
        if settings.runtime == "standalone":
            from service.runtimes import standalone

            asyncio.run(standalone.serve(settings, announce))
        else:
            from service.runtimes.ray_environment import set_ray_environment

            directory = set_ray_environment(settings)
            from service.runtimes import ray_serve

            ray_serve.serve_until_stopped(settings, directory, announce)
    except (ValueError, OSError, RuntimeError, HeadroomError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted before the server was ready", code=130)
    out.print("stopped")


@app.command(epilog='Example: headroom generate --max-tokens 64 "def main("')
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    target: Target = "127.0.0.1:9000",
    application: ApplicationName = "headroom",
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeats a draw.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds the server may take.")] = None,
    as_json: Json = False,
) -> None:
    """Stream the continuation of a prompt from a server."""
    from service.client import Client, HeadroomError, RequestOptions, Sampling

    sampling: Sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": stop or [],
    }
    if seed is not None:
        sampling["seed"] = seed
    pieces: list[str] = []
    with Client(target, application=application) as client:
        try:
            stream = client.generate(prompt, options=RequestOptions(timeout=timeout), **sampling)
            for text in stream:
                pieces.append(text)
                if not as_json:
                    print(text, end="", flush=True)
        except HeadroomError as error:
            fail(str(error))
        except ValueError as error:  # a number that the message cannot hold
            fail(str(error), code=2)
    assert stream.finished is not None, "a stream without error ends with `finished`"
    finished = MessageToDict(stream.finished, preserving_proto_field_name=True)
    if as_json:
        print(json.dumps({"text": "".join(pieces), "token_ids": stream.token_ids, **finished}))
    else:
        print()


@app.command(epilog="Example: headroom model --target 127.0.0.1:9000 --json")
def model(
    target: Target = "127.0.0.1:9000",
    application: ApplicationName = "headroom",
    as_json: Json = False,
) -> None:
    """Show the served model, its heads, its KV cache, and what it is busy with."""
    from service.client import Client, HeadroomError

    with Client(target, application=application) as client:
        try:
            description, load = client.get_model(), client.get_load()
        except HeadroomError as error:
            fail(str(error))
    if as_json:
        fields = [
            MessageToDict(
                message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            for message in (description, load)
        ]
        print(json.dumps({"model": fields[0], "load": fields[1]}))
        return
    table = Table(show_header=False, box=None)
    for name, text in describe(description).items():
        table.add_row(name, text)
    table.add_row("load", f"{load.num_running} running, {load.num_waiting} waiting")
    table.add_row(
        "blocks",
        f"{load.kv_blocks_used} used, {load.kv_blocks_cached} cached, {load.kv_blocks_total} total",
    )
    out.print(table)


@app.command(epilog="Example: headroom bench --heads 12 --kv-heads 12,4,1 --clients 32")
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
    kernel: Annotated[Literal["auto", "dense", "reference"], typer.Option()] = "auto",
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
                shapes, workload, device=device, kernel=kernel, path=path, on_run=show
            )
    except (ModelError, ValueError) as error:
        fail(str(error), code=2)
    print(json.dumps(result))


@app.command("train-demo", epilog="Example: headroom train-demo --minutes 25 --output models/demo")
def train_demo(
    output: Annotated[Path, typer.Option(help="Directory for the checkpoint.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time.")] = 25.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the bundled demo model again, from the sources of the Python standard library."""
    import torch

    from models.train.demo import make_demo
    from models.train.trainer import TrainConfig, TrainProgress

    columns = (
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("training", total=1.0, state="")

        def show(now: TrainProgress) -> None:
            state = f"loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s"
            progress.update(task, completed=now.share, state=state)

        bpb = make_demo(
            output,
            TrainConfig(max_seconds=60 * minutes, seed=seed),
            num_threads=torch.get_num_threads(),
            on_step=show,
        )
    out.print(f"{output}: {bpb:.3f} bits per byte on held-out files")
