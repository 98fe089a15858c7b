"""What the requests of an import of suppressions have, and the errors that name their fields."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from outbox.v1 import suppression_service_pb2

from outbox_server.services.scheduler.servicers.calls import named_user
from outbox_server.services.scheduler.suppression_imports import ImportOptions, Part
from outbox_server.shared import bounds
from outbox_server.shared.errors import (
    FieldViolation,
    InvalidInput,
    ResourceExhausted,
    Violations,
)
from outbox_server.shared.intake.batch_options import check_csv_options
from outbox_server.shared.rpc.requested_changes import check_origin

_OPTION: Final = "options.email_column"

ImportRequest: TypeAlias = (
    suppression_service_pb2.ImportSuppressionsRequest
    | suppression_service_pb2.ImportSuppressionsFileRequest
)


def checked_import(first: ImportRequest) -> tuple[str, ImportOptions]:
    """Return the user of an import, and how it is read.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput: USER_ID_REQUIRED, USER_ID_INVALID, SUPPRESSION_REASON_INVALID,
            EMAIL_COLUMN_INVALID, SKIP_LINES_INVALID.
    """
    wrong = Violations()
    user_id = wrong.value(lambda: named_user(first.user_id), "")
    with wrong:
        bounds.SUPPRESSION_REASON.check("suppression_reason", first.suppression_reason)
    with wrong:
        check_csv_options(first.email_column, first.skip_lines)
    with wrong:
        check_origin(first)
    wrong.raise_any()
    return user_id, ImportOptions(first.suppression_reason, first.email_column, first.skip_lines)


@contextmanager
def naming_own_fields(column_given: bool) -> Iterator[None]:
    """Name the fields of an import in errors that name those of the options of a batch."""
    try:
        yield
    except InvalidInput as error:
        if error.violations or _OPTION not in error.message:
            raise
        message = error.message.replace(_OPTION, "email_column")
        raise InvalidInput(
            message,
            reason=error.reason,
            violations=[FieldViolation("email_column", message)] if column_given else [],
            metadata=error.metadata,
        ) from None


def stopped_import(
    error: ResourceExhausted, answer: suppression_service_pb2.ImportSuppressionsResponse
) -> ResourceExhausted:
    """Return the error of a quota, with what the import has stored before."""
    return ResourceExhausted(
        f"{error.message}; the import stopped there, and had suppressed {answer.created_count:,} "
        "new addresses",
        reason=error.reason,
        metadata=error.metadata | {"created_count": str(answer.created_count)},
        retry_after=error.retry_after,
    )


async def import_parts(
    opening: Part | None,
    others: AsyncIterator[suppression_service_pb2.ImportSuppressionsRequest],
) -> AsyncIterator[Part]:
    """Yield the part of the first message, if it has one, and those of the others."""
    if opening is not None:
        yield opening
    async for message in others:
        part = import_part(message)
        if part is not None:
            yield part


def import_part(message: suppression_service_pb2.ImportSuppressionsRequest) -> Part | None:
    """Return the part of a CSV, or the rows, of a message; None if it has neither."""
    match message.WhichOneof("part"):
        case "chunk":
            return message.chunk
        case "rows":
            return [(one.email, one.reason) for one in message.rows.suppressions]
    return None
