"""A locust user of GenerationService/Generate that reads the stream as it comes.

Importing this module imports locust, which patches the standard library: only a locustfile does.
"""

import time
from typing import Any, ClassVar

import gevent
import grpc
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests.feed import Turn
from loadtests.node import Node
from loadtests.recording import Recording, message
from loadtests.samples import Sample


class GenerationUser(User):
    """Sends one request after the other, until its process has none left."""

    node: ClassVar[Node]

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._number, self._stub = self.node.next_user()

    @task
    def generate(self) -> None:
        with self.node.turn() as turn:
            if turn is None:
                raise StopUser
            sample = self._send(turn)
            self.node.samples.append(sample)
        self._show(sample)

    def _send(self, turn: Turn) -> Sample:
        due = None
        if turn.due is not None:
            due = self.node.began + turn.due
            gevent.sleep(max(0.0, due - time.perf_counter()))
        request = message(turn.request)
        recording = Recording(turn.request, self._number, due)
        call: Any = self._stub.Generate(
            request, metadata=self.node.metadata, timeout=self.node.spec.timeout
        )
        try:
            for response in call:
                if recording.add(response):
                    call.cancel()
                    break
        except grpc.RpcError:
            pass  # the status says all
        return recording.end(call.code(), call.details() or "", call.trailing_metadata() or ())

    def _show(self, sample: Sample) -> None:
        """Into locust's tables: the request as such, the rest as rows that are no requests."""
        failed = sample.finish_reason is None
        self.environment.events.request.fire(
            request_type="gRPC",
            name="Generate",
            response_time=1000 * sample.e2e,
            response_length=sample.output_tokens,
            exception=RuntimeError(sample.code) if failed else None,
            context={},
        )
        if sample.ttft is None or failed:
            return
        entry = self.environment.stats.get
        entry("Generate", "TTFT").log(1000 * sample.ttft, 0)
        for gap in sample.gaps:
            entry("Generate", "ITL").log(1000 * gap, 0)
