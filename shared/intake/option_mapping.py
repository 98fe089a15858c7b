"""Converts the options of a batch and the rejections of its rows from and to protos."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from outbox.v1 import batch_pb2

from outbox_server.shared.errors import Violations
from outbox_server.shared.intake.batch_options import BatchOptions, check_options
from outbox_server.shared.intake.rows import RowRejection
from outbox_server.shared.mail_headers import BadHeader, header_name
from outbox_server.shared.rpc.proto_mapping import from_timestamp, parse_id, whole_ms
from outbox_server.shared.states import BatchMode, DuplicatePolicy, requested_enum


def from_options(
    options: batch_pb2.BatchOptions,
    *,
    validate_only: bool = False,
    found: Violations | None = None,
) -> BatchOptions:
    """Check the options and return them. Unset options get their defaults.

    With `validate_only`, they need no `request_id`: nothing is stored that it could protect.
    `found` has errors about other fields; they are raised with those found here.

    Raises:
        InvalidInput: an option is wrong.
        NotFound: SENDER_NOT_FOUND: the sender's id is not a number.
    """
    found = found or Violations()
    sender_id = found.value(lambda: parse_id(options.sender_id, "options.sender_id"), 0)
    duplicates = found.value(
        lambda: requested_enum(DuplicatePolicy, options.duplicates, "options.duplicates"), None
    )
    mode = found.value(lambda: requested_enum(BatchMode, options.mode, "options.mode"), None)
    return check_options(
        BatchOptions(
            request_id=options.request_id,
            sender_id=sender_id,
            subject=options.subject if options.HasField("subject") else None,
            body=options.body if options.HasField("body") else None,
            html=options.html if options.HasField("html") else None,
            schedule_time=found.value(lambda: _time(options, "schedule_time"), None),
            spacing_ms=found.value(lambda: _ms(options, "spacing"), None) or 0,
            duplicates=duplicates or DuplicatePolicy.KEEP_FIRST,
            mode=mode or BatchMode.PERMISSIVE,
            time_zone=options.time_zone or "UTC",
            expire_after_ms=found.value(lambda: _ms(options, "expire_after"), None),
            spread_until=found.value(lambda: _time(options, "spread_until"), None),
            email_column=options.email_column,
            skip_lines=options.skip_lines,
            # An empty one means none, as in JSON.
            reply_to=options.reply_to or None,
            headers=from_headers(options.headers),
            name_column=options.name_column,
            external_id=options.external_id,
            labels=dict(options.labels),
            external_id_column=options.external_id_column,
            label_columns=tuple(options.label_columns),
        ),
        needs_request_id=not validate_only,
        found=found,
    )


def from_headers(headers: Iterable[batch_pb2.MailHeader]) -> tuple[tuple[str, str], ...]:
    """Return the names, in their usual spelling, and the templates of headers, not checked yet."""
    return tuple((_spelled(each.name), each.value) for each in headers)


def _spelled(name: str) -> str:
    """Return the usual spelling of a header's name. A wrong name is reported by the check."""
    try:
        return header_name(name)
    except BadHeader:
        return name


def _time(
    options: batch_pb2.BatchOptions, name: Literal["schedule_time", "spread_until"]
) -> datetime | None:
    if not options.HasField(name):
        return None
    return from_timestamp(getattr(options, name), f"options.{name}")


def _ms(options: batch_pb2.BatchOptions, name: Literal["spacing", "expire_after"]) -> int | None:
    if not options.HasField(name):
        return None
    return whole_ms(getattr(options, name), f"options.{name}")


def to_rejections(rejections: Iterable[RowRejection]) -> list[batch_pb2.Rejection]:
    """Return the protos of rejections."""
    return [
        batch_pb2.Rejection(
            row_number=rejection.row_number,
            column=rejection.column,
            reason=rejection.reason,
            message=rejection.message,
        )
        for rejection in rejections
    ]
