"""One load process: what it has to send, its connections, and what it has seen."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loadtests.client_cpu import CpuMeter, WaitMeter
from loadtests.connection import USERS_PER_CHANNEL, metadata, open_channel
from loadtests.feed import Feed, Turn
from loadtests.load import LoadSpec
from loadtests.recording import EPOCH
from loadtests.samples import Sample
from protos.headroom.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc

_CONNECT_SECONDS = 30.0


class Node:
    """The part of a load that one process sends.

    Args:
        process, processes: which of how many.

    Raises:
        grpc.RpcError: the server does not say what it serves.
    """

    def __init__(self, spec: LoadSpec, process: int, processes: int) -> None:
        self.spec = spec
        self.metadata = metadata(spec)
        self.samples: list[Sample] = []
        self._process, self._processes = process, processes
        self._num_users = 0
        self._num_open = 0
        self._channels = [open_channel(spec)]
        models: Any = models_pb2_grpc.ModelServiceStub(self._channels[0])
        model = models.GetModel(
            models_pb2.GetModelRequest(), metadata=self.metadata, timeout=_CONNECT_SECONDS
        )
        self._feed = Feed(spec, model.vocab_size, process=process, processes=processes)
        self._cpu, self._waits = CpuMeter(), WaitMeter()
        self.began = time.perf_counter()

    def next_user(self) -> tuple[int, Any]:
        """The number of a new user over all processes, and the stub that it uses."""
        number = self._num_users
        self._num_users += 1
        if number >= USERS_PER_CHANNEL * len(self._channels):
            self._channels.append(open_channel(self.spec))
        stub = generation_pb2_grpc.GenerationServiceStub(
            self._channels[number // USERS_PER_CHANNEL]
        )
        return number * self._processes + self._process, stub

    @contextmanager
    def turn(self) -> Iterator[Turn | None]:
        """The next request, which is open until the end of the block; None if there is none."""
        turn = self._feed.next_turn(time.perf_counter() - self.began)
        self._num_open += turn is not None
        try:
            yield turn
        finally:
            self._num_open -= turn is not None

    def stop(self) -> None:
        """Send nothing more."""
        self._feed.stop()

    def is_over(self) -> bool:
        """Whether every request was sent and has ended."""
        return not self._num_open and self._feed.is_over(time.perf_counter() - self.began)

    def report(self) -> dict[str, Any]:
        """What is new since the last report, as plain data."""
        over = self.is_over()
        new, self.samples = self.samples, []
        return {
            "samples": [sample.to_dict() for sample in new],
            "client_cpu": self._cpu.busiest(),
            "client_wait": self._waits.share(),
            "began": self.began + EPOCH,
            "over": over,
        }

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
