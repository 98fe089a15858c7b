"""What several methods need: the user to act for, and the field that an error is about."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import Message
from outbox.v1 import batch_pb2, batch_service_pb2, sender_service_pb2

from outbox_server.shared.callers import (
    CallerKind,
    current_caller,
    effective_user,
    require_user,
)
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.option_mapping import from_options
from outbox_server.shared.rpc.proto_mapping import from_timestamp

# In quotes, because grpcio's class is generic only in its stubs.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# The content types of a CSV. The last one is what `curl --data-binary` sends by itself.
_FILE_TYPES: Final = (
    "text/csv",
    "text/tab-separated-values",
    "text/plain",
    "application/vnd.ms-excel",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
)


def acting_user(requested: str, field: str = "user_id") -> str | None:
    """Return the user to act for. None means any user: the caller may act for all.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput: USER_ID_INVALID.
    """
    return effective_user(current_caller(), requested, field)


def named_user(requested: str, field: str = "user_id") -> str:
    """Return the user to act for. The call needs one user.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput: USER_ID_INVALID, USER_ID_REQUIRED.
    """
    return require_user(current_caller(), requested, field)


def listed_user(requested: str, *, narrowed: bool) -> str | None:
    """Return the user whose rows are listed. None means any user.

    A list of all users' rows is for operators, unless it is `narrowed` to a resource of one user.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput: USER_ID_INVALID, USER_ID_REQUIRED.
    """
    if narrowed or current_caller().kind is CallerKind.OPERATOR:
        return acting_user(requested)
    return named_user(requested)


def checked_options(
    options: batch_pb2.BatchOptions, *, validate_only: bool = False, found: Violations | None = None
) -> tuple[str | None, BatchOptions]:
    """Return the user to act for (None means any), and the options of a batch.

    `found` has errors about other fields; they are raised with those found here.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput, NotFound: USER_ID_INVALID; see `from_options`.
    """
    found = found or Violations()
    user_id = found.value(lambda: acting_user(options.user_id, "options.user_id"), None)
    return user_id, from_options(options, validate_only=validate_only, found=found)


@contextmanager
def errors_name(field: str) -> Iterator[None]:
    """Add the field of the request to errors that name only a row or a byte of the payload."""
    try:
        yield
    except InvalidInput as error:
        if error.violations:
            raise
        raise error.about(field) from None


def check_file_type(content_type: str) -> None:
    """Check the content type of the body of an HTTP request that must be a CSV.

    Raises:
        InvalidInput: FILE_TYPE_INVALID.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind and kind not in _FILE_TYPES:
        raise InvalidInput.field(
            "file",
            f"must be the CSV itself, with the content type text/csv (got {kind[:80]!r}); "
            "curl sends a file as it is with --data-binary @people.csv",
            reason="FILE_TYPE_INVALID",
        )


def check_mask(paths: Iterable[str], known: Container[str], hint: Callable[[str], str]) -> None:
    """Check that all paths of an `update_mask` are `known`. `hint` says what to use instead.

    Raises:
        InvalidInput: UPDATE_MASK_INVALID, with each path that is not known.
    """
    wrong = Violations()
    for path in dict.fromkeys(paths):
        with wrong:
            if path not in known:
                raise InvalidInput.field(
                    "update_mask",
                    f"{path[:80]!r} cannot be changed here; {hint(path)}",
                    reason="UPDATE_MASK_INVALID",
                )
    wrong.raise_any()


def check_unchangeable(
    asked: Message, present: Message, field: str, hints: Mapping[str, str]
) -> None:
    """Check that an update without a mask, such as that with a changed copy, changes nothing else.

    `field` names the resource in the request. `hints` say of each field that no update changes what
    to use instead.

    Raises:
        InvalidInput: UPDATE_MASK_INVALID, with each field that is set and not the present value.
    """
    wrong = Violations()
    for given, value in asked.ListFields():
        with wrong:
            if given.name in hints and value != getattr(present, given.name):
                raise InvalidInput.field(
                    f"{field}.{given.name}",
                    f"cannot be changed here; {hints[given.name]}",
                    reason="UPDATE_MASK_INVALID",
                )
    wrong.raise_any()


def requested_pause_end(
    request: batch_service_pb2.PauseBatchRequest | sender_service_pb2.PauseSenderRequest,
) -> datetime | None:
    """Return when the pause ends by itself. None means that only a call ends it."""
    if not request.HasField("pause_end_time"):
        return None
    return from_timestamp(request.pause_end_time, "pause_end_time")
