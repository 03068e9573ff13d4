"""No RPC of any service without a token that allows it; limits by token."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from protos.headroom.v1 import attention_pb2, generation_pb2, models_pb2
from service.auth.gate import Gate
from service.auth.tokens import TokenEntry, digest_of
from service.errors import ScopeMissingError, TokenBusyError, TokenRateError
from tests.serving import RunningServer, running_server

SCOPES = {
    "everything": ["generate", "inspect", "admin"],
    "admin": ["admin"],
    "generate": ["generate"],
    "inspect": ["inspect"],
    "nothing": [],
}
_ENTRIES: list[dict[str, Any]] = [
    *({"name": n, "sha256": digest_of(f"t-{n}"), "scopes": s} for n, s in SCOPES.items()),
    {
        "name": "expired",
        "sha256": digest_of("t-expired"),
        "scopes": ["admin"],
        "expires": "2020-01-01T00:00:00Z",
    },
]
METHODS = [
    method
    for file in (generation_pb2, attention_pb2, models_pb2, health_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.fixture
async def guarded(model_path: Path, tmp_path: Path) -> AsyncIterator[RunningServer]:
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump(_ENTRIES))
    async with running_server(model_path, tokens=path) as server:
        yield server


async def outcome(
    channel: grpc.aio.Channel, method: MethodDescriptor, metadata: list[tuple[str, str]]
) -> tuple[grpc.StatusCode, str]:
    """Code and reason of an empty request, of which the first message is waited for."""
    service: Any = method.containing_service
    path = f"/{service.full_name}/{method.name}"
    request = GetMessageClass(method.input_type)()
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    call: Any = kind(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=bytes,
    )(request, metadata=metadata)
    try:
        await (anext(aiter(call), None) if method.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        info = error_details_pb2.ErrorInfo()
        reasons = [info.reason for one in (status.details if status else ()) if one.Unpack(info)]
        return error.code(), reasons[0] if reasons else ""
    finally:
        call.cancel()
    return grpc.StatusCode.OK, ""


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


async def test_no_method_of_any_service_answers_without_a_token(guarded: RunningServer) -> None:
    """Enumerated from the descriptors, so that a method that is added is among them."""
    wrong = {
        "TOKEN_MISSING": [
            [],
            [("authorization", "t-everything")],
            [("authorization", "Basic t-everything")],
            [*bearer("t-everything"), *bearer("t-everything")],
        ],
        "TOKEN_UNKNOWN": [bearer("t-nobody"), bearer(""), bearer(digest_of("t-everything"))],
        "TOKEN_EXPIRED": [bearer("t-expired")],
    }
    assert len(METHODS) >= 13
    for method in METHODS:
        for reason, several in wrong.items():
            for metadata in several:
                code, said = await outcome(guarded.channel, method, metadata)
                assert (code, said) == (grpc.StatusCode.UNAUTHENTICATED, reason), method.full_name
        for token in ("t-everything", "t-admin"):
            code, said = await outcome(guarded.channel, method, bearer(token))
            assert code not in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
            ), method.full_name


async def test_a_scope_allows_its_service_and_no_other(guarded: RunningServer) -> None:
    for method in METHODS:
        service: Any = method.containing_service
        allowed = {
            "GenerationService": {"generate"},
            "AttentionService": {"inspect"},
            "ModelService": {"generate", "inspect", "nothing"},
            "Health": {"generate", "inspect", "nothing"},
        }[service.name]
        for name in ("generate", "inspect", "nothing"):
            code, reason = await outcome(guarded.channel, method, bearer(f"t-{name}"))
            denied = (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
            assert denied == (name not in allowed), f"{method.full_name} for {name}"


class Tokens:
    is_current = True

    def __init__(self, **limits: int) -> None:
        self.entry = TokenEntry(name="a", sha256="0" * 64, scopes=("generate",), **limits)

    def find(self, token: str) -> TokenEntry:
        return self.entry


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


GENERATE = "headroom.v1.GenerationService/Generate"


@pytest.mark.parametrize(
    "method", ["headroom.v2.NewService/Do", "headroom.v1.ModelService/Replace", "GetModel", ""]
)
def test_a_method_that_nobody_thought_of_is_closed(method: str) -> None:
    gate = Gate(Tokens())
    with (
        pytest.raises(ScopeMissingError, match="one of the scopes none"),
        gate.admit(method, bearer("x")),
    ):
        pytest.fail("admitted")


def test_so_many_calls_are_open_at_once_and_no_more() -> None:
    gate = Gate(Tokens(max_concurrent=2))
    with gate.admit(GENERATE, bearer("x")), gate.admit(GENERATE, bearer("x")):
        with (
            pytest.raises(TokenBusyError, match="at most 2 at once"),
            gate.admit(GENERATE, bearer("x")),
        ):
            pytest.fail("admitted")
        with gate.admit("grpc.health.v1.Health/Check", bearer("x")):
            pass  # is nobody's load
    with pytest.raises(KeyError), gate.admit(GENERATE, bearer("x")):
        raise KeyError
    with gate.admit(GENERATE, bearer("x")), gate.admit(GENERATE, bearer("x")):
        pass


def test_an_allowance_fills_up_again() -> None:
    clock = Clock()
    tokens = Tokens(tokens_per_minute=60)
    gate = Gate(tokens, clock=clock)

    def use(num_tokens: int) -> None:
        with gate.admit(GENERATE, bearer("x")) as caller:
            caller.computed(num_tokens)

    use(59)
    use(100)  # one is left; what it takes is known at its end
    with pytest.raises(TokenRateError) as caught:
        use(1)
    assert caught.value.retry_after == pytest.approx(100)
    clock.now += 99.0
    with pytest.raises(TokenRateError):
        use(1)
    clock.now += 1.5
    use(1)
    clock.now += 10_000
    use(60)  # no more than one minute's is saved up
    with pytest.raises(TokenRateError):
        use(1)
    tokens.entry = tokens.entry.model_copy(update={"tokens_per_minute": None})
    use(10**9)
    use(1)


async def test_limits_reach_the_caller_with_a_time_to_try_again(
    model_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.yaml"
    limited = {"name": "a", "sha256": digest_of("t"), "scopes": ["generate"]}
    path.write_text(yaml.safe_dump([limited | {"tokens_per_minute": 6}]))
    sampling = generation_pb2.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompt = generation_pb2.TokenIds(ids=[5, 6])
    request = generation_pb2.CompleteRequest(token_ids=prompt, sampling=sampling)
    async with running_server(model_path, tokens=path) as server:
        await server.generation.Complete(request, metadata=bearer("t"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.generation.Complete(request, metadata=bearer("t"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    retry = error_details_pb2.RetryInfo()
    assert any(one.Unpack(retry) for one in status.details)
    # Ten of six were used, and one has to be left: five, at one every ten seconds.
    assert 45 < retry.retry_delay.ToMilliseconds() / 1000 <= 50


async def test_who_hangs_up_has_had_its_tokens(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    limited = {"name": "a", "sha256": digest_of("t"), "scopes": ["generate"]}
    path.write_text(yaml.safe_dump([limited | {"tokens_per_minute": 30}]))
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[5] * 30),
        sampling=generation_pb2.SamplingParams(max_tokens=90, ignore_eos=True),
    )
    async with running_server(model_path, tokens=path) as server:
        call = server.generation.Generate(request, metadata=bearer("t"))
        await anext(aiter(call))
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(server.generation.Generate(request, metadata=bearer("t"))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_what_was_refused_costs_nothing(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    limited = {"name": "a", "sha256": digest_of("t"), "scopes": ["generate"]}
    path.write_text(yaml.safe_dump([limited | {"tokens_per_minute": 120}]))
    sampling = generation_pb2.SamplingParams(max_tokens=1)
    request = generation_pb2.CompleteRequest(
        token_ids=generation_pb2.TokenIds(ids=[5] * 100), sampling=sampling
    )
    async with running_server(model_path, tokens=path) as server:
        await server.engine.drain(0)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.Complete(request, metadata=bearer("t"))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_callers_name_their_requests_without_regard_to_others(
    guarded: RunningServer,
) -> None:
    request = generation_pb2.GenerateRequest(
        request_id="mine",
        token_ids=generation_pb2.TokenIds(ids=[5]),
        sampling=generation_pb2.SamplingParams(max_tokens=90, ignore_eos=True),
    )
    calls = [
        guarded.generation.Generate(request, metadata=bearer(token))
        for token in ("t-generate", "t-admin")
    ]
    for call in calls:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(guarded.generation.Generate(request, metadata=bearer("t-admin"))))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    for call in calls:
        call.cancel()


async def test_metrics_tell_of_a_token_file_that_cannot_be_used(
    guarded: RunningServer, tmp_path: Path
) -> None:
    def is_current() -> float | None:
        labels = {"model": "tiny-gqa", "head_config": "h4kv2d16"}
        return guarded.registry.get_sample_value("headroom_token_file_current", labels)

    assert is_current() == 1
    (tmp_path / "tokens.yaml").write_text("- {broken")
    async with asyncio.timeout(10):
        while is_current() == 1:
            answer = await outcome(guarded.channel, METHODS[0], bearer("t-admin"))
            assert answer[1] == "INVALID_REQUEST"
