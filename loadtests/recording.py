"""One streamed request, whoever reads the stream: its message, and its sample."""

import time
from collections.abc import Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from loadtests.samples import Sample
from loadtests.workload import Request
from protos.headroom.v1 import generation_pb2 as pb

_DETAILS_KEY = "grpc-status-details-bin"
# From `time.perf_counter` to seconds since 1970; fixed, so that differences stay exact.
EPOCH = time.time() - time.perf_counter()


def message(request: Request) -> pb.GenerateRequest:
    """Greedy, and as long as the workload says."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=request.token_ids),
        sampling=pb.SamplingParams(max_tokens=request.max_tokens, temperature=0, ignore_eos=True),
    )


class Recording:
    """Stamps what arrives.

    Args:
        due: when the request should have been sent, by `time.perf_counter()`; None is now.
    """

    def __init__(self, request: Request, user: int, due: float | None = None) -> None:
        now = time.perf_counter()
        self._request = request
        self._user = user
        self._start = now if due is None else due
        self._delay = now - self._start
        self._stamps: list[float] = []
        self._num_tokens = 0
        self._reason: str | None = None

    def add(self, response: pb.GenerateResponse) -> bool:
        """Take one message; returns whether the client now hangs up."""
        if response.delta.token_ids:
            self._stamps.append(time.perf_counter())
            self._num_tokens += len(response.delta.token_ids)
        if response.HasField("finished"):
            name = pb.FinishReason.Name(response.finished.reason)
            self._reason = name.removeprefix("FINISH_REASON_").lower()
            return False
        limit = self._request.hang_up_after
        if limit is None or self._num_tokens < limit:
            return False
        self._reason = "cancelled"
        return True

    def end(
        self, code: grpc.StatusCode, message: str = "", metadata: Sequence[tuple[str, Any]] = ()
    ) -> Sample:
        """The stream ended with this status, its message and its trailing metadata."""
        now = time.perf_counter()
        first = self._stamps[0] if self._stamps else None
        return Sample(
            index=self._request.index,
            user=self._user,
            start=self._start + EPOCH,
            delay=self._delay,
            ttft=None if first is None else first - self._start,
            gaps=[
                after - before
                for before, after in zip(self._stamps, self._stamps[1:], strict=False)
            ],
            e2e=now - self._start,
            prompt_tokens=len(self._request.token_ids),
            output_tokens=self._num_tokens,
            finish_reason=self._reason,
            code=code.name,
            message=message if self._reason is None else None,
            retry_after=_retry_after(metadata),
        )


def _retry_after(metadata: Sequence[tuple[str, Any]]) -> float | None:
    packed = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    info = error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds() / 1000)
    return None
