"""`PlanCapacity` over a real channel, and `headroom plan`."""

import asyncio
import contextlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from typer.testing import CliRunner

from models.checkpoints.loader import read_config
from models.config import HeadConfig
from protos.headroom.v1 import generation_pb2, models_pb2
from service import codec
from service.capacity import (
    CapacityQuery,
    MachineLimits,
    RequestShape,
    StepModel,
    Target,
    find_changes,
    plan_capacity,
)
from service.cli import app
from service.client import AsyncClient, Client, HeadroomError, to_error
from service.client.planning import Shape
from service.commands.plan_flags import Written
from service.engine import EngineConfig
from service.engine.errors import EncoderModelError, InvalidRequestError
from tests.models.tiny import llama
from tests.serving import RunningServer

STEP_MODEL = StepModel(
    a=0.001, c=1e-9, e=2e-9, r2=0.99, error=0.1, slopes={"mha": 2e-9},
    weight_bytes=(0.0, 1e9), kv_bytes=(0.0, 1e9), f=1e-12, flops=(0.0, 1e12),
)  # fmt: skip
MACHINE = MachineLimits(1e9, {"float32": 2e9, "bfloat16": 3e9, "float16": 1e9})
MIX: list[Shape] = [(20, 30), (50, 10, 2)]
SHAPE = {"prompt": 5, "output": 5}
SHAPES = (RequestShape(20, 30), RequestShape(50, 10, 2))


async def test_without_more_it_is_about_the_served_model(server: RunningServer) -> None:
    async with AsyncClient(server.target) as client:
        answer = await client.plan_capacity(MIX)
        model = await client.get_model()
    assert answer.plan.num_blocks == model.kv_blocks_total
    assert answer.plan.kv_cache_bytes == model.kv_cache_bytes
    assert answer.plan.kv_bytes_per_token == model.kv_bytes_per_token
    assert answer.plan.weight_bytes == 4 * model.num_parameters
    assert answer.plan.head_label == model.layers[0].label
    assert answer.plan.max_num_seqs == model.max_num_seqs
    assert not answer.plan.HasField("prediction")
    assert answer.plan.no_prediction == "no step model is given and no machine was measured"
    assert not answer.changes


async def test_the_answer_is_the_plan(server: RunningServer) -> None:
    """Every field on the wire, against the functions that the answer is made of."""
    engine = server.engine.engine
    model = engine.served_config.replace(dtype="bfloat16")
    layers = tuple(
        type(heads)(heads.num_heads, 1, heads.head_dim, window=32, sink_tokens=2)
        for heads in model.layers
    )
    limits = EngineConfig(block_size=8)
    query = CapacityQuery(model.replace(layers=layers), 2**20, True, SHAPES, limits, clients=7)
    target = Target(concurrent=50, tokens_per_s=2000.0, context=100)
    expected = plan_capacity(query, STEP_MODEL, MACHINE)
    changes = find_changes(query, target, STEP_MODEL, MACHINE)

    def ask() -> models_pb2.PlanCapacityResponse:
        with Client(server.target) as client:
            return client.plan_capacity(
                MIX, dtype="bfloat16", num_kv_heads=1, window=32, sink_tokens=2, block_size=8,
                memory=2**20, weights_included=True, clients=7, step_model=STEP_MODEL.to_dict(),
                machine=MACHINE.to_dict(), target_concurrent=50, target_tokens_per_s=2000.0,
                target_context=100,
            )  # fmt: skip

    answer = await asyncio.to_thread(ask)
    plan = answer.plan
    for name in (
        "head_label", "dtype", "kv_cache_dtype", "block_size", "kv_bytes_per_token", "weight_bytes",
        "kv_cache_bytes", "num_blocks", "longest_request", "concurrent", "concurrent_mean",
        "waste", "max_num_seqs", "running",
    ):  # fmt: skip
        assert getattr(plan, name) == getattr(expected, name), name
    assert expected.tokens is None
    assert not plan.HasField("tokens")
    assert expected.step is not None
    assert plan.step_kv_bytes == expected.step.kv_bytes
    assert plan.weight_flops_per_byte == expected.step.weight_flops_per_byte == 7
    assert plan.kv_flops_per_byte == expected.step.kv_flops_per_byte == 4
    time, said = expected.step_time, plan.prediction
    assert time is not None
    assert said.fitted
    assert (said.step_seconds, said.extrapolated) == (time.seconds, time.extrapolated)
    assert said.decode_tokens_per_s == expected.decode_tokens_per_s
    parts = {
        "fixed": said.fixed_seconds,
        "weights": said.weight_seconds,
        "cache": said.cache_seconds,
        "arithmetic": said.arithmetic_seconds,
    }
    assert said.arithmetic_seconds > 0
    assert parts == time.parts
    assert said.bound_by == time.bound_by
    assert tuple(said.arithmetic_bound) == time.arithmetic_bound == ("weights", "cache")
    assert answer.reaches == target.is_reached(expected)
    assert [(c.change, c.cost, c.reaches, c.plan.concurrent) for c in answer.changes] == [
        (c.what, c.cost, c.reaches, c.plan.concurrent) for c in changes
    ]


