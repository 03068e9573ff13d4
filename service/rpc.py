"""Counts RPCs and turns what their methods raise into a status: one place for all methods.

Code, details and trailing metadata are set on the context and the method then *returns*: under
Ray Serve a raised exception would lose the metadata and show its text, and a plain grpc.aio
server treats the returning method just the same.
"""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc

from service.errors import DETAILS_KEY, refusal_reason, to_status
from service.metrics.rpc import RpcCall, RpcMetrics

Req = TypeVar("Req")
Res = TypeVar("Res")


class Measured(Protocol):
    """A servicer whose RPCs are counted."""

    rpc_metrics: RpcMetrics


S = TypeVar("S", bound=Measured)


class RpcContext(Protocol):
    """What grpc.aio's context and Ray Serve's have in common and we use."""

    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, bytes]]) -> None: ...


def unary(
    response_type: Callable[[], Res],
) -> Callable[
    [Callable[[S, Req, RpcContext], Awaitable[Res]]],
    Callable[[S, Req, RpcContext], Awaitable[Res]],
]:
    """Decorate a unary method; after an error an empty response goes with the status."""

    def decorate(
        method: Callable[[S, Req, RpcContext], Awaitable[Res]],
    ) -> Callable[[S, Req, RpcContext], Awaitable[Res]]:
        @functools.wraps(method)
        async def wrapper(self: S, request: Req, grpc_context: RpcContext) -> Res:
            with self.rpc_metrics.call(method.__name__) as call:
                try:
                    response = await method(self, request, grpc_context)
                except Exception as error:
                    _set_status(grpc_context, call, error)
                    return response_type()
                call.sends()
                call.code = grpc.StatusCode.OK
                return response

        return wrapper

    return decorate


def server_stream(
    method: Callable[[S, Req, RpcContext], AsyncIterator[Res]],
) -> Callable[[S, Req, RpcContext], AsyncIterator[Res]]:
    """Decorate a server-streaming method, which must be an async generator."""

    @functools.wraps(method)
    async def wrapper(self: S, request: Req, grpc_context: RpcContext) -> AsyncIterator[Res]:
        stream: Any = method(self, request, grpc_context)
        with self.rpc_metrics.call(method.__name__) as call:
            try:
                async with aclosing(stream):
                    async for response in stream:
                        call.sends()
                        yield response
                call.code = grpc.StatusCode.OK
            except Exception as error:
                _set_status(grpc_context, call, error)

    return wrapper


def _set_status(grpc_context: RpcContext, call: RpcCall, error: Exception) -> None:
    call.code, status = to_status(error)
    reason = refusal_reason(error)
    if reason is not None:
        call.refused(reason)
    grpc_context.set_code(call.code)
    grpc_context.set_details(status.message)
    grpc_context.set_trailing_metadata([(DETAILS_KEY, status.SerializeToString())])
