"""The decorators: errors become a status, cancellation stays cancellation, streams are closed."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
import structlog
from google.rpc import status_pb2
from grpc import StatusCode as Code
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckResponse
from prometheus_client import CollectorRegistry

from service.auth.gate import Gate
from service.engine.errors import QueueFullError
from service.errors import DETAILS_KEY
from service.metrics.rpc import RpcMetrics
from service.rpc import Rpc, server_stream, unary
from service.tracing import Tracing


class _Context:
    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.metadata: dict[str, bytes] = {}

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        return None

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, bytes]]) -> None:
        self.metadata = dict(trailing_metadata)


class _Methods:
    closed = False

    def __init__(self) -> None:
        self.rpc_metrics = RpcMetrics([health_pb2.DESCRIPTOR.services_by_name["Health"]])
        self.gate: Gate | None = None
        self.tracing: Tracing | None = None
        self.log = structlog.get_logger()

    @unary(HealthCheckResponse)
    async def Check(self, request: Exception | None, rpc: Rpc) -> HealthCheckResponse:  # noqa: N802
        if request is not None:
            raise request
        return HealthCheckResponse(status=1)

    @server_stream
    async def Watch(self, request: BaseException, rpc: Rpc) -> AsyncIterator[int]:  # noqa: N802
        try:
            yield 1
            raise request
        finally:
            self.closed = True


async def test_a_result_passes_through() -> None:
    context = _Context()
    assert (await _Methods().Check(None, context)).status == 1
    assert context.code is None


async def test_an_error_becomes_code_details_and_metadata() -> None:
    error = QueueFullError(unit="requests", limit=1)
    for_unary, for_stream = _Context(), _Context()
    assert await _Methods().Check(error, for_unary) == HealthCheckResponse()
    assert [item async for item in _Methods().Watch(error, for_stream)] == [1]
    for context in (for_unary, for_stream):
        assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert context.details == str(error)
        status = status_pb2.Status.FromString(context.metadata[DETAILS_KEY])
        assert status.code == context.code.value[0]


async def test_cancellation_is_not_an_error_of_ours() -> None:
    context = _Context()
    with pytest.raises(asyncio.CancelledError):
        _ = [item async for item in _Methods().Watch(asyncio.CancelledError(), context)]
    assert context.code is None


async def test_a_stream_that_is_left_is_closed_at_once() -> None:
    methods = _Methods()
    stream = methods.Watch(ValueError(), _Context())
    async for _ in stream:
        break
    assert not methods.closed
    await stream.aclose()  # type: ignore[attr-defined]
    assert methods.closed


async def test_rpcs_are_counted_with_the_code_they_end_with() -> None:
    registry = CollectorRegistry()
    methods = _Methods()
    registry.register(methods.rpc_metrics)

    def counted(name: str, method: str, **labels: str) -> float | None:
        kind = {"Check": "unary", "Watch": "server_stream"}[method]
        labels |= {"grpc_service": "grpc.health.v1.Health", "grpc_type": kind}
        return registry.get_sample_value(f"grpc_server_{name}", {"grpc_method": method, **labels})

    def handled(method: str) -> dict[str, float]:
        codes = {code.name: counted("handled_total", method, grpc_code=code.name) for code in Code}
        return {name: count for name, count in codes.items() if count}

    assert handled("Check") == handled("Watch") == {}
    await methods.Check(None, _Context())
    await methods.Check(QueueFullError(unit="requests", limit=1), _Context())
    await methods.Check(KeyError(), _Context())
    assert handled("Check") == {"OK": 1, "RESOURCE_EXHAUSTED": 1, "INTERNAL": 1}
    assert counted("msg_sent_total", "Check") == 1, "an error is no message"
    stream = methods.Watch(ValueError(), _Context())
    async for _ in stream:
        assert counted("msg_sent_total", "Watch") == 1, "before the client has it"
        assert counted("started_total", "Watch") == 1
        assert handled("Watch") == {}
        break
    await stream.aclose()  # type: ignore[attr-defined]
    assert handled("Watch") == {"CANCELLED": 1}
    with pytest.raises(asyncio.CancelledError):
        _ = [item async for item in methods.Watch(asyncio.CancelledError(), _Context())]
    assert handled("Watch") == {"CANCELLED": 2}
    assert counted("handling_seconds_count", "Watch") == 2
    refused = registry.get_sample_value(
        "headroom_requests_rejected_total", {"reason": "queue_full"}
    )
    assert refused == 1
