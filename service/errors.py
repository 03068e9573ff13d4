"""The closed catalogue of errors: for each, one gRPC status code and one stable reason.

ServiceError
├── DuplicateRequestError        an open request has this id
├── DeadlinePassedError          the timeout passed before the first token
├── RequestDrainedError          the server stopped before the first token
├── RequestFailedError           the model computed no usable number for this request
├── AttentionTooLargeError       an attention would take or answer more bytes than allowed
├── UnknownHealthServiceError    a health check names a service that does not exist
├── TokenError
│   ├── TokenMissingError        no bearer token, or more than one
│   ├── TokenUnknownError        a token that is not in the token file
│   ├── TokenExpiredError        a token whose time has passed
│   ├── ScopeMissingError        a token that does not allow the method
│   ├── TokenBusyError           too many open RPCs of one token
│   └── TokenRateError           too many prompt and answer tokens in a minute
└── (errors of `service.engine.errors`, by the table below)

Everything else is a bug of ours: INTERNAL, with a reference id that the log explains and without
the error's own text. Details travel as google.rpc messages in `grpc-status-details-bin`.
"""

import math
import uuid
from dataclasses import dataclass

import structlog
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode as Code

from service.engine.errors import (
    EncoderModelError,
    EngineDeadError,
    EngineDrainingError,
    EngineStalledError,
    InvalidRequestError,
    NeverFitsError,
    QueueFullError,
    RequestLostError,
)

DOMAIN = "headroom"
DETAILS_KEY = "grpc-status-details-bin"

log = structlog.get_logger()


class ServiceError(Exception):
    """Base of errors that only the edge raises."""


class DuplicateRequestError(ServiceError):
    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id is {request_id!r}, which an open request already has")


class DeadlinePassedError(ServiceError):
    def __init__(self) -> None:
        super().__init__("the request's timeout passed before its first token")


class RequestDrainedError(ServiceError):
    def __init__(self) -> None:
        super().__init__("the server stopped before the request's first token")


class RequestFailedError(ServiceError):
    def __init__(self) -> None:
        super().__init__("the model's output was not a finite number; the request cannot go on")


class AttentionTooLargeError(ServiceError):
    """An attention was refused by its shapes, before anything was allocated.

    Args:
        what: of the attention takes the bytes.
        setting: that allows no more.
    """

    def __init__(self, what: str, num_bytes: int, limit: int, setting: str) -> None:
        super().__init__(
            f"{what} of this attention would take {num_bytes} bytes; this server allows {limit} "
            f"({setting})"
        )


class UnknownHealthServiceError(ServiceError):
    def __init__(self, service: str, known: list[str]) -> None:
        super().__init__(f"service is {service[:64]!r}; allowed: {', '.join(map(repr, known))}")


class TokenError(ServiceError):
    """A call was refused because of its bearer token.

    Attributes:
        token: the name of its owner; None if it is not known.
    """

    def __init__(self, message: str, token: str | None = None) -> None:
        self.token = token
        super().__init__(message)


class TokenMissingError(TokenError):
    def __init__(self) -> None:
        super().__init__("metadata has no bearer token; allowed: one authorization: Bearer TOKEN")


class TokenUnknownError(TokenError):
    def __init__(self) -> None:
        super().__init__("the bearer token is not known here")


class TokenExpiredError(TokenError):
    def __init__(self, token: str) -> None:
        super().__init__(f"the bearer token of {token!r} has expired", token)


class ScopeMissingError(TokenError):
    def __init__(self, token: str, method: str, scopes: list[str]) -> None:
        super().__init__(
            f"the token of {token!r} does not allow {method}; allowed: a token with one of the "
            f"scopes {', '.join(scopes)}",
            token,
        )


class TokenBusyError(TokenError):
    def __init__(self, token: str, limit: int) -> None:
        super().__init__(
            f"{limit} calls of {token!r} are open; allowed: at most {limit} at once", token
        )


