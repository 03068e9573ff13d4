"""`headroom plan`: flags to a question about capacity, answered here or by a server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from google.protobuf.json_format import MessageToDict
from rich.progress import Progress

from service.client import Client, HeadroomError
from service.client.planning import Planning, Shape, plan_request
from service.commands.connection import (
    ApplicationName,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    connect,
)
from service.commands.plan_flags import (
    Written,
    given,
    read_fit,
    read_shapes,
    refuse_beside,
)
from service.commands.plan_text import plan_text
from service.console import err, fail, out

if TYPE_CHECKING:
    from models.config import DTypeName, ModelConfig
    from protos.headroom.v1.models_pb2 import PlanCapacityResponse

# Random weights have no context of their own.
_CONTEXT = 131_072
# What a flag may ask for: beyond any model, and counted in moments.
_MAX_WIDTH = 2**20
_MAX_VOCAB = 2**24
_MAX_LAYERS = 512
_MAX_HEADS = 512
_MAX_HEAD_DIM = 4096
_MAX_UINT32 = 2**32 - 1  # what a message holds; what makes sense is checked later
_MAX_RATE = 1e12
_OWN_SHAPE = {"layers": 12, "hidden": 768, "intermediate": 2048, "vocab": 32_000}


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory with a config.json, or a bundled model, such as demo; needs no weights."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Ask a server about its own model, as HOST:PORT.")
    ] = None,
    application: ApplicationName = "headroom",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=_MAX_LAYERS, help="[default: 12]")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, max=_MAX_WIDTH, help="[default: 768]")
    ] = None,
    intermediate: Annotated[
        int | None, typer.Option(min=1, max=_MAX_WIDTH, help="[default: 2048]")
    ] = None,
    vocab: Annotated[
        int | None, typer.Option(min=2, max=_MAX_VOCAB, help="[default: 32000]")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_HEADS, help="Query heads. [default: 12, or the model's]"),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_HEADS, help="[default: as many as heads, or the model's]"),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_HEAD_DIM, help="[default: 64, or the model's]"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_MAX_UINT32,
            help="Tokens that every head sees; 0 is all. [default: the model's]",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="[default: bfloat16, or the model's]"),
    ] = None,
    kv_cache_dtype: Annotated[
        Literal["auto", "int8"] | None,
        typer.Option(help="Of keys and values; auto is dtype. [default: auto, or the server's]"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="For weights and cache together, as 8GiB.")
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="For the cache alone. [default: the server's]")
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MAX_UINT32, help="Tokens per block. [default: 16, or the server's]"
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_UINT32, help="Sequences of one step. [default: 64]"),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, max=_MAX_UINT32, help="Tokens of one step. [default: 512]")
    ] = None,
    prompt: Annotated[
        int, typer.Option(min=1, max=_MAX_UINT32, help="Prompt tokens of each request.")
    ] = 512,
    output: Annotated[
        int, typer.Option(min=2, max=_MAX_UINT32, help="Output tokens of each request.")
    ] = 128,
    mix: Annotated[
        str | None,
        typer.Option(help="PROMPT/OUTPUT:SHARE of several kinds, as 512/128:3,4000/200:1."),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_UINT32, help="Requests at once. [default: as many as fit]"),
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(help="sweep.json of a sweep: predicts step times.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure this machine: step times at its copy bandwidth."),
    ] = False,
    target_concurrency: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_UINT32, help="Find changes for so many requests at once."),
    ] = None,
    target_tokens_per_s: Annotated[
        float | None,
        typer.Option(
            min=0, max=_MAX_RATE, help="Find changes for so many decode tokens per second."
        ),
    ] = None,
    target_context: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_UINT32, help="Find changes for requests of so many tokens."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what a head configuration holds and how fast it decodes, without running it."""
    own_shape = given(layers=layers, hidden=hidden, intermediate=intermediate, vocab=vocab)
    own_limits = given(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    own_heads = given(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, window=window)
    if target is not None:
        refuse_beside(
            "with --target", model=model, measure=measure or None, **own_limits, **own_shape
        )
    elif model is not None:
        refuse_beside("with --model", **own_shape)
    if memory is not None:
        refuse_beside("with --memory", kv_memory=kv_memory)
    elif kv_memory is None and target is None:
        fail("--memory is missing; allowed: --memory 8GiB, or --kv-memory for the cache", code=2)
    if target_tokens_per_s is not None and fit is None and not measure:
        predicted = "--fit" if target is not None else "--fit or --measure"
        fail(f"--target-tokens-per-s needs {predicted}, to predict the rate from", code=2)
    written = Written(memory, kv_memory, mix)
    fields = given(
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        clients=clients,
        memory=written.num_bytes(),
        weights_included=None if memory is None else True,
        target_concurrent=target_concurrency,
        target_tokens_per_s=target_tokens_per_s,
        target_context=target_context,
    )
    planning = cast(Planning, fields | (read_fit(fit) if fit else {}))
    shapes: list[Shape] = [(prompt, output)] if mix is None else read_shapes(mix)
    if target is not None:
        planning |= cast(Planning, own_heads)
        with connect(target, application, token_file, tls_ca, tls_cert, tls_key) as client:
            answer = _ask(client, shapes, planning, written)
    elif model is not None:
        planning |= cast(Planning, own_heads)
        answer = _answer(_read_model(model), own_limits, shapes, planning, measure, written)
    else:
        served = _random_model(own_shape, own_heads, dtype or "bfloat16", written)
        answer = _answer(served, own_limits, shapes, planning, measure, written)
    if as_json:
        fields = MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps(fields))
    else:
        out.print(plan_text(answer))


