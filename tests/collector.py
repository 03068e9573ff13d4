"""A receiver of traces that speaks OTLP over gRPC, as a collector would."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(pb_grpc.TraceServiceServicer):
    """Attributes:
    endpoint: for `otlp_endpoint`.
    resources: attributes of the processes that sent something.
    """

    endpoint: str

    def __init__(self) -> None:
        self.resources: list[dict[str, str]] = []
        self._spans: list[Span] = []
        self._arrived = threading.Condition()

    def Export(  # noqa: N802
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        with self._arrived:
            for group in request.resource_spans:
                attributes = group.resource.attributes
                self.resources.append({one.key: one.value.string_value for one in attributes})
                for scope in group.scope_spans:
                    self._spans.extend(scope.spans)
            self._arrived.notify_all()
        return pb.ExportTraceServiceResponse()

    def wait_for(
        self, names: set[str], *, trace_id: int | None = None, timeout: float = 30.0
    ) -> list[Span]:
        """The spans of one trace, or of all, once one of each name has arrived."""

        def arrived() -> list[Span]:
            wanted = trace_id and trace_id.to_bytes(16, "big")
            return [span for span in self._spans if wanted in (None, span.trace_id)]

        with self._arrived:
            complete = self._arrived.wait_for(
                lambda: names <= {span.name for span in arrived()}, timeout
            )
            assert complete, f"arrived: {sorted(span.name for span in arrived())}"
            return arrived()


@contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
