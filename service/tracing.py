"""Traces by OpenTelemetry: a span for each RPC, and below it what the engine did for it.

The parent comes from the caller's `traceparent` metadata (W3C Trace Context). The engine measures
how long a request waited, was read and was continued; its spans are made when it ends, so that
nothing of tracing runs on the engine thread.
"""

import time
from collections.abc import Iterable, Mapping
from itertools import pairwise

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.engine.sequence import Finish

_PROPAGATOR = TraceContextTextMapPropagator()
_CARRIED = ("traceparent", "tracestate")
# A server's own faults, in the eyes of the conventions for RPC spans; the rest are the caller's.
_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class RpcSpan:
    """The span of an open RPC."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    def concerns(self, request_id: str) -> None:
        """Say which request it is about."""
        self._span.set_attribute("headroom.request_id", request_id)

    def finished(self, finish: Finish) -> None:
        """Add spans of a request that has just ended: `queue`, `prefill` and `decode`."""
        usage, timings = finish.usage, finish.timings
        self._span.set_attributes(
            {
                "headroom.finish_reason": finish.reason.name.lower(),
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "headroom.cached_tokens": usage.cached_tokens,
            }
        )
        arrival = time.time_ns() - _ns(timings.total)
        marks = pairwise([0.0, timings.queue, timings.first_token, timings.total])
        context = set_span_in_context(self._span)
        for name, (begin, end) in zip(("queue", "prefill", "decode"), marks, strict=True):
            if end > begin:
                span = self._tracer.start_span(name, context, start_time=arrival + _ns(begin))
                span.end(arrival + _ns(end))

    def end(self, code: grpc.StatusCode) -> None:
        """End it with the status that goes to the caller."""
        self._span.set_attribute("rpc.grpc.status_code", int(code.value[0]))
        if code in _FAULTS:
            self._span.set_status(Status(StatusCode.ERROR, code.name))
        self._span.end()


class Tracing:
    """Makes spans and sends them away.

    Args:
        endpoint: of an OTLP collector (gRPC), `http://` in the clear or `https://`.
        sample_ratio: share of the traces that begin here; others are as their caller decided.
        resource: what describes this process.
    """

    def __init__(self, endpoint: str, *, sample_ratio: float, resource: Mapping[str, str]) -> None:
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sample_ratio),
            resource=Resource.create({"service.name": "headroom", **resource}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headroom")

    def rpc(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> RpcSpan:
        """The span of an RPC that has just arrived.

        Args:
            method: full name, `headroom.v1.GenerationService/Generate`.
            metadata: the caller's.
        """
        carrier = {key: str(value) for key, value in metadata if key in _CARRIED}
        span = self._tracer.start_span(
            method,
            context=_PROPAGATOR.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.method": method},
        )
        return RpcSpan(self._tracer, span)

    def shutdown(self) -> None:
        """Send what has not been sent yet."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
