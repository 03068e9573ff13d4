"""Traces of real requests arrive at a receiver that speaks the collector's protocol."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from protos.headroom.v1 import generation_pb2 as pb
from service.tracing import Tracing
from tests.collector import running_collector
from tests.serving import running_server

TRACE_ID, PARENT_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
PARENT = f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01"
METHOD = "headroom.v1.GenerationService/Generate"


def request(**changes: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    prompt = pb.TokenIds(ids=[5, 6, 7])
    return pb.GenerateRequest(**{"token_ids": prompt, "sampling": sampling, **changes})


def attributes(span: Span) -> dict[str, Any]:
    values = ((one.key, one.value) for one in span.attributes)
    return {key: getattr(value, str(value.WhichOneof("value"))) for key, value in values}


async def test_a_request_is_one_trace_below_its_callers_span(model_path: Path) -> None:
    with running_collector() as collector:
        async with running_server(model_path, otlp_endpoint=collector.endpoint) as server:
            call = server.generation.Generate(
                request(request_id="r1"), metadata=[("traceparent", PARENT)]
            )
            assert [1 async for _ in call]
            with pytest.raises(grpc.aio.AioRpcError):
                await server.generation.Complete(pb.CompleteRequest())
        # The server sends what is left when it ends.
        spans = collector.wait_for({METHOD, "queue", "prefill", "decode"})
    by_name = {span.name: span for span in spans}
    root = by_name[METHOD]
    assert int.from_bytes(root.trace_id, "big") == TRACE_ID
    assert int.from_bytes(root.parent_span_id, "big") == PARENT_ID
    assert root.kind == Span.SPAN_KIND_SERVER
    assert root.status.code == Status.STATUS_CODE_UNSET
    assert attributes(root) == {
        "rpc.system": "grpc",
        "rpc.method": METHOD,
        "rpc.grpc.status_code": 0,
        "headroom.request_id": "r1",
        "headroom.finish_reason": "length",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "headroom.cached_tokens": 0,
    }
    parts = [by_name[name] for name in ("queue", "prefill", "decode")]
    for part in parts:
        assert part.trace_id == root.trace_id
        assert part.parent_span_id == root.span_id
        # Two clocks: the engine's counts seconds, that of spans is the time of day.
        assert root.start_time_unix_nano - 10**7 <= part.start_time_unix_nano
        assert part.start_time_unix_nano < part.end_time_unix_nano <= root.end_time_unix_nano
    for earlier, later in pairwise(parts):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    refused = by_name["headroom.v1.GenerationService/Complete"]
    assert refused.trace_id != root.trace_id
    assert attributes(refused)["rpc.grpc.status_code"] == 3
    assert refused.status.code == Status.STATUS_CODE_UNSET, "the caller's fault"
    assert collector.resources[0]["service.name"] == "headroom"
    assert collector.resources[0]["headroom.application"] == "headroom"


async def test_what_the_caller_does_not_sample_is_not_sent(model_path: Path) -> None:
    with running_collector() as collector:
        async with running_server(model_path, otlp_endpoint=collector.endpoint) as server:
            for parent in (f"{PARENT[:-2]}00", PARENT):
                call = server.generation.Generate(request(), metadata=[("traceparent", parent)])
                assert [1 async for _ in call]
        spans = collector.wait_for({METHOD})
    assert [span.name for span in spans].count(METHOD) == 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INTERNAL, Status.STATUS_CODE_ERROR),
        (grpc.StatusCode.UNAVAILABLE, Status.STATUS_CODE_ERROR),
        (grpc.StatusCode.CANCELLED, Status.STATUS_CODE_UNSET),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Status.STATUS_CODE_UNSET),
    ],
)
def test_a_servers_own_faults_are_errors(code: grpc.StatusCode, expected: int) -> None:
    with running_collector() as collector:
        tracing = Tracing(collector.endpoint, sample_ratio=1.0, resource={})
        tracing.rpc("service/Method", []).end(code)
        tracing.shutdown()
        (span,) = collector.wait_for({"service/Method"})
    assert span.status.code == expected


def test_without_an_endpoint_the_library_is_not_even_imported() -> None:
    code = (
        "import sys, service.servicer, service.replica, service.config as c;"
        "assert service.replica.make_tracing(c.ServiceConfig()) is None;"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metadata_that_is_no_trace_begins_one() -> None:
    with running_collector() as collector:
        tracing = Tracing(collector.endpoint, sample_ratio=1.0, resource={})
        for value in ("", "00-0-0-01", "x" * 10_000):
            metadata: list[tuple[str, str | bytes]] = [
                ("traceparent", value),
                ("other-bin", b"\xff"),
            ]
            tracing.rpc("service/Method", metadata).end(grpc.StatusCode.OK)
        tracing.shutdown()
        spans = collector.wait_for({"service/Method"})
    assert len({span.trace_id for span in spans}) == 3
    assert {span.parent_span_id for span in spans} == {b""}
