"""What a load test is asked to do, and what it answers."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from loadtests.stages import SHAPES, Shape, Stage, stages
from loadtests.workload import Workload

_MAX_USERS = 10_000
_MAX_REQUESTS = 10_000_000
_MAX_PROCESSES = 64


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A load on one server.

    Attributes:
        target: where the server listens, as HOST:PORT.
        application: which of its applications is meant.
        users: streams that are open at once, at most; in a closed loop (`rate` is None) each sends
            its next request when the last one ended.
        rate: requests per second, on average, of Poisson arrivals, whether or not the server keeps
            up (open loop); times count from the arrival, even if all users are busy then.
        num_requests: so many in all, then the load ends.
        seconds: no request begins after so long; those that are open end.
        shape: how users or rate rise and fall in `seconds`; they are the peak.
        processes: of the load generator; they share users and rate.
        timeout: seconds after which the client gives a request up.
        token_file: holds the bearer token; without it, the variable HEADROOM_TOKEN may.
        tls_ca: certificates (PEM) of who vouches for the server, whose connections are then TLS.
        tls_client_cert, tls_client_key: the clients' certificate and its key (PEM), for mTLS.
    """

    target: str
    workload: Workload
    users: int
    application: str = "headroom"
    rate: float | None = None
    num_requests: int | None = None
    seconds: float | None = None
    shape: Shape = "steady"
    processes: int = 1
    timeout: float = 600.0
    token_file: Path | None = None
    tls_ca: Path | None = None
    tls_client_cert: Path | None = None
    tls_client_key: Path | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, with one line for each field that is wrong."""
        wrong = [
            f"{name} is {value}; allowed: {allowed}"
            for name, value, allowed, right in (
                ("processes", self.processes, f"1 to {_MAX_PROCESSES}",
                 1 <= self.processes <= _MAX_PROCESSES),
                ("users", self.users, f"1 to {_MAX_USERS}, and one for each process",
                 max(1, self.processes) <= self.users <= _MAX_USERS),
                ("rate", self.rate, "a number above 0", _is_positive(self.rate)),
                ("num_requests", self.num_requests, f"1 to {_MAX_REQUESTS}",
                 self.num_requests is None or 1 <= self.num_requests <= _MAX_REQUESTS),
                ("seconds", self.seconds, "a number above 0", _is_positive(self.seconds)),
                ("timeout", self.timeout, "a number above 0", _is_positive(self.timeout)),
                ("token_file", self.token_file, "a file that can be read",
                 _is_readable(self.token_file)),
                ("tls_ca", self.tls_ca, "a file that can be read", _is_readable(self.tls_ca)),
                ("tls_client_cert", self.tls_client_cert,
                 "a file that can be read, with tls_client_key and tls_ca",
                 _is_readable(self.tls_client_cert) and self._is_whole_tls),
                ("tls_client_key", self.tls_client_key, "a file that can be read",
                 _is_readable(self.tls_client_key)),
                ("shape", repr(self.shape), ", ".join(SHAPES), self.shape in SHAPES),
                ("shape", repr(self.shape), "steady, unless seconds are given",
                 self.shape == "steady" or self.seconds is not None),
            )
            if not right
        ]  # fmt: skip
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def _is_whole_tls(self) -> bool:
        own = (self.tls_client_cert, self.tls_client_key)
        return own == (None, None) or None not in (*own, self.tls_ca)

    @property
    def stages(self) -> list[Stage]:
        """The load over time."""
        return stages(self.shape, self.rate or self.users, self.seconds or math.inf)


def _is_readable(path: Path | None) -> bool:
    return path is None or os.access(path, os.R_OK)


def _is_positive(value: float | None) -> bool:
    return value is None or (math.isfinite(value) and value > 0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of exact values in milliseconds; percentiles interpolate linearly between neighbours."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class StageSummary:
    """One stage of a shape.

    Attributes:
        start, end: seconds since the load began.
        load: users, or requests per second.
        started: requests that started in it.
        failed: how many of them failed.
        served_per_s, output_tokens_per_s: whole requests that ended in it, whenever they started.
        ttft_ms, e2e_ms: of the requests that started in it.
    """

    start: float
    end: float
    load: float
    started: int
    failed: int
    served_per_s: float
    output_tokens_per_s: float
    ttft_ms: Distribution | None
    e2e_ms: Distribution | None


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What the clients of a load test saw.

    Attributes:
        requests: that ended, in whatever way.
        failures: how many ended without a finish reason, by gRPC code.
        failure_messages: the first message that came with each code.
        rejects_with_retry_info: failures that say when to try again.
        finish_reasons: how many ended with each; `cancelled` are the client's own hang-ups.
        seconds: from the first start to the last end.
        requests_per_s, output_tokens_per_s: over `seconds`; failures are no requests here.
        ttft_ms: from start to first token. None where there is no value, as below.
        itl_ms: between one message with tokens and the next.
        tpot_ms: per request, time after the first token / tokens after the first.
        e2e_ms: from start to the end of the stream.
        delay_ms: from a scheduled arrival until a user was free to send it (open loop). Large
            values mean that the load was not open: more users are needed.
        client_cpu: share of one core that the busiest load process took, at its busiest.
        client_wait: seconds per second that the threads of a load process were ready to run but had
            no core, of the process that waited most. None where the kernel does not say.
        client_bound: the load generator itself was too busy; its times say nothing.
        began: when the load began, in seconds since 1970; stages count from it.
        stages: of the shape, none if it is steady.
    """

    requests: int
    failures: dict[str, int]
    failure_messages: dict[str, str]
    rejects_with_retry_info: int
    finish_reasons: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    delay_ms: Distribution | None
    client_cpu: float
    client_wait: float | None
    client_bound: bool
    began: float
    stages: list[StageSummary]