def _ask(
    client: Client, shapes: list[Shape], planning: Planning, written: Written
) -> "PlanCapacityResponse":
    try:
        return client.plan_capacity(shapes, **planning)
    except HeadroomError as error:
        if error.violations:
            written.refuse(error.violations.values())
        fail(str(error))
    except (TypeError, ValueError) as error:  # not a number of the message's type
        fail(str(error), code=2)


def _answer(
    served: "ModelConfig",
    limits: dict[str, Any],
    shapes: list[Shape],
    planning: Planning,
    measure: bool,
    written: Written,
) -> "PlanCapacityResponse":
    from service.codec import planning_call
    from service.engine.config import EngineConfig
    from service.engine.errors import EncoderModelError, InvalidRequestError

    def ask(planning: Planning) -> "PlanCapacityResponse":
        return planning_call(plan_request(shapes, planning), served, engine, 0).answer()

    try:
        engine = EngineConfig(**limits)
        if measure:
            plain = {key: value for key, value in planning.items() if "target" not in key}
            plan = ask(cast(Planning, plain)).plan
            planning["machine"] = _measured(plan.weight_bytes + round(plan.step_kv_bytes))
        return ask(planning)
    except InvalidRequestError as error:
        written.refuse(map(str, error.violations))
    except (EncoderModelError, TypeError, ValueError) as error:
        written.refuse([str(error)])


def _read_model(name: str) -> "ModelConfig":
    from models.checkpoints.bundled import checkpoint_directory
    from models.checkpoints.loader import read_config
    from models.errors import ModelError

    try:
        return read_config(checkpoint_directory(name))
    except ModelError as error:
        fail(str(error), code=2)


def _random_model(
    shape: dict[str, Any], heads: dict[str, Any], dtype: "DTypeName", written: Written
) -> "ModelConfig":
    from models.errors import ConfigError
    from service.bench import BenchShape

    num_heads = heads.get("num_heads", 12)
    try:
        return BenchShape(
            **_OWN_SHAPE | shape,
            heads=num_heads,
            kv_heads=heads.get("num_kv_heads", num_heads),
            head_dim=heads.get("head_dim", 64),
            window=heads.get("window") or None,
            dtype=dtype,
        ).model_config(_CONTEXT)
    except ConfigError as error:
        written.refuse([str(error)])


def _measured(footprint: int) -> dict[str, Any]:
    from service.capacity import measure_machine
    from service.engine.memory import resolve_device

    with Progress(console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring this machine", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return measure_machine(resolve_device("auto"), footprint, on_progress=show).to_dict()
