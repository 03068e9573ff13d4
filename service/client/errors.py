"""Failed calls as typed errors."""

from collections.abc import Mapping
from typing import cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class HeadroomError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status code.
        reason: the stable reason from the server's catalogue, for example `QUEUE_FULL`; empty if
            the error did not come from the server's own code.
        violations: wrong fields and what is allowed, by field name.
        retry_after: seconds after which trying again may help, if it may.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        violations: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.code = code
        self.reason = reason
        self.violations = dict(violations or {})
        self.retry_after = retry_after
        super().__init__(f"{code.name}: {message}")


class ReplicaLostError(HeadroomError):
    """The replica ended while it answered; what arrived before is valid. Trying again may help."""


def to_error(error: grpc.RpcError) -> HeadroomError:
    """The typed form of a failed call, with what its google.rpc details say."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    reason, violations, retry_after = "", {}, None
    status = rpc_status.from_call(cast(grpc.Call, error))
    for packed in status.details if status is not None else ():
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if packed.Unpack(info):
            reason = info.reason
        elif packed.Unpack(bad):
            violations = {v.field: v.description for v in bad.field_violations}
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    # A replica that is killed shows as CANCELLED by the other side, not by us.
    lost = code is grpc.StatusCode.CANCELLED and not message.startswith("Locally cancelled")
    kind = ReplicaLostError if lost and not reason else HeadroomError
    return kind(code, message, reason=reason, violations=violations, retry_after=retry_after)
