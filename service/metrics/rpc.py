"""RPCs by method and status code, under the names of go-grpc-prometheus."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client.metrics_core import Metric

from service.errors import REFUSAL_REASONS
from service.metrics.families import Key, counter, histogram
from service.metrics.histogram import SECONDS, Histogram

_LABELS = ("grpc_type", "grpc_service", "grpc_method")


@dataclass(slots=True)
class _Method:
    key: Key
    num_started: int = 0
    num_received: int = 0
    num_sent: int = 0
    handled: dict[grpc.StatusCode, int] = field(
        default_factory=lambda: dict.fromkeys(grpc.StatusCode, 0)
    )
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))


class RpcCall:
    """One RPC while it is open.

    Attributes:
        method: full name, `headroom.v1.GenerationService/Generate`.
        code: with which it ends; a call that is torn down has been cancelled.
    """

    def __init__(self, method: _Method, refused: dict[str, int]) -> None:
        self.method = "/".join(method.key[1:])
        self.code = grpc.StatusCode.CANCELLED
        self._method = method
        self._refused = refused

    def sends(self) -> None:
        """Count a message that is about to go to the client."""
        self._method.num_sent += 1

    def refused(self, reason: str) -> None:
        """Count the call as refused before it was admitted."""
        self._refused[reason] += 1


class RpcMetrics:
    """Counters of all methods; used by one event loop, read by any thread.

    Args:
        services: whose methods are counted, each under its name, which no two of them share.
    """

    def __init__(self, services: Iterable[ServiceDescriptor]) -> None:
        self._methods = {
            method.name: _Method(
                (
                    "server_stream" if method.server_streaming else "unary",
                    service.full_name,
                    method.name,
                )
            )
            for service in services
            for method in service.methods
        }
        self._refused = dict.fromkeys(REFUSAL_REASONS, 0)

    @contextmanager
    def call(self, name: str) -> Iterator[RpcCall]:
        """Count one RPC, whose request has arrived."""
        method = self._methods[name]
        method.num_started += 1
        method.num_received += 1
        started = time.monotonic()
        call = RpcCall(method, self._refused)
        try:
            yield call
        finally:
            method.handled[call.code] += 1
            method.seconds.observe(time.monotonic() - started)

    def collect(self) -> Iterator[Metric]:
        methods = self._methods.values()
        yield counter(
            "headroom_requests_rejected",
            "RPCs refused before anything of them was computed, by the reason of the error.",
            {(reason,): count for reason, count in self._refused.items()},
            ("reason",),
        )
        yield counter(
            "grpc_server_started", "RPCs that have begun.", _by(methods, "num_started"), _LABELS
        )
        yield counter(
            "grpc_server_handled",
            "RPCs that have ended, by status code.",
            {
                (*method.key, code.name): count
                for method in methods
                for code, count in method.handled.items()
            },
            (*_LABELS, "grpc_code"),
        )
        yield counter(
            "grpc_server_msg_received",
            "Messages from clients.",
            _by(methods, "num_received"),
            _LABELS,
        )
        yield counter(
            "grpc_server_msg_sent", "Messages to clients.", _by(methods, "num_sent"), _LABELS
        )
        yield histogram(
            "grpc_server_handling_seconds",
            "From the beginning of an RPC to its end.",
            {method.key: method.seconds for method in methods},
            _LABELS,
        )


def _by(methods: Iterable[_Method], attribute: str) -> Mapping[Key, float]:
    return {method.key: getattr(method, attribute) for method in methods}
