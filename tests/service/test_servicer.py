"""Every RPC over a real channel: what it answers, what it refuses, and what it leaves behind."""

import asyncio
import contextlib
import json
import math
import random
import shutil
import threading
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from models import load_model
from models.cpu.library import why_unavailable
from protos.headroom.v1 import generation_pb2 as pb
from protos.headroom.v1 import generation_pb2_grpc, models_pb2
from service.client import to_error
from service.engine import Engine, EngineConfig, SamplingParams
from service.engine.sequence import SequenceOutput
from service.servicer import HEALTH_SERVICES
from tests.bad_requests import BAD_REQUESTS
from tests.checkpoints import VOCAB_SIZE, headroom_byte_tokenizer
from tests.serving import RunningServer, running_server

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


def _request(prompt: list[int], **sampling: Any) -> pb.GenerateRequest:
    settings = pb.SamplingParams(**{"temperature": 0, "ignore_eos": True, **sampling})
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=settings)


def _complete(request: pb.GenerateRequest) -> pb.CompleteRequest:
    return pb.CompleteRequest.FromString(request.SerializeToString())


async def _collect(call: Any) -> tuple[list[int], str, pb.Finished]:
    token_ids: list[int] = []
    text = ""
    finished: list[pb.Finished] = []
    async for response in call:
        assert not finished, "a message after the last"
        if response.HasField("finished"):
            finished.append(response.finished)
        else:
            token_ids.extend(response.delta.token_ids)
            text += response.delta.text
    assert len(finished) == 1, "exactly one ending"
    return token_ids, text, finished[0]


async def test_generate_streams_the_engines_tokens(server: RunningServer, model_path: Path) -> None:
    prompt = [5, 17, 250, 3]
    token_ids, text, finished = await _collect(
        server.generation.Generate(_request(prompt, max_tokens=20))
    )
    engine = Engine.from_checkpoint(model_path, EngineConfig())
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    assert token_ids == engine.generate([prompt], params)[0].token_ids
    assert text == headroom_byte_tokenizer().decode(token_ids)
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (4, 20)
    timings = finished.timings
    parts = timings.queue.ToNanoseconds() + timings.prefill.ToNanoseconds()
    assert abs(parts - timings.first_token.ToNanoseconds()) <= 2
    assert 0 < timings.first_token.ToNanoseconds() <= timings.total.ToNanoseconds()


async def test_complete_answers_as_generate_does(server: RunningServer) -> None:
    request = _request([9, 8, 7], max_tokens=12, logprobs=2)
    token_ids, text, finished = await _collect(server.generation.Generate(request))
    answer = await server.generation.Complete(_complete(request))
    assert (list(answer.token_ids), answer.text) == (token_ids, text)
    assert answer.finished.usage == finished.usage
    assert len(answer.logprobs) == 12
    for chosen, logprobs in zip(answer.token_ids, answer.logprobs, strict=True):
        assert logprobs.top[0].token_id == chosen, "greedy takes the most likely"
        assert logprobs.top[0].logprob == logprobs.logprob >= logprobs.top[1].logprob


async def test_text_prompt_equals_its_token_ids(server: RunningServer) -> None:
    tokenized = await server.generation.Tokenize(pb.TokenizeRequest(text="def f():"))
    ids = list(tokenized.token_ids)
    assert ids == headroom_byte_tokenizer().encode("def f():")
    assert len(tokenized.tokens) == len(ids)
    by_ids = await server.generation.Complete(_complete(_request(ids, max_tokens=8)))
    sampling = pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
    by_text = await server.generation.Complete(
        pb.CompleteRequest(text="def f():", sampling=sampling)
    )
    assert by_text.token_ids == by_ids.token_ids
    back = await server.generation.Detokenize(pb.DetokenizeRequest(token_ids=ids))
    assert back.text == "def f():"


async def test_detokenize_shows_special_tokens_only_if_asked(server: RunningServer) -> None:
    request = pb.DetokenizeRequest(token_ids=[256, 65])
    hidden = await server.generation.Detokenize(request)
    request.skip_special_tokens = False
    shown = await server.generation.Detokenize(request)
    assert shown.text == "<bos>" + hidden.text


