"""The errors of calls: an exception class per status code, with all of `google.rpc`'s details."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

_DETAILS: Final = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request that is wrong, and why."""

    field: str
    description: str


class CallError(Exception):
    """A call failed. The class says the status code, the attributes what the server said.

    Attributes:
        code: the status code.
        message: one sentence for people.
        reason: for programs: UPPER_SNAKE_CASE and stable, such as SENDER_NOT_FOUND; empty where no
            Outbox server answered (no connection, a deadline, a proxy).
        metadata: what belongs to the reason, such as `incident` of INTERNAL.
        violations: the fields that are wrong.
        retry_delay: how long to wait before the next call; None if the server did not say.
        request_id: of a batch that may have been accepted: repeat the call with it and the batch
            exists once. None for every other call.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_delay: timedelta | None = None,
    ) -> None:
        super().__init__(code, message, reason)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.violations = violations
        self.retry_delay = retry_delay
        self.request_id: str | None = None

    def __str__(self) -> str:
        """Return one line: message, reason or code, and what the message does not say yet."""
        more = (
            f"{one.field}: {one.description}"
            for one in self.violations
            if one.description != self.message
        )
        said = [f"{self.message} ({self.reason or self.code.name})"]
        return "; ".join([*said, *(text for text in more if text not in self.message)])


class InvalidArgument(CallError):
    """A field is wrong; `violations` name it. Nothing was changed."""


class NotFound(CallError):
    """It does not exist, or belongs to another user."""


class AlreadyExists(CallError):
    """It exists; for a batch: the `request_id` was used with another payload."""


class FailedPrecondition(CallError):
    """It is in a state that does not allow this, such as a job that was sent."""


class Unauthenticated(CallError):
    """No API key, or none that is known."""


class PermissionDenied(CallError):
    """The API key does not allow this."""


class ResourceExhausted(CallError):
    """Too much: a limit of the server, or a message over the size limit."""


class Aborted(CallError):
    """Another change came between; nothing was changed."""


class Unavailable(CallError):
    """No server answers, or it cannot reach a store. The call may still have had its effect."""


class DeadlineExceeded(CallError):
    """No answer in time. The call may still have had its effect."""


class Unimplemented(CallError):
    """The server does not have this method."""


_BY_CODE: Final[Mapping[grpc.StatusCode, type[CallError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
}


def error_of(error: Any) -> CallError:
    """Return what a `grpc.RpcError`, of a call of either kind, says."""
    code: grpc.StatusCode = error.code()
    reason, delay = "", None
    metadata: Mapping[str, str] = {}
    violations: tuple[FieldViolation, ...] = ()
    status = _status_of(error.trailing_metadata() or ())
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, info.metadata
        elif detail.Unpack(request):
            violations = tuple(
                FieldViolation(one.field, one.description) for one in request.field_violations
            )
        elif detail.Unpack(retry):
            delay = retry.retry_delay.ToTimedelta()
    return _BY_CODE.get(code, CallError)(
        code,
        error.details() or "",
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_delay=delay,
    )


def deadline_exceeded(message: str) -> DeadlineExceeded:
    """Return the error of a deadline that ran out on this side."""
    return DeadlineExceeded(grpc.StatusCode.DEADLINE_EXCEEDED, message)


def _status_of(trailers: Any) -> Status:
    """Return the status with its details; an empty one where a proxy garbled it."""
    for key, value in trailers:
        if key == _DETAILS:
            try:
                return Status.FromString(value)
            except DecodeError:
                break
    return Status()