class TokenRateError(TokenError):
    """Attributes:
    retry_after: seconds until something is left of the allowance.
    """

    def __init__(self, token: str, limit: int, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(
            f"{token!r} has used its allowance of {limit} tokens per minute; try again in "
            f"{retry_after:.1f} s",
            token,
        )


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one class of error looks on the wire.

    Attributes:
        refuses: whether it means that nothing of the call was computed.
        retry_after: seconds after which trying again may help; None means it will not.
    """

    code: Code
    reason: str
    refuses: bool = False
    retry_after: float | None = None


CATALOGUE: dict[type[Exception], ErrorKind] = {
    InvalidRequestError: ErrorKind(Code.INVALID_ARGUMENT, "INVALID_REQUEST", refuses=True),
    EncoderModelError: ErrorKind(Code.UNIMPLEMENTED, "MODEL_IS_ENCODER", refuses=True),
    NeverFitsError: ErrorKind(Code.RESOURCE_EXHAUSTED, "NEVER_FITS", refuses=True),
    QueueFullError: ErrorKind(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", refuses=True, retry_after=1.0),
    EngineDrainingError: ErrorKind(Code.UNAVAILABLE, "DRAINING", refuses=True, retry_after=1.0),
    RequestDrainedError: ErrorKind(Code.UNAVAILABLE, "DRAINING", retry_after=1.0),
    EngineDeadError: ErrorKind(Code.UNAVAILABLE, "ENGINE_DEAD", refuses=True, retry_after=5.0),
    RequestLostError: ErrorKind(Code.UNAVAILABLE, "ENGINE_DEAD", retry_after=5.0),
    EngineStalledError: ErrorKind(Code.UNAVAILABLE, "ENGINE_STALLED", retry_after=5.0),
    DuplicateRequestError: ErrorKind(Code.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID", refuses=True),
    DeadlinePassedError: ErrorKind(Code.DEADLINE_EXCEEDED, "DEADLINE"),
    RequestFailedError: ErrorKind(Code.INTERNAL, "NONFINITE_LOGITS"),
    AttentionTooLargeError: ErrorKind(Code.RESOURCE_EXHAUSTED, "ATTENTION_TOO_LARGE", refuses=True),
    UnknownHealthServiceError: ErrorKind(Code.NOT_FOUND, "UNKNOWN_SERVICE"),
    TokenMissingError: ErrorKind(Code.UNAUTHENTICATED, "TOKEN_MISSING", refuses=True),
    TokenUnknownError: ErrorKind(Code.UNAUTHENTICATED, "TOKEN_UNKNOWN", refuses=True),
    TokenExpiredError: ErrorKind(Code.UNAUTHENTICATED, "TOKEN_EXPIRED", refuses=True),
    ScopeMissingError: ErrorKind(Code.PERMISSION_DENIED, "SCOPE_MISSING", refuses=True),
    TokenBusyError: ErrorKind(Code.RESOURCE_EXHAUSTED, "TOKEN_BUSY", refuses=True, retry_after=1.0),
    TokenRateError: ErrorKind(
        Code.RESOURCE_EXHAUSTED, "TOKEN_RATE", refuses=True, retry_after=60.0
    ),
}
# Values of the label of a metric.
REFUSAL_REASONS = tuple(
    dict.fromkeys(kind.reason.lower() for kind in CATALOGUE.values() if kind.refuses)
)
_BUG = ErrorKind(Code.INTERNAL, "INTERNAL")


def reason_of(error: Exception) -> str:
    """The stable name of an error, in small letters."""
    return CATALOGUE.get(type(error), _BUG).reason.lower()


def refusal_reason(error: Exception) -> str | None:
    """Why a call was refused before anything of it was computed; None if it was not."""
    return reason_of(error) if CATALOGUE.get(type(error), _BUG).refuses else None


def to_status(error: Exception) -> tuple[Code, status_pb2.Status]:
    """The gRPC code and the google.rpc.Status of an error; logs what is our own fault."""
    kind = CATALOGUE.get(type(error), _BUG)
    message, metadata = str(error), {}
    if kind.code is Code.INTERNAL:
        reference = uuid.uuid4().hex
        metadata["reference"] = reference
        if kind is _BUG:
            message = f"internal error, reference {reference}"
        log.error("request failed", reference=reference, reason=kind.reason, exc_info=error)
    info = error_details_pb2.ErrorInfo(reason=kind.reason, domain=DOMAIN, metadata=metadata)
    packed = [_pack(info)]
    if isinstance(error, InvalidRequestError):
        packed.append(_pack(_bad_request(error)))
    retry_after = error.retry_after if isinstance(error, TokenRateError) else kind.retry_after
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(retry_after * 1000))
        packed.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code_number: int = kind.code.value[0]
    return kind.code, status_pb2.Status(code=code_number, message=message, details=packed)


def _bad_request(error: InvalidRequestError) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=violation.field, description=str(violation)
            )
            for violation in error.violations
        ]
    )


def _pack(
    detail: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
