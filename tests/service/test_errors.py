"""The catalogue: every error has one code and one reason, and bugs tell nothing of themselves."""

from typing import TypeVar

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from service.engine import errors as engine_errors
from service.engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestLostError,
    Violation,
)
from service.errors import (
    CATALOGUE,
    DOMAIN,
    REFUSAL_REASONS,
    RequestDrainedError,
    ServiceError,
    TokenError,
    refusal_reason,
    to_status,
)

T = TypeVar("T")


def _subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {sub for direct in kind.__subclasses__() for sub in {direct, *_subclasses(direct)}}


def _detail(status: status_pb2.Status, kind: type[T]) -> T:
    detail = kind()
    found = [packed for packed in status.details if packed.Is(kind.DESCRIPTOR)]  # type: ignore[attr-defined]
    assert len(found) == 1
    found[0].Unpack(detail)
    return detail


def test_every_error_is_in_the_catalogue() -> None:
    # TokenError only stands above others.
    assert _subclasses(EngineError) | _subclasses(ServiceError) == {*CATALOGUE, TokenError}
    assert engine_errors.__doc__ is not None
    for kind in _subclasses(EngineError):
        assert kind.__name__ in engine_errors.__doc__


def test_a_reason_means_one_code_and_one_delay() -> None:
    kinds = {(kind.reason, kind.code, kind.retry_after) for kind in CATALOGUE.values()}
    assert len(kinds) == len({reason for reason, _, _ in kinds})


def test_a_refusal_is_told_from_an_end() -> None:
    assert refusal_reason(EngineDeadError()) == "engine_dead"
    assert refusal_reason(RequestLostError()) is None
    assert refusal_reason(EngineDrainingError()) == "draining"
    assert refusal_reason(RequestDrainedError()) is None
    assert refusal_reason(KeyError()) is None
    for kind in CATALOGUE.values():
        assert not kind.refuses or kind.reason.lower() in REFUSAL_REASONS


def test_invalid_request_names_every_field() -> None:
    error = InvalidRequestError([Violation("a", "1", "2"), Violation("b", "3", "4")])
    code, status = to_status(error)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert status.code == 3
    fields = _detail(status, error_details_pb2.BadRequest).field_violations
    assert [(f.field, f.description) for f in fields] == [
        ("a", "a is 1; allowed: 2"),
        ("b", "b is 3; allowed: 4"),
    ]
    info = _detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", DOMAIN)


def test_queue_full_says_when_to_try_again() -> None:
    code, status = to_status(QueueFullError(unit="requests", limit=3))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert _detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1000


def test_a_bug_shows_a_reference_and_not_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, status = to_status(KeyError("secret path"))
    assert code is grpc.StatusCode.INTERNAL
    reference = _detail(status, error_details_pb2.ErrorInfo).metadata["reference"]
    assert status.message == f"internal error, reference {reference}"
    assert "secret" not in str(status)
    logged = capsys.readouterr().err
    assert reference in logged
    assert "secret path" in logged