def _bad(field: str, **fields: Any) -> Any:
    return pytest.param(field, fields, id=field)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        _bad("mix", mix=[]),
        _bad("mix[0].output", mix=[{"prompt": 5, "output": 1}]),
        _bad("mix[1].share", mix=[SHAPE, SHAPE | {"share": 0}]),
        _bad("mix[0].prompt", mix=[{"prompt": 2**32 - 1, "output": 5}]),
        _bad("dtype", dtype="int8"),
        _bad("kv_cache_dtype", kv_cache_dtype="fp8"),
        _bad("heads.head_dim", kv_cache_dtype="int8", heads={"head_dim": 6}),
        _bad("block_size", block_size=0),
        _bad("memory", memory=0),
        _bad("memory", memory=2**64 - 1),
        _bad("memory", memory=100),
        _bad("memory", memory=10**5, weights_included=True),
        _bad("weights_included", weights_included=True),
        _bad("clients", clients=0),
        _bad("heads.num_heads", heads={"num_heads": 2**32 - 1}),
        _bad("heads.num_heads", heads={"num_heads": 513}),
        _bad("heads.num_kv_heads", heads={"num_kv_heads": 3}),
        _bad("heads.head_dim", heads={"head_dim": 0}),
        _bad("step_model.weight_bytes", step_model={"a": 1, "e": 1}),
        _bad("step_model.f", step_model=STEP_MODEL.to_dict() | {"f": -1}),
        _bad("step_model.flops", step_model=STEP_MODEL.to_dict() | {"flops": [1]}),
        _bad("step_model.a", step_model=STEP_MODEL.to_dict() | {"a": math.inf}),
        _bad("machine.bytes_per_s", machine=MACHINE.to_dict() | {"bytes_per_s": 0}),
        _bad("machine.flops_per_s", machine={"bytes_per_s": 1}),
        _bad("target.tokens_per_s", target={"tokens_per_s": 5}),
        _bad("target.context", target={"context": 129}),
    ],
)
async def test_a_wrong_field_is_named(
    server: RunningServer, field: str, fields: dict[str, Any]
) -> None:
    request = models_pb2.PlanCapacityRequest(**({"mix": [SHAPE]} | fields))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.models.PlanCapacity(request)
    error = to_error(caught.value)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(error.violations) == [field]


async def test_all_wrong_fields_are_named_at_once(server: RunningServer) -> None:
    async with AsyncClient(server.target) as client:
        with pytest.raises(HeadroomError) as caught:
            await client.plan_capacity([(0, 5)], dtype="x", num_kv_heads=3, clients=0, memory=0)
    assert set(caught.value.violations) == {
        "dtype", "heads.num_kv_heads", "clients", "memory", "mix[0].prompt"
    }  # fmt: skip


async def test_generations_go_on_beside_a_plan(server: RunningServer) -> None:
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]),
        sampling=generation_pb2.SamplingParams(max_tokens=100, temperature=0, ignore_eos=True),
    )
    stream = server.generation.Generate(request)
    await stream.read()
    async with AsyncClient(server.target) as client:
        await client.plan_capacity(MIX, target_concurrent=10_000)
    await server.until_idle()


