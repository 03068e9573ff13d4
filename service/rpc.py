"""What is done for every RPC: its caller is admitted, it is counted, traced and logged, and what
its method raises becomes a status. One place for all methods.

Code, details and trailing metadata are set on the context and the method then *returns*: under
Ray Serve a raised exception would lose the metadata and show its text, and a plain grpc.aio
server treats the returning method just the same.
"""

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
import structlog

from service.auth.gate import Caller, Gate
from service.engine.sequence import Finish
from service.errors import DETAILS_KEY, TokenError, reason_of, refusal_reason, to_status
from service.metrics.rpc import RpcCall, RpcMetrics

if TYPE_CHECKING:
    from service.tracing import RpcSpan, Tracing

Req = TypeVar("Req")
Res = TypeVar("Res")


class Observed(Protocol):
    """A servicer whose RPCs are counted, logged and, if that is wanted, guarded and traced."""

    rpc_metrics: RpcMetrics
    gate: Gate | None
    tracing: "Tracing | None"
    log: structlog.stdlib.BoundLogger


S = TypeVar("S", bound=Observed)


class RpcContext(Protocol):
    """What grpc.aio's context and Ray Serve's have in common and we use."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, bytes]]) -> None: ...


class Rpc:
    """An open RPC, as its method sees it.

    Attributes:
        facts: what the log says of it; never a word of prompts or answers.
    """

    def __init__(
        self,
        grpc_context: RpcContext,
        metadata: Sequence[tuple[str, str | bytes]],
        call: RpcCall,
        span: "RpcSpan | None",
    ) -> None:
        self.facts: dict[str, str | int] = {}
        self._grpc_context = grpc_context
        self._metadata = metadata
        self._call = call
        self._span = span
        self._caller: Caller | None = None
        self._num_tokens = 0

    @property
    def caller(self) -> str:
        """The owner of the token; empty where no tokens are needed."""
        return "" if self._caller is None else self._caller.name

    @contextmanager
    def admitted(self, gate: Gate | None) -> Iterator[None]:
        """While the method runs.

        Raises:
            TokenError: its caller may not call it, or not now.
        """
        if gate is None:
            yield
            return
        with gate.admit(self._call.method, self._metadata) as self._caller:
            self.facts["token"] = self.caller
            yield

    def concerns(self, request_id: str) -> None:
        """Say which request it is about."""
        self.facts["request_id"] = request_id
        if self._span is not None:
            self._span.concerns(request_id)

    def finished(self, finish: Finish) -> None:
        """Say how the engine's part of it ended."""
        self.facts |= {
            "finish_reason": finish.reason.name.lower(),
            "prompt_tokens": finish.usage.prompt_tokens,
            "completion_tokens": finish.usage.completion_tokens,
        }
        if self._span is not None:
            self._span.finished(finish)

    def computed(self, num_tokens: int) -> None:
        """Charge its caller for tokens of prompts and answers."""
        self._num_tokens += num_tokens
        if self._caller is not None:
            self._caller.computed(num_tokens)

    def sends(self) -> None:
        """Count a message that is about to go to the client."""
        self._call.sends()

    def succeed(self) -> None:
        self._call.code = grpc.StatusCode.OK

    def fail(self, error: Exception) -> None:
        """Make an error the status of the call."""
        self._call.code, status = to_status(error)
        self.facts["reason"] = reason_of(error)
        if isinstance(error, TokenError) and error.token is not None:
            self.facts["token"] = error.token
        reason = refusal_reason(error)
        if reason is not None:
            self._call.refused(reason)
            self.computed(-self._num_tokens)
        self._grpc_context.set_code(self._call.code)
        self._grpc_context.set_details(status.message)
        self._grpc_context.set_trailing_metadata([(DETAILS_KEY, status.SerializeToString())])


@contextmanager
def _open(servicer: Observed, name: str, grpc_context: RpcContext) -> Iterator[Rpc]:
    started = time.monotonic()
    with servicer.rpc_metrics.call(name) as call:
        metadata = grpc_context.invocation_metadata() or ()
        tracing = servicer.tracing
        span = None if tracing is None else tracing.rpc(call.method, metadata)
        rpc = Rpc(grpc_context, metadata, call, span)
        try:
            yield rpc
        finally:
            if span is not None:
                span.end(call.code)
            # Probes ask every few seconds.
            log = servicer.log.debug if "health" in call.method else servicer.log.info
            seconds = round(time.monotonic() - started, 6)
            log("rpc", method=call.method, code=call.code.name, seconds=seconds, **rpc.facts)


def unary(
    response_type: Callable[[], Res],
) -> Callable[
    [Callable[[S, Req, Rpc], Awaitable[Res]]],
    Callable[[S, Req, RpcContext], Awaitable[Res]],
]:
    """Decorate a unary method; after an error an empty response goes with the status."""

    def decorate(
        method: Callable[[S, Req, Rpc], Awaitable[Res]],
    ) -> Callable[[S, Req, RpcContext], Awaitable[Res]]:
        @functools.wraps(method)
        async def wrapper(self: S, request: Req, grpc_context: RpcContext) -> Res:
            with _open(self, method.__name__, grpc_context) as rpc:
                try:
                    with rpc.admitted(self.gate):
                        response = await method(self, request, rpc)
                except Exception as error:
                    rpc.fail(error)
                    return response_type()
                rpc.sends()
                rpc.succeed()
                return response

        return wrapper

    return decorate


def server_stream(
    method: Callable[[S, Req, Rpc], AsyncIterator[Res]],
) -> Callable[[S, Req, RpcContext], AsyncIterator[Res]]:
    """Decorate a server-streaming method, which must be an async generator."""

    @functools.wraps(method)
    async def wrapper(self: S, request: Req, grpc_context: RpcContext) -> AsyncIterator[Res]:
        with _open(self, method.__name__, grpc_context) as rpc:
            stream: Any = method(self, request, rpc)
            try:
                with rpc.admitted(self.gate):
                    async with aclosing(stream):
                        async for response in stream:
                            rpc.sends()
                            yield response
                rpc.succeed()
            except Exception as error:
                rpc.fail(error)

    return wrapper