async def test_score_is_the_models_log_probability(server: RunningServer, model_path: Path) -> None:
    text = "for x in range(10):"
    answer = await server.generation.Score(pb.ScoreRequest(text=text))
    ids = torch.tensor([list(answer.token_ids)])
    expected = load_model(model_path).logits(ids)[0].log_softmax(-1)
    chosen = expected[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(answer.logprobs), chosen, rtol=0, atol=1e-5)
    assert math.isclose(answer.total_logprob, sum(answer.logprobs), rel_tol=1e-6)
    assert answer.num_bytes == len(text) - 1, "the first token has no score"


async def test_get_model_describes_heads_and_cache(server: RunningServer) -> None:
    model = await server.models.GetModel(models_pb2.GetModelRequest())
    assert (model.name, model.family, model.num_layers) == ("tiny-gqa", "llama", 2)
    assert [(h.num_heads, h.num_kv_heads, h.head_dim) for h in model.layers] == [(4, 2, 16)] * 2
    assert not model.layers[0].HasField("window")
    assert (model.layers[0].rope_theta, model.layers[0].scale) == (10_000.0, 0.25)
    assert (model.is_causal, model.hidden_size) == (True, 64)
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert (model.vocab_size, model.max_model_len) == (VOCAB_SIZE, 128)
    kernel = "dense" if why_unavailable() else "paged_cpu"
    assert (model.dtype, model.device, model.backend) == ("float32", "cpu", kernel)
    assert (model.weight_dtype, model.kv_cache_dtype) == ("auto", "auto")
    load = await server.load()
    assert load.kv_blocks_total == model.kv_blocks_total > 0


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_wrong_field_is_named_and_harms_nobody(server: RunningServer, name: str) -> None:
    request, field, allowed = BAD_REQUESTS[name]
    probe = _complete(_request([1, 2, 3], max_tokens=5))
    before = await server.generation.Complete(probe)
    for call in (
        server.generation.Complete(_complete(request)),
        _collect(server.generation.Generate(request)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = to_error(caught.value)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.reason == "INVALID_REQUEST"
        assert field in error.violations
        assert allowed in error.violations[field].split("allowed: ")[1]
    await server.until_idle()
    assert (await server.generation.Complete(probe)).token_ids == before.token_ids


async def test_all_wrong_fields_are_named_at_once(server: RunningServer) -> None:
    request = pb.CompleteRequest(
        priority=1000,
        sampling=pb.SamplingParams(temperature=-1, top_p=2, max_tokens=0, stop=[""]),
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.generation.Complete(request)
    assert set(to_error(caught.value).violations) == {
        "prompt",
        "priority",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.max_tokens",
        "sampling.stop[0]",
    }


async def test_setting_both_prompt_forms_keeps_the_last() -> None:
    request = pb.GenerateRequest(text="a")
    request.token_ids.ids.append(1)
    assert request.WhichOneof("prompt") == "token_ids", "protobuf cannot say both"


async def test_score_refuses_what_has_no_second_token(server: RunningServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.generation.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=[1])))
    assert "input" in to_error(caught.value).violations


async def test_oversize_message_and_unknown_method_are_refused(server: RunningServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.generation.Complete(pb.CompleteRequest(text="x" * 2**21))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    unknown = server.channel.unary_unary("/headroom.v1.GenerationService/Nothing", bytes, bytes)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unknown(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_second_open_request_of_the_same_id_is_refused(server: RunningServer) -> None:
    request = _request([1], max_tokens=100)
    request.request_id = "mine"
    first = server.generation.Generate(request)
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _collect(server.generation.Generate(request))
    error = to_error(caught.value)
    assert (error.code, error.reason) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "DUPLICATE_REQUEST_ID",
    )
    while not (await first.read()).HasField("finished"):
        pass
    await server.until_idle()
    assert (await _collect(server.generation.Generate(request)))[2].usage.completion_tokens == 100


async def test_stop_string_ends_the_text_before_it(server: RunningServer) -> None:
    _, text, _ = await _collect(server.generation.Generate(_request([1, 2, 3], max_tokens=40)))
    stop = text[10:12]
    start = text.index(stop)
    _, stopped, finished = await _collect(
        server.generation.Generate(_request([1, 2, 3], max_tokens=40, stop=[stop]))
    )
    assert stopped == text[:start]
    assert finished.reason == pb.FINISH_REASON_STOP
    assert finished.matched_stop == stop


async def test_stop_token_is_returned_and_named(server: RunningServer) -> None:
    token_ids, _, _ = await _collect(server.generation.Generate(_request([4], max_tokens=30)))
    stop = token_ids[7]
    stopped, _, finished = await _collect(
        server.generation.Generate(_request([4], max_tokens=30, stop_token_ids=[stop]))
    )
    assert stopped == token_ids[: token_ids.index(stop) + 1]
    assert finished.matched_stop_token_id == stop
    assert not finished.HasField("matched_stop")


async def test_unset_max_tokens_fills_the_context(server: RunningServer) -> None:
    token_ids, _, finished = await _collect(server.generation.Generate(_request([1] * 100)))
    assert len(token_ids) == 28
    assert finished.reason == pb.FINISH_REASON_CONTEXT_FULL


async def test_same_seed_same_tokens(server: RunningServer) -> None:
    sampled = _complete(_request([1, 2], max_tokens=24, temperature=1.0, seed=7))
    first = await server.generation.Complete(sampled)
    second = await server.generation.Complete(sampled)
    assert first.token_ids == second.token_ids
    sampled.sampling.seed = 8
    assert (await server.generation.Complete(sampled)).token_ids != first.token_ids


async def test_queue_full_says_when_to_try_again(model_path: Path) -> None:
    async with running_server(
        model_path, max_num_seqs=1, max_num_batched_tokens=16, max_waiting_requests=1
    ) as server:
        running = server.generation.Generate(_request([1], max_tokens=120))
        await running.read()
        waiting = server.generation.Generate(_request([2], max_tokens=1))
        await server.until(lambda load: load.num_waiting == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _collect(server.generation.Generate(_request([3], max_tokens=1)))
        error = to_error(caught.value)
        assert (error.code, error.reason, error.retry_after) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            1.0,
        )
        running.cancel()
        assert (await _collect(waiting))[2].reason == pb.FINISH_REASON_LENGTH
        await server.until_idle()


async def test_what_can_never_fit_is_refused_at_once(model_path: Path) -> None:
    async with running_server(model_path, num_blocks=2) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _collect(server.generation.Generate(_request([1] * 10, max_tokens=24)))
        error = to_error(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NEVER_FITS")
        token_ids, _, _ = await _collect(
            server.generation.Generate(_request([1] * 10, max_tokens=23))
        )
        assert len(token_ids) == 23, "exactly the whole cache"


async def test_timeout_in_the_queue_is_a_status_and_in_decode_an_ending(model_path: Path) -> None:
    async with running_server(model_path, max_num_seqs=1, max_num_batched_tokens=16) as server:
        timed = _request([1])
        timed.timeout.CopyFrom(Duration(nanos=20_000_000))
        running = server.generation.Generate(_request([1], max_tokens=120))
        await running.read()
        queued = _request([2], max_tokens=5)
        queued.timeout.CopyFrom(Duration(nanos=1_000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _collect(server.generation.Generate(queued))
        error = to_error(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE")
        running.cancel()
        await server.until_idle()
        token_ids, _, finished = await _collect(server.generation.Generate(timed))
        assert finished.reason == pb.FINISH_REASON_DEADLINE
        assert 0 < len(token_ids) == finished.usage.completion_tokens < 127
        await server.until_idle()


class _GatedSteps:
    """Lets the engine take one step per permit, so that a test can stop it at any stage."""

    def __init__(self, server: RunningServer) -> None:
        self.num_taken = 0
        self._permits = threading.Semaphore(0)
        self._step = server.engine.engine.step
        server.engine.engine.step = self._gated  # type: ignore[method-assign]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.allow(10_000)  # a failed test must not leave a blocked thread

    def allow(self, count: int) -> None:
        self._permits.release(count)

    def _gated(self) -> list[SequenceOutput]:
        self._permits.acquire()
        self.num_taken += 1
        return self._step()


async def test_timeout_in_prefill_is_a_status(model_path: Path) -> None:
    async with running_server(model_path, max_num_seqs=1, max_num_batched_tokens=1) as server:
        request = _request([1] * 126, max_tokens=1)
        request.timeout.CopyFrom(Duration(nanos=5_000_000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _collect(server.generation.Generate(request))
        assert to_error(caught.value).reason == "DEADLINE"
        await server.until_idle()


async def test_detokenize_and_tokenize_name_what_is_wrong(server: RunningServer) -> None:
    for call, field in (
        (server.generation.Detokenize(pb.DetokenizeRequest(token_ids=[1, 9999])), "token_ids[1]"),
        (server.generation.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 129)), "token_ids"),
        (server.generation.Tokenize(pb.TokenizeRequest(text="x" * 9999)), "text"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert list(to_error(caught.value).violations) == [field]
    empty = await server.generation.Detokenize(pb.DetokenizeRequest())
    assert empty.text == ""


async def test_score_counts_the_bytes_of_scored_tokens_only(server: RunningServer) -> None:
    # Without <bos> the first byte of the first character is not scored.
    answer = await server.generation.Score(pb.ScoreRequest(text="日本"))
    assert (len(answer.token_ids), answer.num_bytes) == (6, 5)


@pytest.mark.parametrize("stage", ["queued", "prefill", "decode", "last token"])
@pytest.mark.parametrize("how", ["cancel", "client deadline", "disconnect"])
async def test_a_client_that_leaves_frees_its_blocks_within_a_step(
    model_path: Path, stage: str, how: str
) -> None:
    async with (
        running_server(model_path, max_num_seqs=1, max_num_batched_tokens=1) as server,
        asyncio.timeout(30),
    ):
        with _GatedSteps(server) as steps:
            await _leave(server, steps, stage, how)


async def _leave(server: RunningServer, steps: _GatedSteps, stage: str, how: str) -> None:
    if stage == "queued":
        other = server.generation.Generate(_request([7], max_tokens=120))
        steps.allow(1)
        await other.read()
    num_prompt, max_tokens = {"prefill": (120, 1), "last token": (1, 1)}.get(stage, (1, 120))
    channel = grpc.aio.insecure_channel(server.target)
    call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
        _request([1] * num_prompt, max_tokens=max_tokens),
        timeout=1.0 if how == "client deadline" else None,
    )
    match stage:
        case "queued":

            def is_waiting(load: models_pb2.GetLoadResponse) -> bool:
                steps.allow(1)  # commands are applied between steps
                return load.num_waiting == 1

            await server.until(is_waiting)
        case "prefill":
            steps.allow(3)
            await server.until(lambda load: load.num_running == 1)
        case _:
            steps.allow(1)
            await call.read()
    if how == "cancel":
        call.cancel()
    elif how == "disconnect":
        await channel.close(None)
    else:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not _EOF:
                pass
    if stage == "queued":
        other.cancel()
    await server.engine._idle.wait()  # the server has noticed
    taken = steps.num_taken
    steps.allow(1)
    await server.until_idle()
    assert steps.num_taken - taken <= 1
    await channel.close(None)


async def test_64_streams_of_different_lengths_all_finish(server: RunningServer) -> None:
    rng = random.Random(1)
    lengths = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(64)]
    answers = await asyncio.gather(
        *(
            _collect(
                server.generation.Generate(
                    _request([rng.randrange(VOCAB_SIZE) for _ in range(prompt)], max_tokens=output)
                )
            )
            for prompt, output in lengths
        )
    )
    for (prompt, output), (token_ids, _, finished) in zip(lengths, answers, strict=True):
        assert finished.reason == pb.FINISH_REASON_LENGTH
        assert len(token_ids) == finished.usage.completion_tokens == output
        assert finished.usage.prompt_tokens == prompt
    await server.until_idle()


async def test_health_follows_the_engine(server: RunningServer) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in HEALTH_SERVICES:
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == serving
    listed = await health.List(health_pb2.HealthListRequest())
    assert {status.status for status in listed.statuses.values()} == {serving}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == serving
    unknown = health.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert await server.engine.drain(seconds=10)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await watch.read() is _EOF
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.generation.Complete(_complete(_request([1], max_tokens=1)))
    error = to_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_a_dead_engine_is_not_healthy(server: RunningServer) -> None:
    await server.engine.shutdown()
    health = health_pb2_grpc.HealthStub(server.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_eos_from_generation_config_ends(model_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(model_path, tmp_path / "with-eos"))
    async with running_server(model_path) as server:
        token_ids, _, _ = await _collect(server.generation.Generate(_request([3], max_tokens=20)))
    eos = token_ids[5]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
    async with running_server(path) as server:
        ended, _, finished = await _collect(
            server.generation.Generate(_request([3], max_tokens=20, ignore_eos=False))
        )
    assert ended == token_ids[: token_ids.index(eos) + 1]
    assert finished.reason == pb.FINISH_REASON_EOS