async def test_one_plan_at_a_time_and_the_next_is_told_when_to_ask(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the client of the first one is gone: its thread still computes."""
    entered, leave = threading.Event(), threading.Event()

    def slow(call: codec.PlanningCall) -> models_pb2.PlanCapacityResponse:
        entered.set()
        assert leave.wait(30)
        return models_pb2.PlanCapacityResponse()

    request = models_pb2.PlanCapacityRequest(mix=[SHAPE])
    with monkeypatch.context() as patched:
        patched.setattr(codec.PlanningCall, "answer", slow)
        first = server.models.PlanCapacity(request)
        sent = asyncio.ensure_future(first)
        await asyncio.to_thread(entered.wait, 30)
        for is_gone in (False, True):
            if is_gone:
                first.cancel()
                await asyncio.wait([sent])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.models.PlanCapacity(request)
            error = to_error(caught.value)
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (error.reason, error.retry_after) == ("QUEUE_FULL", 1.0)
        leave.set()
    answer = None
    while answer is None:  # until the thread has ended
        with contextlib.suppress(grpc.aio.AioRpcError):
            answer = await server.models.PlanCapacity(request)
    assert answer.plan.num_blocks > 0


def test_a_server_follows_fewer_tokens_than_a_plan_at_home() -> None:
    long = llama(max_position_embeddings=2**16)
    request = models_pb2.PlanCapacityRequest(mix=[{"prompt": 5, "output": 2049}])
    assert codec.planning_call(request, long, EngineConfig(), 10**6)
    with pytest.raises(InvalidRequestError) as caught:
        codec.planning_call(
            request, long, EngineConfig(), 10**6, max_output_tokens=codec.MAX_SERVED_OUTPUT_TOKENS
        )
    (violation,) = caught.value.violations
    assert str(violation) == "mix is 2049 output tokens; allowed: at most 2048 in all"


def test_an_encoder_has_no_cache_to_plan() -> None:
    encoder = llama(layers=(HeadConfig(4, 2, 8, causal=False),))
    request = models_pb2.PlanCapacityRequest(mix=[SHAPE])
    with pytest.raises(EncoderModelError):
        codec.planning_call(request, encoder, EngineConfig(), 10**6)


def _plan(*flags: str) -> Any:
    return CliRunner().invoke(app, ["plan", *flags])


def _json(*flags: str) -> Any:
    result = _plan(*flags, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_config_json_is_enough(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_path / "config.json").read_bytes())
    plan = _json("--model", str(tmp_path), "--kv-memory", "1MiB", "--prompt", "20", "--output", "9")
    query = CapacityQuery(
        read_config(model_path), 2**20, False, (RequestShape(20, 9),), EngineConfig()
    )
    expected = plan_capacity(query)
    assert plan["plan"]["concurrent"] == str(expected.concurrent)
    assert plan["plan"]["num_blocks"] == str(expected.num_blocks)


def test_flags_describe_a_model(tmp_path: Path) -> None:
    fit = tmp_path / "sweep.json"
    fit.write_text(json.dumps({"step_model": STEP_MODEL.to_dict(), "limits": MACHINE.to_dict()}))
    flags = (
        "--layers", "2", "--hidden", "64", "--intermediate", "96", "--vocab", "300",
        "--heads", "8", "--kv-heads", "2", "--head-dim", "16", "--memory", "2MiB",
        "--mix", "100/50:3, 400/20", "--clients", "3", "--fit", str(fit),
    )  # fmt: skip
    found = _json(*flags, "--target-concurrency", "60")
    assert found["plan"]["head_label"] == "h8kv2d16"
    assert found["plan"]["kv_bytes_per_token"] == str(2 * 2 * 2 * 16 * 2)
    eight_bits = _json(*flags, "--kv-cache-dtype", "int8")["plan"]
    assert eight_bits["kv_bytes_per_token"] == str(2 * 2 * 2 * (16 + 4))
    assert eight_bits["concurrent"] > found["plan"]["concurrent"]
    assert "bfloat16, keys and values of 8 bits" in _plan(*flags, "--kv-cache-dtype", "int8").stdout
    assert found["plan"]["prediction"]["fitted"] is True
    assert found["plan"]["running"] == 3
    assert any(change["reaches"] for change in found["changes"])
    text = _plan(*flags, "--target-concurrency", "60").stdout
    for expected in ("h8kv2d16, bfloat16", "256 bytes per token", "tokens/s", "1 key/value heads"):
        assert expected in text
    assert "None of these reaches" in _plan(*flags, "--target-tokens-per-s", "1e12").stdout
    assert "reaches the target; so does" in _plan(*flags, "--target-concurrency", "1").stdout


def test_a_fit_that_does_not_tell_the_weights_says_so(tmp_path: Path) -> None:
    """A coefficient at its bound is no measurement: nothing is read in 0.00 ms."""
    fit = tmp_path / "sweep.json"
    untold = STEP_MODEL.to_dict() | {"c": 0.0, "weight_bytes": [2e8, 3e8]}
    fit.write_text(json.dumps({"step_model": untold}))
    flags = ("--kv-memory", "1GiB", "--fit", str(fit))
    text = _plan(*flags).stdout
    assert "weights 0.00" not in text
    assert "fixed and weights 1.00, cache" in text
    assert "does not tell what reading the weights costs" in text
    larger = _json(*flags, "--layers", "24")["plan"]
    assert larger["no_prediction"].startswith(f"weight_bytes is {larger['weight_bytes']}; the step")
    fit.write_text(json.dumps({"step_model": untold | {"c": 1e-9}}))
    assert "does not tell" not in _plan(*flags).stdout


def test_measuring_gives_times_at_copy_bandwidth() -> None:
    flags = ("--layers", "1", "--kv-memory", "1MiB", "--prompt", "5", "--output", "5", "--measure")
    assert _json(*flags)["plan"]["prediction"]["fitted"] is False
    text = _plan(*flags, "--target-tokens-per-s", "1").stdout
    assert "at copy bandwidth" in text
    assert "least" not in text


def test_the_copy_is_as_large_as_the_bytes_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as large as the memory, most of which a step does not touch."""
    copied: list[int] = []

    def measure(device: object, footprint: int, **_: object) -> MachineLimits:
        copied.append(footprint)
        return MACHINE

    monkeypatch.setattr("service.capacity.measure_machine", measure)
    flags = ("--layers", "1", "--kv-memory", "64MiB", "--prompt", "5", "--output", "5")
    plan = _json(*flags, "--clients", "2", "--measure")["plan"]
    assert copied == [int(plan["weight_bytes"]) + round(plan["step_kv_bytes"])]


async def test_a_server_answers_the_command_too(server: RunningServer) -> None:
    flags = ("--target", server.target, "--prompt", "20", "--output", "9")
    found = await asyncio.to_thread(_json, *flags)
    assert found["plan"]["num_blocks"] == str((await server.load()).kv_blocks_total)
    other = await asyncio.to_thread(_json, *flags, "--kv-heads", "1", "--kv-memory", "1MiB")
    assert other["plan"]["head_label"] == "h4kv1d16"
    wrong = await asyncio.to_thread(_plan, *flags, "--kv-heads", "3", "--clients", "1000001")
    assert wrong.exit_code == 2
    assert sorted(wrong.stderr.splitlines()) == [
        "error: --clients is 1000001; allowed: 1 to 1000000",
        "error: --kv-heads is 3; allowed: a divisor of --heads=4",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--memory is missing"),
        ("--memory 8XB", "--memory is '8XB'"),
        ("--kv-memory 8XB", "--kv-memory is '8XB'"),
        ("--memory 1GiB --kv-memory 1GiB", "--kv-memory is given; allowed: nothing with --memory"),
        ("--memory 1GiB --model demo --layers 3", "--layers is given; allowed: nothing with --mod"),
        ("--target 127.0.0.1:1 --measure", "--measure is given; allowed: nothing with --target"),
        ("--memory 1GiB --model nowhere", "nowhere is not a directory"),
        ("--memory 1GiB --kv-heads 5", "--kv-heads is 5; allowed: a divisor of --heads=12"),
        (
            "--memory 1GiB --model demo --kv-heads 3",
            "--kv-heads is 3; allowed: a divisor of --heads=8",
        ),
        ("--memory 1GiB --head-dim 7", "--head-dim is 7; allowed: an even number"),
        ("--memory 1GiB --mix 5x5", "--mix is '5x5'"),
        ("--memory 1GiB --mix 5/5:0", "--mix[0].share is 0"),
        ("--memory 0", "--memory is 0; allowed: 1 to"),
        ("--memory 10MiB", "--memory is 10MiB; allowed: more than the"),
        ("--kv-memory 1KiB", "--kv-memory is 1KiB, which leaves 1024 bytes for the cache; allowed"),
        ("--memory 1GiB --clients 1000001", "--clients is 1000001; allowed"),
        (
            "--memory 1GiB --max-num-seqs 1000",
            "--max-num-batched-tokens is 512; allowed: at least --max-num-seqs=1000",
        ),
        (
            "--memory 1GiB --fit nowhere.json",
            "--fit is nowhere.json, which cannot be read: No such",
        ),
        (
            "--memory 1GiB --fit loadtests/results/engine.json",
            "--fit is loadtests/results/engine.json, which has no step model; allowed: the sweep",
        ),
        ("--memory 1GiB --fit README.md", "--fit is README.md, which is no JSON; allowed: the sw"),
        (
            "--memory 1GiB --target-tokens-per-s 500",
            "--target-tokens-per-s needs --fit or --measure",
        ),
        ("--target 127.0.0.1:1 --target-tokens-per-s 5", "--target-tokens-per-s needs --fit, to"),
        ("--memory 1GiB --target-context 999999", "--target-context is 999999; allowed"),
        ("--memory 1GiB --target-concurrency 1000001", "--target-concurrency is 1000001; allowed"),
        ("--memory 1GiB --prompt 4294967295", "--prompt is 4294967295"),
        ("--memory 99999999TiB --target 127.0.0.1:1", "Value out of range"),
    ],
)
def test_bad_usage_is_one_clear_line(flags: str, message: str) -> None:
    result = _plan(*flags.split())
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


