"""Turns what an RPC method raises into a status: one place, for unary and streaming methods.

Code, details and trailing metadata are set on the context and the method then *returns*: under
Ray Serve a raised exception would lose the metadata and show its text, and a plain grpc.aio
server treats the returning method just the same.
"""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc

from service.errors import DETAILS_KEY, to_status

S = TypeVar("S")
Req = TypeVar("Req")
Res = TypeVar("Res")


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
            try:
                return await method(self, request, grpc_context)
            except Exception as error:
                _set_status(grpc_context, error)
                return response_type()

        return wrapper

    return decorate


def server_stream(
    method: Callable[[S, Req, RpcContext], AsyncIterator[Res]],
) -> Callable[[S, Req, RpcContext], AsyncIterator[Res]]:
    """Decorate a server-streaming method, which must be an async generator."""

    @functools.wraps(method)
    async def wrapper(self: S, request: Req, grpc_context: RpcContext) -> AsyncIterator[Res]:
        stream: Any = method(self, request, grpc_context)
        try:
            async with aclosing(stream):
                async for response in stream:
                    yield response
        except Exception as error:
            _set_status(grpc_context, error)

    return wrapper


def _set_status(grpc_context: RpcContext, error: Exception) -> None:
    code, status = to_status(error)
    grpc_context.set_code(code)
    grpc_context.set_details(status.message)
    grpc_context.set_trailing_metadata([(DETAILS_KEY, status.SerializeToString())])
