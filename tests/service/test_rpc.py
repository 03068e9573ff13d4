"""The decorators: errors become a status, cancellation stays cancellation, streams are closed."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1.health_pb2 import HealthCheckResponse

from service.engine.errors import QueueFullError
from service.errors import DETAILS_KEY
from service.rpc import RpcContext, server_stream, unary


class _Context:
    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.metadata: dict[str, bytes] = {}

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, bytes]]) -> None:
        self.metadata = dict(trailing_metadata)


class _Methods:
    closed = False

    @unary(HealthCheckResponse)
    async def One(self, request: Exception | None, context: RpcContext) -> HealthCheckResponse:  # noqa: N802
        if request is not None:
            raise request
        return HealthCheckResponse(status=1)

    @server_stream
    async def Many(self, request: BaseException, context: RpcContext) -> AsyncIterator[int]:  # noqa: N802
        try:
            yield 1
            raise request
        finally:
            self.closed = True


async def test_a_result_passes_through() -> None:
    context = _Context()
    assert (await _Methods().One(None, context)).status == 1
    assert context.code is None


async def test_an_error_becomes_code_details_and_metadata() -> None:
    error = QueueFullError(unit="requests", limit=1)
    for_unary, for_stream = _Context(), _Context()
    assert await _Methods().One(error, for_unary) == HealthCheckResponse()
    assert [item async for item in _Methods().Many(error, for_stream)] == [1]
    for context in (for_unary, for_stream):
        assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert context.details == str(error)
        status = status_pb2.Status.FromString(context.metadata[DETAILS_KEY])
        assert status.code == context.code.value[0]


async def test_cancellation_is_not_an_error_of_ours() -> None:
    context = _Context()
    with pytest.raises(asyncio.CancelledError):
        _ = [item async for item in _Methods().Many(asyncio.CancelledError(), context)]
    assert context.code is None


async def test_a_stream_that_is_left_is_closed_at_once() -> None:
    methods = _Methods()
    stream = methods.Many(ValueError(), _Context())
    async for _ in stream:
        break
    assert not methods.closed
    await stream.aclose()  # type: ignore[attr-defined]
    assert methods.closed