def test_what_is_not_about_a_flag_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        Written("1GiB", None, None).refuse([str(EncoderModelError())])
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == f"error: {EncoderModelError()}\n"


@pytest.mark.parametrize(
    "content",
    [
        {"step_model": 5},
        {"step_model": [1]},
        {"step_model": {"a": "fast"}},
        {"step_model": {"nothing": 1}},
        {"step_model": STEP_MODEL.to_dict(), "limits": "fast"},
        {"step_model": STEP_MODEL.to_dict() | {"slopes": {"x": "steep"}}},
        ["step_model"],
    ],
)
@pytest.mark.parametrize("asked", [["--memory", "1GiB"], ["--target", "127.0.0.1:1"]])
def test_a_fit_that_is_none_is_one_clear_line(
    content: object, asked: list[str], tmp_path: Path
) -> None:
    fit = tmp_path / "sweep.json"
    fit.write_text(json.dumps(content))
    result = _plan(*asked, "--fit", str(fit))
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    "flag",
    [
        "--layers", "--hidden", "--intermediate", "--vocab", "--heads", "--kv-heads", "--head-dim",
        "--window", "--block-size", "--max-num-seqs", "--max-num-batched-tokens", "--prompt",
        "--output", "--clients", "--target-concurrency", "--target-tokens-per-s",
        "--target-context",
    ],
)  # fmt: skip
def test_every_number_has_a_maximum(flag: str) -> None:
    result = _plan("--memory", "1GiB", flag, "1" + 15 * "0")
    assert result.exit_code == 2
    assert f"Invalid value for '{flag}'" in result.stderr


def test_a_step_model_of_bytes_alone_needs_no_operations() -> None:
    bytes_alone = {
        name: value for name, value in STEP_MODEL.to_dict().items() if name not in ("f", "flops")
    }
    request = models_pb2.PlanCapacityRequest(mix=[SHAPE], step_model=bytes_alone)
    answer = codec.planning_call(request, llama(), EngineConfig(), 10**6).answer()
    assert answer.plan.prediction.fitted
    assert answer.plan.prediction.arithmetic_seconds == 0
