"""Maps exceptions to a status code with `google.rpc` details (AIP-193).

Only this module knows both our errors and the drivers' errors. Any other exception becomes
INTERNAL, without its text, with an incident id that is also in the log.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

import grpc
import psycopg
import redis.exceptions
import sqlalchemy.exc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from outbox_server.shared import errors

DOMAIN: Final = "outbox"
INTERNAL_REASON: Final = "INTERNAL"

# Texts are cut, because clients may drop a response with more than 8 KiB of trailers, and
# percent-encoding can triple each byte of the message.
_MESSAGE_BYTES: Final = 1_000
_VALUE_BYTES: Final = 200
_VIOLATIONS_BYTES: Final = 2_000

_RETRY_AFTER: Final = timedelta(seconds=1)

_CODES: Final[tuple[tuple[type[errors.OutboxError], grpc.StatusCode], ...]] = (
    (errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.Aborted, grpc.StatusCode.ABORTED),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
)

_QUEUE_GONE: Final = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    # A failover in progress: a replica that is not a master yet, a slot without a node.
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.SlotNotCoveredError,
)


def build_status(
    code: grpc.StatusCode,
    message: str,
    reason: str,
    *,
    metadata: Mapping[str, str] | None = None,
    violations: Sequence[errors.FieldViolation] = (),
    retry_after: timedelta | None = None,
) -> Status:
    """Return the status with ErrorInfo and, if they apply, BadRequest and RetryInfo."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=reason,
            domain=DOMAIN,
            metadata={key: _cut(value, _VALUE_BYTES) for key, value in (metadata or {}).items()},
        )
    ]
    if violations:
        details.append(_bad_request(violations))
    if retry_after is not None:
        delay = Duration()
        delay.FromTimedelta(retry_after)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = Status(code=_number(code), message=_cut(message, _MESSAGE_BYTES))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def status_of(error: BaseException) -> Status:
    """Return the status for `error`; for a group, the status of its first known member.

    An unknown error gives INTERNAL with reason INTERNAL and `incident` in its metadata.
    """
    for leaf in errors.leaves(error):
        known = _status_of_ours(leaf) or _status_of_driver(leaf)
        if known is not None:
            return known
    incident = secrets.token_hex(8)
    return build_status(
        grpc.StatusCode.INTERNAL,
        f"internal error; see incident {incident} in the server's log",
        INTERNAL_REASON,
        metadata={"incident": incident},
    )


def error_info(status: Status) -> error_details_pb2.ErrorInfo:
    """Return the ErrorInfo of a status that `build_status` made."""
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return info


def _status_of_ours(error: BaseException) -> Status | None:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return build_status(
                code,
                error.message,
                error.reason,
                metadata=error.metadata,
                violations=error.violations if isinstance(error, errors.InvalidInput) else (),
                retry_after=error.retry_after
                if isinstance(error, errors.ResourceExhausted | errors.Unavailable)
                else None,
            )
    if isinstance(error, DecodeError):
        return build_status(
            grpc.StatusCode.INVALID_ARGUMENT,
            "the request cannot be decoded as this method's message",
            "MALFORMED_MESSAGE",
        )
    return None


def _status_of_driver(error: BaseException) -> Status | None:
    if isinstance(error, _QUEUE_GONE):
        return _unavailable("the queue cannot be reached", "QUEUE_UNAVAILABLE")
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return _exhausted("the queue is out of memory", "QUEUE_EXHAUSTED")
    return _status_of_database(error)


def _status_of_database(error: BaseException) -> Status | None:
    if isinstance(error, sqlalchemy.exc.TimeoutError):  # no connection of the pool became free
        return _unavailable("the database is busy", "DATABASE_UNAVAILABLE")
    lost = isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated
    cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    state = (cause.sqlstate or "") if isinstance(cause, psycopg.Error) else ""
    if state.startswith("53"):  # class 53: insufficient resources; 53100 is a full disk
        return _exhausted("the database is out of resources", "DATABASE_EXHAUSTED", sqlstate=state)
    if state in ("40001", "40P01"):  # serialization failure, deadlock
        return build_status(
            grpc.StatusCode.ABORTED,
            "another call changed the same data; nothing was changed, try again",
            "CONFLICT",
            retry_after=_RETRY_AFTER,
        )
    if state in ("57014", "55P03"):  # statement_timeout, lock_timeout
        return _unavailable("the database took too long", "DATABASE_UNAVAILABLE")
    gone = isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError)
    # 25006: the server is read-only, as a standby is during a failover.
    if lost or gone or state == "25006":
        return _unavailable("the database cannot be reached", "DATABASE_UNAVAILABLE")
    return None


def _unavailable(message: str, reason: str) -> Status:
    return build_status(
        grpc.StatusCode.UNAVAILABLE,
        f"{message}; try again",
        reason,
        retry_after=_RETRY_AFTER,
    )


def _exhausted(message: str, reason: str, **metadata: str) -> Status:
    return build_status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        message,
        reason,
        metadata=metadata,
        retry_after=_RETRY_AFTER,
    )


def _bad_request(violations: Sequence[errors.FieldViolation]) -> error_details_pb2.BadRequest:
    """Return the first violations, as many as fit into the trailers."""
    request = error_details_pb2.BadRequest()
    room = _VIOLATIONS_BYTES
    for violation in violations:
        field = _cut(violation.field, _VALUE_BYTES)
        description = _cut(violation.description, _MESSAGE_BYTES)
        room -= len(field.encode()) + len(description.encode()) + 8
        if request.field_violations and room < 0:
            break
        request.field_violations.add(field=field, description=description)
    return request


def _cut(text: str, limit: int) -> str:
    """Return `text`, cut to `limit` bytes of UTF-8; a lone surrogate becomes a `?`."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) > limit:
        return encoded[: limit - 3].decode("utf-8", "ignore") + "\u2026"
    return encoded.decode()


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number
