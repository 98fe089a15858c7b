from __future__ import annotations

from datetime import timedelta

import grpc
import psycopg
import pytest
import redis.exceptions
import sqlalchemy.exc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from outbox_server.shared import errors
from outbox_server.shared.rpc.errors import error_info, status_of

SECONDS = timedelta(seconds=7)


def wrapped(cause: Exception) -> sqlalchemy.exc.DBAPIError:
    """Return `cause` wrapped as SQLAlchemy raises it."""
    error = sqlalchemy.exc.DBAPIError.instance("SELECT", {}, cause, psycopg.Error)
    assert isinstance(error, sqlalchemy.exc.DBAPIError)
    return error


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (errors.InvalidInput("x"), "INVALID_ARGUMENT", "INVALID_INPUT"),
        (errors.NotFound("x", reason="SENDER_NOT_FOUND"), "NOT_FOUND", "SENDER_NOT_FOUND"),
        (errors.AlreadyExists("x"), "ALREADY_EXISTS", "ALREADY_EXISTS"),
        (errors.FailedPrecondition("x"), "FAILED_PRECONDITION", "FAILED_PRECONDITION"),
        (errors.Unauthenticated("x"), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (errors.PermissionDenied("x"), "PERMISSION_DENIED", "PERMISSION_DENIED"),
        (errors.ResourceExhausted("x"), "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"),
        (errors.Unavailable("x"), "UNAVAILABLE", "UNAVAILABLE"),
        (psycopg.OperationalError("x"), "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        (psycopg.InterfaceError("x"), "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        (psycopg.errors.AdminShutdown("x"), "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        (psycopg.errors.ReadOnlySqlTransaction("x"), "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        (psycopg.errors.DiskFull("x"), "RESOURCE_EXHAUSTED", "DATABASE_EXHAUSTED"),
        (psycopg.errors.TooManyConnections("x"), "RESOURCE_EXHAUSTED", "DATABASE_EXHAUSTED"),
        (psycopg.errors.DeadlockDetected("x"), "ABORTED", "CONFLICT"),
        (wrapped(psycopg.OperationalError("x")), "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        (wrapped(psycopg.errors.DiskFull("x")), "RESOURCE_EXHAUSTED", "DATABASE_EXHAUSTED"),
        (wrapped(psycopg.errors.SerializationFailure("x")), "ABORTED", "CONFLICT"),
        (sqlalchemy.exc.TimeoutError("x"), "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        (redis.exceptions.ConnectionError("x"), "UNAVAILABLE", "QUEUE_UNAVAILABLE"),
        (redis.exceptions.TimeoutError("x"), "UNAVAILABLE", "QUEUE_UNAVAILABLE"),
        (redis.exceptions.BusyLoadingError("x"), "UNAVAILABLE", "QUEUE_UNAVAILABLE"),
        (redis.exceptions.OutOfMemoryError("x"), "RESOURCE_EXHAUSTED", "QUEUE_EXHAUSTED"),
        (wrapped(psycopg.errors.UniqueViolation("x")), "INTERNAL", "INTERNAL"),
        (redis.exceptions.ResponseError("x"), "INTERNAL", "INTERNAL"),
        (errors.ConfigurationError("x"), "INTERNAL", "INTERNAL"),
        (TimeoutError("x"), "INTERNAL", "INTERNAL"),
    ],
)
def test_an_error_has_its_code_and_reason(error: Exception, code: str, reason: str) -> None:
    status = status_of(error)
    assert status.code == grpc.StatusCode[code].value[0]
    info = error_info(status)
    assert (info.reason, info.domain) == (reason, "outbox")
    transient = code in {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"}
    assert has(status, error_details_pb2.RetryInfo()) == transient


def test_the_text_of_a_driver_error_does_not_reach_the_caller() -> None:
    for error in (
        psycopg.OperationalError("host db.internal"),
        redis.exceptions.ConnectionError("host db.internal"),
        ValueError("host db.internal"),
    ):
        assert "db.internal" not in str(status_of(error))


def test_the_retry_delay_and_the_metadata_arrive() -> None:
    status = status_of(errors.Unavailable("x", retry_after=SECONDS, metadata={"part": "queue"}))
    retry = error_details_pb2.RetryInfo()
    assert has(status, retry)
    assert retry.retry_delay.ToTimedelta() == SECONDS
    assert error_info(status).metadata["part"] == "queue"


def test_each_violation_names_its_field() -> None:
    request = error_details_pb2.BadRequest()
    assert has(status_of(errors.InvalidInput.field("smtp.port", "must be above 0")), request)
    assert [(v.field, v.description) for v in request.field_violations] == [
        ("smtp.port", "must be above 0")
    ]


def test_an_exception_group_maps_like_its_first_known_member() -> None:
    inner = ExceptionGroup("in", [KeyError("y"), errors.NotFound("gone")])
    assert status_of(ExceptionGroup("out", [ValueError("x"), inner])).message == "gone"


def test_every_unknown_error_has_its_own_incident_id() -> None:
    first, second = (error_info(status_of(KeyError("x"))).metadata["incident"] for _ in range(2))
    assert first != second


def test_invalid_unicode_in_an_error_text_causes_no_second_error() -> None:
    assert status_of(errors.InvalidInput("\ud800")).message == "?"


def has(status: Status, detail: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> bool:
    """Unpack the detail of the same type into `detail`."""
    return any(packed.Unpack(detail) for packed in status.details)
