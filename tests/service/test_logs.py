"""Log lines: one for each RPC, readable by machines, and without a word of prompts or answers."""

import builtins
import io
import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.headroom.v1 import attention_pb2, models_pb2
from protos.headroom.v1 import generation_pb2 as pb
from service.auth.tokens import digest_of
from service.engine.errors import InvalidRequestError, Violation
from service.errors import to_status
from service.logs import LogFormat, configure_logs
from tests.service.auth.test_gate import bearer
from tests.serving import running_server

SECRET = "correct horse battery staple"


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


async def test_every_rpc_is_a_line(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    async with running_server(model_path) as server:
        sampling = pb.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        request = pb.CompleteRequest(text=SECRET, sampling=sampling, request_id="r1")
        answer = await server.generation.Complete(request)
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generation.Complete(pb.CompleteRequest(text=SECRET * 10_000))
        await server.models.GetModel(models_pb2.GetModelRequest())
        await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
    written = lines(capsys)
    assert all(line["event"] == "rpc" and line["level"] == "info" for line in written)
    assert all(line["heads"] == "h4kv2d16" and line["seconds"] > 0 for line in written)
    first, second, third = ({k: v for k, v in line.items() if k in FACTS} for line in written)
    assert first == {
        "method": "headroom.v1.GenerationService/Complete",
        "code": "OK",
        "request_id": "r1",
        "finish_reason": "length",
        "prompt_tokens": answer.finished.usage.prompt_tokens,
        "completion_tokens": 4,
    }
    assert second == {
        "method": "headroom.v1.GenerationService/Complete",
        "code": "INVALID_ARGUMENT",
    }
    assert third == {"method": "headroom.v1.ModelService/GetModel", "code": "OK"}
    assert not any(word in str(written) for word in SECRET.split())


async def test_a_line_has_the_owner_of_the_token_and_not_the_token(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"name": "alice", "sha256": digest_of("hr_first"), "scopes": ["generate"]},
        {"name": "bob", "sha256": digest_of("hr_second"), "scopes": ["admin"], "expires": _PAST},
    ]
    file = tmp_path / "tokens.yaml"
    file.write_text(yaml.safe_dump(entries))
    configure_logs("json", "info")
    sampling = pb.SamplingParams(max_tokens=1)
    request = pb.CompleteRequest(text=SECRET, sampling=sampling)
    async with running_server(model_path, tokens=file) as server:
        await server.generation.Complete(request, metadata=bearer("hr_first"))
        for method, message, token in (
            (server.attention.Attend, attention_pb2.AttendRequest(), "hr_first"),
            (server.generation.Complete, request, "hr_second"),
            (server.generation.Complete, request, "hr_third"),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await method(message, metadata=bearer(token))
    written = lines(capsys)
    keys = ("code", "token", "reason")
    assert [{key: line[key] for key in keys if key in line} for line in written] == [
        {"code": "OK", "token": "alice"},
        {"code": "PERMISSION_DENIED", "token": "alice", "reason": "scope_missing"},
        {"code": "UNAUTHENTICATED", "token": "bob", "reason": "token_expired"},
        {"code": "UNAUTHENTICATED", "reason": "token_unknown"},
    ]
    assert not any(word in str(written) for word in ("hr_", *SECRET.split()))


_PAST = "2020-01-01T00:00:00Z"
FACTS = {
    *("method", "code", "request_id", "finish_reason"),
    *("prompt_tokens", "completion_tokens"),
}


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_has_no_local_variables(
    form: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs(form, "info")

    def fail(prompt: str) -> None:
        raise KeyError(len(prompt))

    try:
        fail(SECRET)
    except KeyError as error:
        to_status(error)
    written = capsys.readouterr().err
    assert "fail" in written
    assert "KeyError" in written
    assert "battery" not in written


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "warning")
    log = structlog.get_logger()
    log.info("small")
    log.warning("large", size=3)
    (line,) = lines(capsys)
    assert (line["event"], line["size"], line["level"]) == ("large", 3, "warning")


def test_lines_of_the_engine_are_among_them(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    log = logging.getLogger("service.engine.anything")
    log.debug("not seen")
    log.info("so many: %d", 3)
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("engine failed")
    first, second = lines(capsys)
    assert (first["event"], first["level"]) == ("so many: 3", "info")
    assert (second["event"], second["level"]) == ("engine failed", "error")
    assert second["exception"][0]["exc_value"] == "wrong"


def test_a_callers_mistake_is_no_error_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "debug")
    to_status(InvalidRequestError([Violation("text", "too long", "at most 5")]))
    assert lines(capsys) == []


def test_a_stream_of_its_own_gets_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a replica of Ray Serve has it: `sys.stderr` is Serve's logger, and `print` prints its
    arguments as a tuple."""
    stream = io.StringIO()
    monkeypatch.setattr(builtins, "print", lambda *objects, file, **_: file.write(str(objects)))
    configure_logs("json", "info", stream)
    structlog.get_logger().info("rpc")
    configure_logs("json", "info")
    structlog.get_logger().info("another")
    assert json.loads(stream.getvalue())["event"] == "rpc"
    assert [line["event"] for line in lines(capsys)] == ["another"]
